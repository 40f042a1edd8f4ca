"""`correct` and `compare_methods`: the only place where calibration, solving and selection meet.

May import every package but `integrations` and `cli`."""
