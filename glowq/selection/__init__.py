"""From measured gains and a budget of bytes to a rank for every group.

May import `errors` and `factors`."""
