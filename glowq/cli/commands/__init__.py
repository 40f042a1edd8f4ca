"""One thin file for each command, over the functions that Python users call.

May import everything, heavy packages only inside functions."""
