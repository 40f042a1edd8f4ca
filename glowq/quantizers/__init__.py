"""What a library's quantized linear module is: how it is recognised, read back and made safe to run.

May import `errors` and `utils`; `libraries` holds one file for each library, and only it knows their names."""
