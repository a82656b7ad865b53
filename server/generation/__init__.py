"""Turns checked requests into encoded images: admission, queue, engine thread, encoding. Knows no HTTP."""
