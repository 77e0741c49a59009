"""The benchmark measures what it says, and says it in files that others can read."""

import csv
import errno
import json
import runpy

import pandas as pd
import pytest
import torch
from torch import nn

import condlr
from condlr._support.rooms import available, find
from condlr.penalties.base import Penalty
from condlr.suite import benchmark, peers
from condlr.suite.benchmark import OPTIONS
from condlr.suite.naive import NaiveLayer, constrain_naively, naive
from condlr.suite.programs import Benchmark
from tests.helpers import ROOT, complains

COLUMNS = [
    "network", "rank_rule", "compression", "tau", "form", "part", "milliseconds", "images_per_s", "peak_mb",
    "share_of_peak",
]  # fmt: skip


def test_the_naive_form_is_the_same_arithmetic():
    """As ours with the public program's options, in float64: only the means differ."""
    torch.manual_seed(1)
    dense = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.LeakyReLU(), nn.Flatten(), nn.Linear(128, 20)
    )
    x, y = torch.randn(16, 3, 8, 8, dtype=torch.float64), torch.arange(16) % 20
    ours = condlr.factorize(dense.double(), ranks={"0": 5, "3": 9})
    theirs = naive(condlr.factorize(dense.double(), ranks={"0": 5, "3": 9}))
    assert sum(isinstance(module, NaiveLayer) for module in theirs.modules()) == 2
    for model, constrain in ((ours, condlr.constrain), (theirs, constrain_naively)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.3)
        constrain(optimizer, model, 0.2, **(OPTIONS["released_code"] if model is ours else {}))
        for _ in range(10):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    mine = dict(ours.named_parameters())
    for name, value in theirs.named_parameters():
        own = mine[f"{name}t"].mT if name.endswith(".V") else mine[name]
        torch.testing.assert_close(own, value, rtol=1e-8, atol=1e-9)


@pytest.mark.long
def test_a_small_benchmark(script, tmp_path):
    status, out, err = script(
        "benchmark",
        "networks=[lenet5]",
        "compressions=[0.8]",
        "repeats=1",
        "batch_size=16",
        "epoch=false",
        "collect=3",
        "penalties=16",
    )
    assert status == 0, err
    folder = tmp_path / "results" / "benchmark"
    (path,) = folder.glob("*.csv")
    rows = list(csv.DictReader(path.open()))
    assert list(rows[0]) == COLUMNS
    forms = [(row["rank_rule"], row["form"]) for row in rows if row["part"] == "step"]
    assert forms == [
        *(("", form) for form in ("dense", "cayley_sgd", "projected_sgd")),
        *(("params", form) for form in ("unconstrained", "condlr", "naive")),
        *(("released_code", form) for form in ("unconstrained", "condlr", "naive")),
    ]
    for row in rows:
        assert float(row["milliseconds"]) > 0
        step = next(
            other for other in rows
            if other["part"] == "step" and all(other[key] == row[key] for key in COLUMNS[:5])
        )  # fmt: skip
        assert float(row["milliseconds"]) <= float(step["milliseconds"]) * 1.5
        if row["part"] == "step":
            images = 16e3 / float(row["milliseconds"])
            assert float(row["images_per_s"]) == pytest.approx(images, rel=1e-3)
            assert float(row["peak_mb"]) > 1
            assert 0 < float(row["share_of_peak"]) < 2
    constrained = {row["form"] for row in rows if row["part"] == "constraint"}
    assert constrained == {"condlr", "naive"}
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["device"] == path.stem and facts["peak_gflops"] > 1
    assert {"lenet5 params 0.8", "lenet5 released_code 0.8"} == facts["forms"].keys()
    assert path.with_suffix(".png").stat().st_size > 10_000 < path.with_suffix(".pdf").stat().st_size
    assert "CondLR, naive" in out and "naive" in path.with_suffix(".md").read_text()
    step, *penalties = facts["penalties"]
    assert step["penalty"] is None and step["share"] == 1 and facts["penalties_width"] == 16
    assert {line["penalty"] for line in penalties} == {
        find("penalties", name, Penalty).title for name in available("penalties")
    }
    for line in penalties:
        assert line["share"] == pytest.approx(line["milliseconds"] / step["milliseconds"], rel=0.01, abs=1e-4)
    assert "| OCNN, layers=stage*.conv1 *.shortcut | 19 |" in path.with_suffix(".md").read_text()
    assert "a step of ResNet-34, width 16" in out


def test_operations_and_memory_are_counted():
    """Of a dense LeNet5: 4.59 MFLOP an image forward, 13.18 with its backward pass."""
    asked = Benchmark(["lenet5"], [], [], 0.1, 8, 1, "float32", "cpu", False, 0, 0, "", "")
    dense, *_ = benchmark.programs(asked, "lenet5", torch.device("cpu"))
    dense.turn()
    dense.weigh()
    assert dense.flops / 8 == pytest.approx(13.18e6, rel=0.01)
    weights = 4 * 431_080
    activations = 8 * 20 * 24 * 24 * 4
    # weights, momenta and gradients, and at least the first layer's activations; at most a few times those
    assert 3 * weights + activations < 1e6 * dense.peak_mb < 3 * weights + 10 * activations


@pytest.mark.slow
def test_what_was_measured_is_kept_whatever_becomes_of_the_rest(script, tmp_path, monkeypatch):
    def full(count, study):
        raise OSError(errno.ENOSPC, "No space left on device", str(study))

    monkeypatch.setattr(benchmark, "collect_many", full)
    small = [
        "networks=[lenet5]",
        "compressions=[]",
        "repeats=1",
        "batch_size=2",
        "epoch=false",
        "collect=3",
        "penalties=0",
    ]
    complains(script("benchmark", *small), "No space left on device.*make room")
    (path,) = (tmp_path / "results" / "benchmark").glob("*.csv")
    assert [row["form"] for row in csv.DictReader(path.open())] == [
        form for form in ("dense", "cayley_sgd", "projected_sgd") for _ in range(2)
    ]
    assert json.loads(path.with_suffix(".json").read_text())["batch_size"] == 2


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["networks=[alexnet]"], "networks must be one of lenet5, vgg16; got 'alexnet'"),
        (["networks=[]"], "networks is empty"),
        (["compressions=[0.8,0.8]"], r"compressions names something twice: \[0.8, 0.8\]"),
        (["collect=-1"], r"collect must be in \[0"),
        (["repeats=0"], r"repeats must be in \[1"),
        (["compressions=[1.0]"], "compressions must be in"),
        (["precision=fp8"], "precision must be one of float32"),
        (["precision=tf32", "device=cpu", "epoch=false"], "tf32 is for CUDA"),
        (["data_root=nowhere"], "put train-images-idx3-ubyte.* into nowhere/MNIST/raw"),
        (["penalties=8"], r"penalties must be in \[16"),
        (["rank_rules=[fixed]"], "rank_rules must be one of params, released_code"),
    ],
)
def test_wrong_input_is_one_line(script, arguments, pattern):
    complains(script("benchmark", "networks=[lenet5]", "repeats=1", *arguments), pattern)


@pytest.mark.slow
def test_peers_that_are_installed_take_turns_and_keep_what_they_promise(tmp_path, monkeypatch):
    """Without geoopt and geotorch, which are no dependencies, PyTorch's own maps are left."""
    small = {
        "Linear": (lambda: nn.Linear(80, 70), (4, 80)),
        "Conv2d": (lambda: nn.Conv2d(9, 65, 3), (2, 9, 5, 5)),
    }
    monkeypatch.setattr(peers, "LAYERS", small)
    monkeypatch.setattr(peers, "_ENOUGH", 0.0)
    program = runpy.run_path(str(ROOT / "scripts" / "benchmark.py"))
    keys = {"networks": ["lenet5"], "rank_rules": [], "compressions": [], "tau": 0.1, "batch_size": 4}
    more = {"epoch": False, "collect": 0, "penalties": 0, "data_root": "data", "results_dir": str(tmp_path)}
    asked = Benchmark(**keys, **more, repeats=2, precision="float32", device="cpu", peers=True)
    program["compare"](asked)
    (table,), (page,) = (tmp_path.rglob(f"*.{kind}") for kind in ("csv", "md"))
    lines = pd.read_csv(table).to_dict("records")
    assert {line["layer"] for line in lines} == {*small}
    rows = {line["program"]: line for line in lines if line["layer"] == "Linear"}
    assert [*rows][:3] == ["dense", "U S V^T, free", "condlr"]
    assert {f"torch {name}" for name in peers.MAPS} <= rows.keys()
    assert rows["dense"]["of_dense"] == rows["U S V^T, free"]["of_free"] == 1
    assert rows["condlr"]["condition"] <= 1.1 * (1 + 1e-4) < rows["U S V^T, free"]["condition"]
    kept = [row["orthonormality"] for row in rows.values() if "orthonormal" in row["promise"]]
    assert len(kept) >= 4 and max(kept) < 1e-5
    assert page.read_text().count("\n| Linear |") == len(rows)
