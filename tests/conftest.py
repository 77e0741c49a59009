import atexit
import os
import shutil
import tempfile

# The tests' matrices are small: a second thread would only wait, and fight other processes for cores.
os.environ["OMP_NUM_THREADS"] = "1"  # also of the programs they start

import pytest
import torch

import condlr.cli  # noqa: F401  (what makes the sweeper of our configs known to Hydra)

torch.set_num_threads(1)

# What layers were timed at is kept for the tests alone, also by the programs they start.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        for name in ("slurm", "ray", "chaos"):  # minutes each, and only for those who ask for them
            if item.get_closest_marker(name) and name not in config.option.markexpr:
                item.add_marker(pytest.mark.skip(reason=f"make test-{name}"))
