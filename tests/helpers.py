"""What several test files use: where the project is, small runs, a wait that ends."""

import re
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["dataset=digits", "protocol=demo", "protocol.epochs=1", "attack.eps=[0,0.1]"]


def complains(result, pattern):
    """Exit status 1, nothing that looks like a traceback, and one line on stderr that matches."""
    status, out, err = result
    lines = [line for line in err.splitlines() if line.strip()]
    assert status == 1, (out, err)
    assert "Traceback" not in out + err
    assert len(lines) == 1, err
    assert re.search(pattern, lines[0]), lines[0]
    assert lines[0].startswith("error: ")


def wait_for(condition, seconds=120, what="", every=0.02):
    """What `condition` returns once that is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain: {what}"
        time.sleep(every)
    return found
