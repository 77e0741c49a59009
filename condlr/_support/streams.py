"""Output to terminals and log files that cannot show all characters."""

import io
import sys


def tolerate() -> None:
    """Print `?` for characters that stdout or stderr cannot show (τ in Latin-1), instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "replace":
            stream.reconfigure(errors="replace")
