import pytest


def pytest_collection_modifyitems(config, items):
    if "slurm" in config.option.markexpr:
        return
    for item in items:
        if "slurm" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="starts a Slurm: make test-slurm"))
