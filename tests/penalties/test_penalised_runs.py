"""A penalty on its whole way: from YAML to the run, its id, the collected cells, the table and the page."""

import csv
import shutil

import pytest
from omegaconf import OmegaConf

from condlr.suite.config import check
from tests.helpers import ROOT, SMALL, complains, configured

PAPER = ROOT / "results" / "paper"


def checked(*overrides):
    return configured("dataset=digits", *overrides)


def test_what_a_penalised_run_is_called():
    plain, so = checked(), checked("penalty=so")
    assert so.label == "condlr-tau0.1+so"
    assert so.run_id.startswith("lenet5-digits-condlr-tau0.1+so-c0.5-s0-")
    assert so.row["penalty"] == "so"
    assert so.row["options"].startswith(plain.row["options"])
    assert "penalty.weight=0.01 penalty.layers=[*]" in so.row["options"].replace('"', "")
    assert so.row["row_id"] != plain.row["row_id"]
    other = checked("penalty=so", "penalty.weight=0.5", "penalty.layers=[conv*]")
    assert other.label == "condlr-tau0.1+so-weight=0.5-layers=['conv*']"
    assert other.run_id.startswith("lenet5-digits-condlr-tau0.1+so-weight_0.5-layers_conv_-c0.5-s0-")


def test_without_a_penalty_nothing_says_so():
    plain, null = checked(), checked("penalty=none")
    assert plain.run_id == null.run_id and plain.penalty is None
    assert "penalty" not in {*plain.row, *plain.identity}
    assert "penalty" not in plain.row["options"]


def test_the_dense_network_beside_it_has_no_penalty():
    so, plain = checked("penalty=so"), checked()
    assert so.baseline.run_id == plain.baseline.run_id
    assert so.baseline.penalty is None


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["penalty=glue"], "Could not find 'penalty/glue'"),
        (["penalty=so", "penalty.weight=-1"], "penalty.weight must be in"),
        (["penalty=so", "+penalty.p=1"], "penalty.p: there is no such key; the keys of penalty are weight"),
        (["penalty=so", "penalty.layers=[fc9]"], "penalty.layers: no linear or convolution layer is named"),
        (
            ["penalty=so", "penalty.name=glue"],
            "penalties: there is no 'glue'; choose from condition, dso, frame, frame_eigen, group_lasso,",
        ),
        (["penalty=3"], "the command line makes no config"),
        (
            ["penalty=ocnn", "penalty.acts_on=V", "method=dlrt"],
            "penalty.acts_on=V: this method moves U and V with the matrix; choose acts_on=weight, or S",
        ),
        (["row=condlr-soft-c0.5", "penalty=none"], "penalty.acts_on is set, but no penalty is chosen"),
    ],
)
def test_wrong_input_is_one_line(script, arguments, pattern):
    complains(script("train", *SMALL, *arguments), pattern)


@pytest.mark.slow
def test_the_whole_way(script, tmp_path):
    row = ["method=vanilla", "penalty=so", "penalty.weight=0.05", "protocol.epochs=2"]
    assert script("train", *SMALL, *row, "record_operators=true")[0] == 0
    assert script("train", *SMALL, "method=vanilla", "protocol.epochs=2")[0] == 0
    runs = {path.name for path in (tmp_path / "runs" / "default").iterdir() if path.is_dir()}
    (named,) = [name for name in runs if "vanilla+so-weight_0.05-c0.5" in name]
    config = OmegaConf.load(tmp_path / "runs" / "default" / named / "config.yaml")
    assert check(config).run_id == named, "a run's config.yaml makes the run"
    assert "is done already" in script("train", *SMALL, *row)[1]
    assert script("collect", "study=default")[0] == 0
    # An archive takes a run whose name has a +
    assert script("archive", "study=default")[0] == 0
    shutil.rmtree(tmp_path / "runs" / "default" / named)
    assert script("restore", "study=default")[0] == 0
    assert (tmp_path / "runs" / "default" / named / "history.csv").exists()
    results = tmp_path / "results" / "default"
    with (results / "cells.csv").open() as file:
        penalties = {(row["label"], row["penalty"]) for row in csv.DictReader(file)}
    assert penalties == {("vanilla", ""), ("vanilla+so-weight=0.05", "so")}
    with (results / "history.csv").open() as file:
        values = [float(row["penalty_value"]) for row in csv.DictReader(file) if row["penalty"] == "so"]
    assert values[-1] < values[0]
    said = script("train", *SMALL, "method=vanilla", "protocol.epochs=2", "record_operators=true")
    assert "trained without record_operators" in "".join(said[1:])
    shutil.copytree(PAPER, tmp_path / "results" / "paper")
    for name in ("tables", "figures", "report"):
        status, _, err = script(name, "study=default")
        assert status == 0, err
    table = (results / "table.md").read_text("utf-8")
    assert "| Vanilla + SO weight=0.05 |" in table
    assert "| Vanilla |" in table
    assert (results / "operators.png").exists()
    training = (results / "training.md").read_text("utf-8")
    assert "penalised" in training and f"{values[0]:.3g} → {values[-1]:.3g}" in training
    for page in ("report.md", "report.html"):
        assert "Vanilla + SO weight=0.05" in (results / page).read_text("utf-8").replace("\xa0", " ")


@pytest.mark.slow
def test_tables_without_a_penalty_have_no_column_of_one(script, tmp_path):
    assert script("train", *SMALL, "method=baseline")[0] == 0
    assert script("collect", "study=default")[0] == 0
    for name in ("cells", "history", "runs"):
        assert "penalty" not in (tmp_path / "results" / "default" / f"{name}.csv").read_text()
