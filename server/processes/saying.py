"""What is printed for whoever started the server; the log is elsewhere (server/telemetry/logs.py)."""

import os
import sys


def say(line: str) -> None:
    """Prints a line where somebody may read it; serving does not depend on it.

    A terminal that is ASCII gets escapes. A pipe that nobody reads is left alone from then on.
    """
    if sys.stdout is None:  # closed before the start
        return
    encoding = sys.stdout.encoding or "ascii"
    try:
        print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process, its last flush included
