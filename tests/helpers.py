"""What several test files use: where the project is, small runs, a wait that ends."""

import os
import re
import runpy
import sys
import threading
import time
from contextlib import contextmanager
from multiprocessing.reduction import DupFd
from pathlib import Path

import numpy as np
import pytest

from condlr.suite.sweeps import processes

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["dataset=digits", "protocol=demo", "protocol.epochs=1", "attack.eps=[0,0.1]"]


def run_script(name, *arguments):
    """Run a script in this process; its exit status."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", [f"{name}.py", *arguments])
        runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
    return stop.value.code


class Streams:
    """This process's stdout and stderr, for one that is forked off a server which was started with others."""

    def __reduce__(self):
        return _take, (DupFd(1), DupFd(2))


def _take(*streams):
    for number, stream in enumerate(streams, 1):
        os.dup2(stream.detach(), number)


def work_with(streams, *arguments):
    """What a run's process does, with the streams that it took as it was told what to do."""
    processes._work(*arguments)


def write_idx(path, array):
    """A file in the layout of MNIST's."""
    header = (0x800 + array.ndim).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def complains(result, pattern):
    """Exit status 1, nothing that looks like a traceback, and one line on stderr that matches."""
    status, out, err = result
    lines = [line for line in err.splitlines() if line.strip()]
    assert status == 1, (out, err)
    assert "Traceback" not in out + err
    assert len(lines) == 1, err
    assert re.search(pattern, lines[0]), lines[0]
    assert lines[0].startswith("error: ")


def wait_for(condition, what="", seconds=120, every=0.02):
    """What `condition` returns once that is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain: {what}"
        time.sleep(every)
    return found


@contextmanager
def at_once(condition, action):
    """Meanwhile, in a thread: do something with what `condition` returns, once that is true."""
    thread = threading.Thread(target=lambda: action(wait_for(condition)))
    thread.start()
    yield
    thread.join()
