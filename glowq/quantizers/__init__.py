"""Support for the quantized linear modules of each quantization library: recognise them, read them, run them safely.

This package may import `errors` and `utils`. In its folder `libraries` each library has one file. The folders `loading`
and `products` hold what some of them need only when a model is loaded or run."""
