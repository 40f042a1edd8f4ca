"""The corrected forward: operators, the container of a group's factors, hooks, attaching, switching, fused kernels.

May import `errors`, `factors` and `quantizers`."""
