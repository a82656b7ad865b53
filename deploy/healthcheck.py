"""Exits 0 where the server in this container is ready, and with its answer otherwise. The standard library suffices."""

import os
import sys
import urllib.error
import urllib.request


def main() -> str | None:
    """None where ready; otherwise the line to print before exiting with 1."""
    url = f"http://127.0.0.1:{os.environ.get('SPRINT_PORT', '8000')}/health/ready"
    try:
        with urllib.request.urlopen(url, timeout=2.5):
            return None
    except urllib.error.HTTPError as error:
        return f"{url}: {error.code} {error.read(500).decode(errors='replace')}"
    except OSError as error:
        return f"{url}: {error}"


if __name__ == "__main__":
    sys.exit(main())
