"""The corrected forward: operators, the container of a group's factors, hooks, attaching, switching, fused kernels.

This package may import `errors`, `factors` and `quantizers`."""
