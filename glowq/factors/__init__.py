"""The data that all packages exchange: groups, their factors, and the forms of factors with few bits.

This package may import only `errors`."""
