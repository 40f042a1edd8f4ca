"""Upload to the Hub: what a saved folder holds that may be published, and the push itself.

This package may import what the rest of `artifact` may, and the files of `artifact` itself.
"""
