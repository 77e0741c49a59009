"""A new analysis and a new shift, from one Python file and one YAML file each to table and page."""

import csv
import sys
from importlib import import_module

import pytest
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from condlr._support.rooms import available
from condlr.suite import opened
from tests.helpers import SMALL, complains

ANALYSES = {
    "ranks": '''
"""Ranks."""
from dataclasses import dataclass
from condlr.analysis.base import Analysis
from condlr.factorization import low_rank_layers

@dataclass
class Ranks(Analysis):
    title = "Ranks of the layers"
    legend = "Least asked for: {least}."
    keys = ("layer",)
    columns = {"layer": "{layer}", "rank": "{rank}"}
    least: int = 1

    def __post_init__(self):
        if self.least < 1:
            raise ValueError("least must be positive")

    def require(self, trained):
        if self.least > trained.test_images:
            raise ValueError("least is larger than the test set")

    def rows(self, trained):
        for name, layer in low_rank_layers(trained.model).items():
            yield {"layer": name, "rank": layer.rank, "least": self.least}
''',
    "seen": '''
"""What is seen."""
from dataclasses import dataclass
from condlr.analysis.base import Analysis

@dataclass
class Seen(Analysis):
    title = "What was seen"
    keys = ("what",)
    columns = {"what": "{what}", "number": "{number:.1f}", "by": "{by}"}
    layout = "runs"
    packages = ("json",)

    def rows(self, trained):
        return [
            {"what": "test images", "number": len(trained.data.test), "by": "counting"},
            {"what": "classes", "number": trained.data.classes, "by": "counting"},
        ]
''',
}  # fmt: skip
SHIFT = '''
"""Inverted."""
from dataclasses import dataclass
from condlr.data.base import Images
from condlr.shifts.base import Shift, ShiftedSet

@dataclass
class Inverted(Shift):
    title = "Negatives"
    legend = "Pixels are 255 - x."

    def sets(self, test_images, root):
        n = self.count(test_images)
        return [ShiftedSet("whole", None, n), ShiftedSet("half", 1, n), ShiftedSet("half", 2, n)]

    def make(self, which, data, root):
        chosen = data.test.take(slice(which.n))
        pixels = chosen.pixels // 2**which.severity if which.severity else 255 - chosen.pixels
        return Images(pixels, chosen.labels)
'''


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def rooms(tmp_path_factory, monkeypatch):
    """The rooms and their groups of configs, with a folder more."""
    home = tmp_path_factory.mktemp("rooms")
    files = {("analysis", name): text for name, text in ANALYSES.items()} | {("shifts", "inverted"): SHIFT}
    for (room, name), text in files.items():
        (home / room).mkdir(exist_ok=True)
        (home / room / f"{name}.py").write_text(text)
        package = import_module(f"condlr.{room}")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(home / room)])
    for group, name, text in (
        ("analysis", "ranks", "# @package analysis.ranks\nleast: 1\n"),
        ("analysis", "seen", "# @package analysis.seen\n"),
        ("shift", "inverted", "name: inverted\nimages: null\nseed: 0\n"),
    ):
        (home / "conf" / group).mkdir(parents=True, exist_ok=True)
        (home / "conf" / group / f"{name}.yaml").write_text(text)

    class More(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            search_path.append("test", f"file://{home / 'conf'}")

    Plugins.instance().register(More)
    yield home
    Plugins.instance().class_name_to_class.pop(More.__module__ + "." + More.__name__, None)
    Plugins.instance().plugin_type_to_subclass_list[SearchPathPlugin].remove(More)
    for room, name in files:
        sys.modules.pop(f"condlr.{room}.{name}", None)
        vars(import_module(f"condlr.{room}")).pop(name, None)


def test_the_rooms_offer_their_files_alone(rooms):
    assert {"ranks", "seen", "audit", "cost"} <= {*available("analysis")}
    assert not {"sceptic", "theory", "base", "_layers"} & {*available("analysis")}
    assert {"corruptions", "inverted"} <= {*available("shifts")}
    assert not {"base", "_graded"} & {*available("shifts")}


@pytest.mark.slow
def test_one_file_and_one_yaml_go_the_whole_way(script, rooms, tmp_path, monkeypatch):
    assert script("train", "-m", *SMALL, "method=baseline,condlr", "study=s")[0] == 0
    runs = {path.name.split("-")[2]: path for path in (tmp_path / "runs" / "s").glob("lenet5-*")}
    run = runs["condlr"]
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    both = ["evaluate", f"run={run}", "analysis=[ranks,seen]"]
    # All mistakes come first
    complains(script(*both, "shift=inverted", "shift.images=9999"), "shift.images=9999, but there are only")
    complains(
        script(*both, "shift=inverted", "analysis.ranks.least=0"), "analysis.ranks.least must be positive"
    )
    complains(script(*both, "analysis.ranks.least=9999", "attack.eps=[0.3]"), "ranks: least is larger than")
    module = import_module("condlr.analysis.seen")
    monkeypatch.setattr(module.Seen, "packages", ("no_such_package",))
    complains(
        script(*both, "attack.eps=[0.3]"), "analysis=seen needs the package no_such_package: pip install"
    )
    monkeypatch.setattr(module.Seen, "packages", ("json",))
    with monkeypatch.context() as patch:
        patch.setattr(module.Seen, "rows", lambda *_: [{"what": "x", "compression": 2.0, "by": "y"}])
        complains(script("evaluate", f"run={run}", "analysis=seen"), "seen has a column compression, as tabl")
    assert before == {path: path.read_bytes() for path in run.iterdir() if path.is_file()}

    # One attack, two analyses and a shift open the run once
    loads = []
    for name in ("load_data", "load_network"):
        real = getattr(opened, name)
        monkeypatch.setattr(opened, name, lambda *a, real=real, name=name: (loads.append(name), real(*a))[1])
    status, out, err = script(*both, "shift=inverted", "attack.eps=[0.3]")
    assert status == 0, out + err
    assert sorted(loads) == ["load_data", "load_network"]
    assert "conv2" in out and "classes" in out and "half" in out
    assert [row["layer"] for row in rows(run / "ranks.csv")] == ["conv1", "conv2", "fc1"]
    assert len(rows(run / "seen.csv")) == 2
    made = rows(run / "shift.csv")
    assert [(row["shift"], row["name"], row["severity"]) for row in made] == [
        ("inverted", "whole", ""), ("inverted", "half", "1"), ("inverted", "half", "2")
    ]  # fmt: skip
    assert len({row["n"] for row in made}) == 1

    # Another seed is another set
    assert script(*both, "shift=inverted", "shift.seed=1", "attack.eps=[0.3]")[0] == 0
    assert [row["shift_seed"] for row in rows(run / "shift.csv")] == [*"000", *"111"]
    assert rows(run / "shift.csv")[:3] == made
    (run / "shift.csv").write_text("".join((run / "shift.csv").read_text().splitlines(True)[:4]))

    # What is there is not made again, unless it is asked for
    times = [(run / name).stat().st_mtime_ns for name in ("ranks.csv", "seen.csv", "shift.csv")]
    loads.clear()
    status, out, err = script(*both, "shift=inverted", "attack.eps=[0.3]")
    assert status == 0, out + err
    assert not loads
    assert times == [(run / name).stat().st_mtime_ns for name in ("ranks.csv", "seen.csv", "shift.csv")]
    (run / "shift.csv").write_text("".join((run / "shift.csv").read_text().splitlines(True)[:-1]))
    assert script(*both, "shift=inverted", "attack.eps=[0.3]", "again=true", "analysis.ranks.least=2")[0] == 0
    assert {row["least"] for row in rows(run / "ranks.csv")} == {"2"}
    assert rows(run / "shift.csv") == made

    # and it is collected, tabulated and in the report
    assert script("evaluate", f"run={runs['baseline']}", "analysis=seen")[0] == 0
    for name in ("collect", "tables", "report"):
        status, out, err = script(name, "study=s")
        assert status == 0, out + err
    results = tmp_path / "results" / "s"
    table = (results / "ranks.md").read_text()
    assert table.startswith("**Ranks of the layers**\n\n| run | layer | rank |")
    assert table.endswith("\nLeast asked for: 2.\n")
    table = (results / "seen.md").read_text()
    assert "| what | Baseline, seed 0 | CondLR τ=0.1 50 %, seed 0 | by (Baseline, seed 0) |" in table
    table = (results / "shift.md").read_text()
    assert "| run | clean | mean | whole | half | severity 1 | severity 2 |" in table
    values = [100 * float(row["accuracy"]) for row in made]
    means = (sum(values) / 3, values[0], sum(values[1:]) / 2, values[1], values[2])
    assert " | ".join(f"{value:.2f}" for value in means) in table
    report = (results / "report.md").read_text()
    assert "Ranks of the layers" in report and "What was seen" in report and "Negatives" in report
    assert "shift=inverted" in report and "analysis=[ranks,seen]" in report
    (run / "ranks.csv").unlink()
    assert script("collect", "study=s")[0] == 0 and script("tables", "study=s")[0] == 0
    assert not (results / "ranks.md").exists(), "nothing stale is left"
