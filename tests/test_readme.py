"""The README's example runs as it stands."""

import re
from pathlib import Path

import torch
from torch import nn

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_the_library_example(capsys):
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "factorize" in block)
    model = nn.Sequential()
    model.add_module("body", nn.Linear(20, 30))
    model.add_module("head", nn.Linear(30, 3))
    scope = {"torch": torch, "model": model}
    exec(example, scope)
    assert "cond_S" in capsys.readouterr().out
    assert {type(module) for module in scope["plain"].modules()} <= {nn.Sequential, nn.Linear}


def test_every_target_and_script_it_names_exists():
    root = Path(__file__).resolve().parent.parent
    makefile = (root / "Makefile").read_text()
    for targets in re.findall(r"^make ([a-z ]+)", README, re.M):
        for target in targets.split():
            assert re.search(rf"^{target}:", makefile, re.M), target
    for path in re.findall(r"\]\(([\w/.]+)\)", README) + re.findall(r"python (scripts/\w+\.py)", README):
        assert (root / path).exists(), path
