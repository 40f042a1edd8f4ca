"""Work on a transformers model without a correction: loading, blocks, groups, the reference model, weight errors.

This package may import `errors`, `utils`, `factors` and `quantizers`."""
