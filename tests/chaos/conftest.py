import pytest


def pytest_collection_modifyitems(config, items):
    """Ten minutes of chaos are for those who ask for them: `pytest -m chaos`."""
    if "chaos" in config.option.markexpr:
        return
    for item in items:
        if "chaos" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="make test-chaos"))
