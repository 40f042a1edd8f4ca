"""One file per quantization library. All files of this folder are imported, and each registers its backends.

A file may import `errors`, `utils` and the rest of `quantizers`. It imports the library itself, transformers and torch
only inside functions: a command that reads the headers of a model needs the file, and answers before torch is imported.
Files whose names start with an underscore are shared code and register nothing."""
