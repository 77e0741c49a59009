"""The pages: examples run as they stand, links and commands exist, numbers are those measured."""

import csv
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from itertools import pairwise

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

import condlr.suite.cli
from condlr.suite.config import CONF, check
from tests.helpers import ROOT

README = (ROOT / "README.md").read_text()
SWEEPS = (ROOT / "docs" / "sweeps.md").read_text()
TABLES = (ROOT / "docs" / "tables.md").read_text()
COST = (ROOT / "docs" / "cost.md").read_text()
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/*/README.md")})
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(language, text):
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def test_the_ten_lines_of_the_readme(capsys):
    (example,) = blocks("python", README)
    scope = {}
    exec(example, scope)
    assert "cond_S" in capsys.readouterr().out
    kinds = {type(module) for module in scope["plain"].modules()}
    assert kinds <= {nn.Sequential, nn.Linear, nn.ReLU}


def test_the_library_example(capsys):
    example, spel, _, virtual = blocks("python", (ROOT / "docs" / "library.md").read_text())
    model = nn.Sequential()
    model.add_module("body", nn.Linear(20, 30))
    model.add_module("head", nn.Linear(30, 3))
    scope = {"torch": torch, "model": model}
    exec(example, scope)
    assert "cond_S" in capsys.readouterr().out
    assert {type(module) for module in scope["plain"].modules()} <= {nn.Sequential, nn.Linear}
    exec(spel, scope | {"condlr": condlr, "model": nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 3))})
    model = nn.Sequential()
    model.add_module("layer4", nn.Linear(20, 30))
    scope |= {"condlr": condlr, "model": model, "images": torch.ones(5, 20), "labels": torch.arange(5)}
    exec(virtual, scope)
    scope["loss"].backward()
    assert scope["plain"].state_dict().keys() == {"layer4.weight", "layer4.bias"}


EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_as_it_stands(path, tmp_path, monkeypatch, capsys):
    """Those on digits reach what they should; the one on CIFAR-10 sees 64 made images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [path.name, str(tmp_path), "1"])
    if path.stem == "resnet18":
        few_images(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scope = runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    model = next(scope[name] for name in ("model", "module") if name in scope)
    if path.stem == "spel":
        of_dense, of_spel = (float(value) for value in re.findall(r"(0\.\d+) under FGSM", printed))
        assert of_spel > of_dense + 0.05
        return
    assert "cond_S" in printed
    assert condlr.audit(model)["cond_S"] <= 1.1 * (1 + 1e-4)
    if "accuracy" in scope and not callable(scope["accuracy"]):
        assert scope["accuracy"] > 0.85
    assert path.stem != "resnet18" or (tmp_path / "resnet18.pt").exists()


def few_images(patch):
    """torchvision's CIFAR-10 has 64 images, and nothing is fetched."""
    from torchvision.datasets import CIFAR10

    def made(self, root, train, transform, download):
        self.transform, self.target_transform = transform, None
        generator = torch.Generator().manual_seed(0)
        self.data = torch.randint(256, (64, 32, 32, 3), generator=generator).to(torch.uint8).numpy()
        self.targets = torch.randint(10, (64,), generator=generator).tolist()

    patch.setattr(CIFAR10, "__init__", made)


def test_the_page_of_the_library_names_every_example_and_call():
    page = (ROOT / "docs" / "library.md").read_text()
    for path in EXAMPLES:
        assert f"(examples/{path.name})" in page
    for name in condlr.__all__:
        assert name.startswith("LowRank") or name in page, name


@pages
def test_every_link_target_and_program_exists(page):
    text, makefile = page.read_text(), (ROOT / "Makefile").read_text()
    for path, anchor in re.findall(r"\]\((?!https?:)([\w/.-]*)(?:#([\w-]+))?\)", text):
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for targets in re.findall(r"^make ([a-z0-9 -]+)", text, re.M):
        for target in targets.split():
            assert re.search(rf"^{target}:", makefile, re.M), target
    for name in re.findall(r"^condlr (\w+)", text, re.M) + re.findall(r"scripts/(\w+)\.py", text):
        assert page.name == "CHANGELOG.md" or (ROOT / "scripts" / f"{name}.py").exists(), name


@pages
def test_pages_are_finished_and_no_wider_than_a_window(page):
    text = page.read_text()
    assert not re.search(r"^[A-Z]+$|\b(TODO|STORE|COLLECT|XXX)\b", text, re.M)
    lines = [line for line in text.splitlines() if not line.startswith("|")]
    assert not [line for line in lines if len(line) > 110]


def test_the_paths_that_the_changelog_sends_to_exist():
    table = (ROOT / "CHANGELOG.md").read_text().partition("### Import paths")[2]
    moved = re.findall(r"^\| `condlr\.([\w.]+)` \| (.*) \|$", table, re.M)
    assert len(moved) > 40
    for _, now in moved:
        for path in re.findall(r"`([\w.]+)`", now):
            assert (ROOT / f"{path.replace('.', '/')}.py").exists(), path


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 160


@pytest.mark.slow
def test_the_sweeps_are_sweeps_of_configs_that_can_be():
    commands = re.findall(r"^condlr train (.*)$", SWEEPS.replace("\\\n", " "), re.M)
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


# For each kind that docs/extending.md adds: where the study `mine` shows it.
SHOWN = {
    "method": ("*spectral_decay*/run.json", '"status": "done"'),
    "penalty": ("*+ridge-*/history.csv", "penalty_value"),
    "network": ("mlp-*/config.yaml", "name: mlp"),
    "dataset": ("*-stripes-*/run.json", '"status": "done"'),
    "attack": ("*/evaluation.csv", "brightness"),
    "shift": ("*/shift.csv", "negatives,negative"),
    "analysis": ("*condlr*/weights.csv", "conv1.Vt"),
}
EXTENDING = (ROOT / "docs" / "extending.md").read_text()
SECTIONS = dict(re.findall(r"^## Adding an? (\w+)\n(.*?)(?=^## |\Z)", EXTENDING, re.S | re.M))
# All commands in one process, which pays once for importing torch
DRIVER = """
import json, runpy, shlex, sys
for line in sys.stdin:
    program, *sys.argv[1:] = shlex.split(line)
    try:
        runpy.run_path(f"scripts/{program}.py", run_name="__main__")
    except SystemExit as stop:
        print(json.dumps([line.strip(), stop.code]), file=sys.stderr)
"""


def extend(copy):
    """A copy of the checkout with every example of docs/extending.md in its place; how its commands ended."""
    for folder in ("condlr", "conf", "scripts", "results/paper"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    commands = []
    for text in SECTIONS.values():
        for language in ("python", "yaml"):
            (code,) = blocks(language, text)
            (path,) = (copy / path for path in re.findall(r"^# ((?:condlr|conf)/\S+)$", code, re.M))
            assert not path.exists(), path
            path.write_text(code)
        (shell,) = blocks("sh", text)
        commands += re.findall(r"^condlr (.*)$", shell, re.M)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], input="\n".join(commands), cwd=copy, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(copy)},
    )  # fmt: skip
    ended = dict(json.loads(line) for line in done.stderr.splitlines() if line.startswith("["))
    (copy / "ended.json").write_text(json.dumps([ended, done.stdout + done.stderr]))


@pytest.fixture(scope="session")
def extended(once):
    copy = once("extended", extend)
    return copy, *json.loads((copy / "ended.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("kind", SECTIONS)
def test_what_is_added_as_the_page_says_goes_the_whole_way(extended, kind):
    copy, ended, said = extended
    (shell,) = blocks("sh", SECTIONS[kind])
    for command in re.findall(r"^condlr (.*)$", shell, re.M):
        assert ended.get(command) == 0, said
    pattern, text = SHOWN[kind]
    assert any(text in path.read_text() for path in (copy / "runs" / "mine").glob(pattern)), said


def test_the_numbers_are_those_of_the_results():
    """Each row of the table is in the Markdown that scripts/tables.py made of the committed results."""
    made = (ROOT / "results" / "reproduce_mnist" / "table.md").read_text()
    table = re.sub(r"\*\*|</?ins>", "", made.partition("**Table 2.")[2].partition("\n- ")[0])
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in table.splitlines()]
    # Below each row stands what was published
    lines = {tuple(row[:2]): row + below for row, below in pairwise(rows) if len(row) > 1}
    shown = re.findall(r"^\| (\w.*?) \| (\d+) % \| (.*) \|$", TABLES, re.M)
    assert len(shown) == 12
    for name, compression, numbers in shown:
        assert {number.strip() for number in numbers.split("|")} <= {*lines[name, compression]}, name


def test_the_costs_are_those_of_the_benchmark():
    """Each row of the table of costs is what the committed benchmark measured."""
    (shown,) = re.findall(r"!\[Milliseconds for a step, by form\]\((.*)\.png\)", COST)
    rows = list(csv.DictReader((ROOT / "docs" / f"{shown}.csv").open()))

    def milliseconds(network, compression, form, part="step"):
        (found,) = (
            float(row["milliseconds"])
            for row in rows
            if (row["network"], row["form"], row["part"]) == (network, form, part)
            and (form == "dense" or (row["rank_rule"], float(row["compression"])) == ("params", compression))
        )
        return found

    shown = re.findall(r"^\| (LeNet5|VGG16), (\d+) % \| (.*) \|$", COST, re.M)
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
