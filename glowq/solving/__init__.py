"""Linear algebra: a weight error and its moments in, nested low-rank factors out; no model, file or text is known here.

May import `errors` only."""
