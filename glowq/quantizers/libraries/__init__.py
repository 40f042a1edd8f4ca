"""One file for each quantization library, found by its place in this folder; each calls `register`.

May import `errors`, `utils` and the rest of `quantizers`; a library itself is imported only inside functions."""
