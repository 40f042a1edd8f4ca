"""Several corrections of one model, and other settings of its base, beside each other at equal bytes."""
