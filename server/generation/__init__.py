"""From a checked request to encoded images: admission, queue, engine thread, encoding. Knows no HTTP."""
