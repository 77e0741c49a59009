"""The rooms of the house, read from its imports: which may lean on which."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

# From the ground up. A module leans on its own room and on rooms further down.
FLOORS = [
    {"_support"},
    {"manifolds"},
    {"activations"},
    {"product"},
    {"layers"},
    {"attention", "convolutions"},
    {"allocation", "ranks", "replacement", "sites"},
    {"exporting", "factorization", "forms", "groups", "held", "moments", "reading", "size", "steppers"},
    {"algorithm"},
    {"constraint"},
    {"data", "models"},
    {"attacks"},
    {"adversarial", "evaluation"},
    {"methods", "penalties"},
    {"shifts"},
    {"analysis"},
    {"operators", "overview"},
    {"integrations"},
    {"suite"},
    {"report"},
]
# What the library may not know at all, and what one of its functions may ask for when it is called.
FOREIGN = {"hydra", "omegaconf", "pandas", "matplotlib", "rich"}
EXTRAS = {"torchvision", "scipy", "sklearn", "numpy", "PIL", "pyautoattack", "foolbox", "safetensors"}
EXTRAS |= {"accelerate", "lightning", "peft", "transformers"}


def modules():
    for path in sorted((ROOT / "condlr").rglob("*.py")):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path


def imports(path):
    """(module, whether it is imported when the file is) for each import of a file."""
    tree = ast.parse(path.read_text("utf-8"))
    later = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    } | {
        node
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and ast.unparse(test.test) == "TYPE_CHECKING"
        for node in ast.walk(test)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node not in later
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in HOUSE else node.module), node not in later


HOUSE = dict(modules())


def room(module):
    return module.split(".")[1] if "." in module else ""


def floor(module):
    return next(number for number, rooms in enumerate(FLOORS) if room(module) in rooms)


IMPORTS = {module: list(imports(path)) for module, path in HOUSE.items() if module != "condlr"}


def test_every_room_has_its_floor():
    rooms = {room(module) for module in IMPORTS}
    assert rooms <= set().union(*FLOORS)


@pytest.mark.parametrize("module", IMPORTS)
def test_arrows_point_down(module):
    back = [other for other, _ in IMPORTS[module] if other in IMPORTS and floor(other) > floor(module)]
    assert not back, f"{module} leans on what stands above it"


def test_no_files_import_each_other_in_a_circle():
    below = {
        module: {other for other, now in found if now and other in IMPORTS and other != module}
        for module, found in IMPORTS.items()
    }
    while ready := [module for module, others in below.items() if not others & below.keys()]:
        for module in ready:
            del below[module]
    assert not below


@pytest.mark.parametrize("module", [m for m in IMPORTS if room(m) not in ("suite", "report", "integrations")])
def test_the_library_knows_no_suite_and_stands_on_torch_alone(module):
    for other, now in IMPORTS[module]:
        package = other.partition(".")[0]
        assert package not in FOREIGN, f"{module} imports {other}"
        assert not (now and package in EXTRAS), f"{module} imports {other} before it is asked for it"


@pytest.mark.parametrize("module", [m for m in IMPORTS if room(m) == "integrations"])
def test_an_integration_knows_the_library_that_it_is_named_after_alone(module):
    packages = {other.partition(".")[0] for other, _ in IMPORTS[module]}
    assert not packages & FOREIGN and packages & EXTRAS <= {module.rpartition(".")[2]}


@pytest.mark.slow
def test_the_door_opens_with_torch_alone():
    names = sorted(FOREIGN | EXTRAS)
    code = (
        f"import sys\nsys.modules |= dict.fromkeys({names})\n"  # as if they were not installed
        "import torch, condlr\n"
        "from torch.nn import *\n"
        "model = Sequential(Conv2d(3, 8, 3), Flatten(), Linear(288, 10))\n"
        "model = condlr.factorize(model, compression=0.5)\n"
        "optimizer = torch.optim.Adam(model.parameters())\n"
        "condlr.constrain(optimizer, model, tau=0.1)\n"
        "model(torch.randn(2, 3, 8, 8)).sum().backward(); optimizer.step()\n"
        "condlr.export(model)(torch.randn(2, 3, 8, 8))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_module_hands_on_what_lives_elsewhere():
    """But for condlr itself, the door: a package's face is its docstring."""
    for path in (ROOT / "condlr").rglob("__init__.py"):
        if path.parent != Path(ROOT / "condlr"):
            body = ast.parse(path.read_text("utf-8")).body
            assert all(isinstance(node, ast.Expr) for node in body), path
