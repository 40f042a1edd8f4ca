"""What is asked of a transformers model that carries no correction: loading, blocks, groups, reference, weight errors.

May import `errors`, `utils`, `factors` and `quantizers`."""
