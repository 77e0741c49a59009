"""Where a program's words go: terminals and log files that cannot show all that it has to say."""

import io
import sys


def tolerate() -> None:
    """Let what stdout or stderr cannot show (τ and ± in Latin-1) become `?`, and end no run, from now on."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "replace":
            stream.reconfigure(errors="replace")
