import atexit
import os
import runpy
import shutil
import sys
import tempfile
from multiprocessing import forkserver

# The tests' matrices are small: a second thread would only wait, and fight other processes for cores.
os.environ["OMP_NUM_THREADS"] = "1"  # also of the programs they start

import pytest
import torch
from joblib.externals.loky import reusable_executor

import condlr.suite.cli  # noqa: F401  (what makes the sweeper of our configs known to Hydra)
from tests.helpers import ROOT

torch.set_num_threads(1)

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

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
        return stop.value.code, *capfd.readouterr()

    yield run
    # What outlives a sweep but not a command: joblib's workers, and the fork server, have this test's
    # directory, stdout and stderr for their own
    if reusable_executor._executor is not None:
        reusable_executor._executor.shutdown(wait=True, kill_workers=True)
    forkserver._forkserver._stop()


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        for name in ("slurm", "ray", "wheel", "chaos"):  # minutes each, and only for those who ask for them
            if item.get_closest_marker(name) and name not in config.option.markexpr:
                item.add_marker(pytest.mark.skip(reason=f"make test-{name}"))
