import atexit
import gc
import os
import shutil
import tempfile
from functools import partial

# The tests' matrices are small: a second thread would only wait, and fight other processes for cores.
os.environ["OMP_NUM_THREADS"] = "1"  # also of the programs they start

import pytest
import torch
from joblib.externals.loky import reusable_executor
from joblib.externals.loky.backend import fork_exec

import condlr.suite.cli  # noqa: F401  (what makes the sweeper of our configs known to Hydra)
from condlr.data.base import Data
from condlr.data.digits import Digits
from condlr.suite.sweeps import processes
from tests.helpers import Streams, configure_once, made_once, run_script, start_worker, work_with

torch.set_num_threads(1)
os.fsync = os.fstat  # nobody looks at these files after a power failure
configure_once()
gc.disable()  # until all tests are found: searches for garbage take a third of that time

# What layers were timed at is kept for the tests alone, also by the programs they start.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def script(tmp_path, monkeypatch, capfd):
    """Run a script in this process, in an empty directory: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CONDLR_DATA", raising=False)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    # The fork server outlives the test that started it, for it imports torch for seconds
    monkeypatch.setattr(processes, "_work", partial(work_with, Streams()))
    monkeypatch.setattr(fork_exec, "fork_exec", start_worker)

    def run(name, *arguments):
        capfd.readouterr()
        return run_script(name, *arguments), *capfd.readouterr()

    yield run
    # joblib's workers outlive a sweep but not a command: they have this test's directory, stdout and stderr
    if reusable_executor._executor is not None:
        reusable_executor._executor.shutdown(wait=True, kill_workers=True)


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """`once(name, make)` is a directory with what `make(directory)` leaves there; all workers share it."""
    return partial(made_once, tmp_path_factory)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A few digits, in three parts."""
    digits = Digits().load(tmp_path_factory.mktemp("data"))
    return Data(digits.train.take(slice(250)), digits.test.take(slice(50)), 10).hold_out(0.2, 0)


def pytest_collection_finish():
    """What is imported by now stays, and is not searched again for what may be freed."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)  # memory is at hand, and searching took 8 % of the tests
    gc.enable()


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        for name in (
            "slurm",
            "ray",
            "wheel",
            "chaos",
            "long",
            "networks",
        ):  # minutes each, and only for those who ask for them
            if item.get_closest_marker(name) and name not in config.option.markexpr:
                item.add_marker(pytest.mark.skip(reason=f"make test-{name}"))


def pytest_unconfigure():
    """What is frozen is not freed at the exit, and triton would list it as leaks."""
    gc.unfreeze()
