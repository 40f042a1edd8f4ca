"""`correct` and `compare_methods`, which combine calibration, solving and selection.

This package may import every package except `integrations` and `cli`."""
