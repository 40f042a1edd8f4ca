"""One thin file for each command, over the functions that Python users call.

May import everything; what imports torch or transformers only inside functions, so that --help answers at once."""
