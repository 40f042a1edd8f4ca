"""Choose a rank for every group, from measured gains and a budget of bytes.

This package may import `errors` and `factors`."""
