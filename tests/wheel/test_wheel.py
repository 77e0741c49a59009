"""The wheel in a fresh environment: with torch alone, then with what its messages say to install."""

import re
import shutil
import subprocess
import sys
import venv

import pytest

from tests.helpers import ROOT, complains

pytestmark = pytest.mark.wheel

LIBRARY = """
import sys, torch, condlr
from torch.nn import *
model = condlr.factorize(Sequential(Conv2d(3, 8, 3), Flatten(), Linear(288, 10)), compression=0.5)
optimizer = torch.optim.Adam(model.parameters())
constraint = condlr.constrain(optimizer, model, tau=0.1)
images = torch.randn(2, 3, 8, 8)
model(images).sum().backward()
optimizer.step()
assert constraint.check()["cond_S"] <= 1.1001
plain = condlr.export(model)
assert (plain(images) - model(images)).abs().max() < 1e-4
assert not {"hydra", "pandas", "torchvision", "numpy.random"} & {*sys.modules}
print(condlr.__file__)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """(its bin/, an empty folder) of an environment that holds the wheel and what that asks for."""
    base = tmp_path_factory.mktemp("wheel")
    source = base / "source"  # what an earlier build left in build/ would be packed as well
    for folder in ("condlr", "conf", "scripts", "results/paper"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", base, source], check=True)
    (wheel,) = base.glob("condlr-*.whl")
    venv.create(base / "venv", with_pip=True)
    install(base / "venv" / "bin", str(wheel))
    (base / "empty").mkdir()
    return base / "venv" / "bin", base / "empty"


def install(bin_, what):
    subprocess.run(
        [bin_ / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", what], check=True
    )


def call(environment, name, *arguments, timeout=900):
    bin_, folder = environment
    done = subprocess.run(
        [bin_ / name, *arguments], cwd=folder, capture_output=True, text=True, timeout=timeout
    )
    return done.returncode, done.stdout, done.stderr


def test_the_library_stands_on_torch_alone(environment):
    status, out, err = call(environment, "python", "-c", LIBRARY)
    assert status == 0, err
    assert str(environment[0].parent) in out  # and not the checkout's


def test_without_the_suite_programs_are_listed_and_one_line_says_what_brings_it(environment):
    status, out, err = call(environment, "condlr")
    assert status == 0 and re.search(r"^  train +Train ", out, re.M), out + err
    complains(call(environment, "condlr", "train"), r"pip install 'condlr\[suite\]'$")


def test_what_the_messages_say_brings_the_suite_and_a_study_runs_in_an_empty_folder(environment):
    bin_, folder = environment
    for lacking, program in (("suite", ["train"]), ("digits", ["train", "experiment=demo", "row=baseline"])):
        status, out, err = call(environment, "condlr", *program)
        said = re.search(r"pip install '(condlr\[\w+\])'", out + err)
        assert status == 1 and said and said[1] == f"condlr[{lacking}]", out + err
        install(bin_, said[1])
    for program in (["train", "experiment=demo"], *([name, "study=demo"] for name in ("collect", "tables"))):
        status, out, err = call(environment, "condlr", *program)
        assert status == 0, out + err
    for name in ("figures", "report", "status", "archive"):
        status, out, err = call(environment, "condlr", name, "study=demo")
        assert status == 0, out + err
    made = {path.name for path in (folder / "results" / "demo").iterdir()}
    assert {"cells.csv", "table.md", "robustness.png", "report.html", "runs.tar.gz"} <= made
    assert sorted(path.name for path in folder.iterdir()) == ["results", "runs"]
    status, out, err = call(environment, "condlr", "figures", "study=demo", "--cfg", "job", "--resolve")
    paper = re.search(r"^paper: (.*)$", out, re.M)
    assert paper and (environment[1] / paper[1] / "table2_lenet5_mnist.csv").exists(), out + err
