"""The README's examples run as they stand, and the commands of both pages are commands."""

import csv
import re
import shlex
from itertools import pairwise

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

import condlr.suite.cli  # noqa: F401  (registers the resolvers that conf/ uses)
from condlr.factorization import Scheme
from condlr.methods.base import Method
from condlr.suite.config import CONF, check
from tests.helpers import ROOT

README = (ROOT / "README.md").read_text()
SWEEPS = (ROOT / "SWEEPS.md").read_text()


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
    makefile = (ROOT / "Makefile").read_text()
    for page in (README, SWEEPS):
        for targets in re.findall(r"^make ([a-z0-9 -]+)", page, re.M):
            for target in targets.split():
                assert re.search(rf"^{target}:", makefile, re.M), target
        for path in re.findall(r"\]\(([\w/.]+)\)", page) + re.findall(r"python (scripts/\w+\.py)", page):
            assert (ROOT / path).exists(), path


def test_nothing_is_left_to_be_filled_in():
    for page in (README, SWEEPS):
        assert not re.search(r"^[A-Z]+$|\b(TODO|STORE|COLLECT|XXX)\b", page, re.M)


def test_the_sweeps_are_sweeps_of_configs_that_can_be():
    commands = re.findall(r"^python scripts/train\.py (.*)$", SWEEPS.replace("\\\n", " "), re.M)
    assert len(commands) > 5
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for command in commands:
            words = [word for word in shlex.split(command, comments=True) if word != "-m"]
            ours = [word for word in words if not word.startswith(("hydra/", "hydra."))]
            one = [re.sub(r"=([\w.]+),.*", r"=\1", word) for word in ours]
            config = compose("train", one, return_hydra_config=True)
            rows = (config.hydra.sweeper.params or {}).get("row", "").split(",")
            check(compose("train", [*one, f"row={rows[0].strip()}"] if rows[0] else one))
            for launcher in (w.partition("=")[2] for w in words if w.startswith("hydra/launcher=")):
                assert (CONF / "hydra" / "launcher" / f"{launcher}.yaml").exists()


def test_the_methods_example_is_a_method(tmp_path, monkeypatch):
    """Put where the README says, it is found, built from its config, and trains."""
    import condlr.methods
    from condlr.suite import config, registry

    (code,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "(Method)" in block)
    (options,) = re.findall(r"```yaml\n(.*?)```", README, re.S)
    (tmp_path / "spectral_decay.py").write_text(code)
    monkeypatch.setattr(condlr.methods, "__path__", [*condlr.methods.__path__, str(tmp_path)])
    assert "spectral_decay" in registry.available("methods")
    keys = OmegaConf.to_container(OmegaConf.create(options))
    assert isinstance(keys, dict)
    method, _ = config.choose("method", "methods", keys, Method)  # type: ignore[arg-type]
    net = method.apply(nn.Sequential(nn.Linear(8, 8)), Scheme(0.3))
    optimizer = method.optimizer(net, lr=0.1, momentum=0.0)
    assert method.label() == "spectral_decay"
    before = net(torch.ones(1, 8)).norm()
    for _ in range(3):
        method.step(net, optimizer, torch.ones(4, 8), torch.zeros(4, dtype=torch.long))
    assert net(torch.ones(1, 8)).norm() != before


def test_the_numbers_are_those_of_the_results():
    """Each row of the table is in the Markdown that scripts/tables.py made of the committed results."""
    made = (ROOT / "results" / "reproduce_mnist" / "table.md").read_text()
    table = re.sub(r"\*\*|</?ins>", "", made.partition("**Table 2.")[2].partition("\n- ")[0])
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in table.splitlines()]
    # Below each row stands what was published
    lines = {tuple(row[:2]): row + below for row, below in pairwise(rows) if len(row) > 1}
    shown = re.findall(r"^\| (\w.*?) \| (\d+) % \| (.*) \|$", README, re.M)
    shown = [row for row in shown if "," not in row[0]]
    assert len(shown) == 12
    for name, compression, numbers in shown:
        assert {number.strip() for number in numbers.split("|")} <= {*lines[name, compression]}, name


def test_the_costs_are_those_of_the_benchmark():
    """Each row of the table of costs is what the committed benchmark measured."""
    (shown,) = re.findall(r"!\[Milliseconds for a step, by form\]\((.*)\.png\)", README)
    rows = list(csv.DictReader((ROOT / f"{shown}.csv").open()))

    def milliseconds(network, compression, form, part="step"):
        (found,) = (
            float(row["milliseconds"])
            for row in rows
            if (row["network"], row["form"], row["part"]) == (network, form, part)
            and (form == "dense" or (row["rank_rule"], float(row["compression"])) == ("params", compression))
        )
        return found

    shown = re.findall(r"^\| (LeNet5|VGG16), (\d+) % \| (.*) \|$", README, re.M)
    assert len(shown) == 4
    for network, compression, numbers in shown:
        who = network.lower(), int(compression) / 100
        dense, free, ours, naive = (
            milliseconds(*who, form) for form in ("dense", "unconstrained", "condlr", "naive")
        )
        expected = [dense, free, ours, milliseconds(*who, "condlr", "constraint"), naive]
        expected += [ours / dense, ours / free, naive / ours]
        for text, value in zip(numbers.split("|"), expected, strict=True):
            text = text.strip().replace(",", "")
            digits = len(text.partition(".")[2])
            assert abs(float(text) - value) <= 0.51 * 10**-digits, (network, compression, text, value)
