"""Whether a server in this container answers: `check_http.py ADDRESS` exits 0 if it does, 1 if not."""

import sys
import urllib.request

TIMEOUT = 3.0
"""Seconds; less than the image's own time for a check."""


def answers(address: str) -> bool:
    """Whether GET `address` is answered with a success."""
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as response:
            return bool(response.status < 300)
    except OSError as error:  # refused, timed out, or an HTTP error, which urllib derives from it
        sys.stderr.write(f"{address}: {error}\n")
        return False


if __name__ == "__main__":
    sys.exit(0 if answers(sys.argv[1]) else 1)
