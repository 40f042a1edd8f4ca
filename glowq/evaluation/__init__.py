"""How good or how fast a model is; nothing here knows how factors are made.

May import `data`, `models`, `runtime` and what those may import."""
