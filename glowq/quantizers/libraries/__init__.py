"""One file per quantization library. All files of this folder are imported, and each registers its backends.

A file may import `errors`, `utils` and the rest of `quantizers`. It imports the library itself only inside functions.
Files whose names start with an underscore are shared code and register nothing."""
