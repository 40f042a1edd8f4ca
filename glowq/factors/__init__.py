"""The data that all packages exchange: groups, their factors, and the int8 form of factors.

This package may import only `errors`."""
