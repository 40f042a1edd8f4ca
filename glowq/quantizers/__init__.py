"""Support for the quantized linear modules of each quantization library: recognise them, read them, run them safely.

This package may import `errors` and `utils`. Its folder `libraries` holds all code for particular libraries, one file
per library."""
