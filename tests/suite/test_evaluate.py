"""Attacks, audits and analyses through the real command line."""

import csv
import shutil
from contextlib import chdir

import pandas as pd
import pytest

from condlr._support.strengths import as_printed, distinct, strengths
from condlr.analysis.sceptic.masking import CHECKS
from condlr.report import results
from tests.helpers import ROOT, SMALL, complains, run_script, write_idx

pytestmark = pytest.mark.slow

# An audit takes its time with each image
FEW = ["attack.images=10", "attack.eps=[0,0.1]"]


def rows(run, name):
    with (run / name).open() as file:
        return list(csv.DictReader(file))


def train_two(directory):
    with chdir(directory):
        for method in ("baseline", "condlr"):
            arguments = [*SMALL, f"method={method}", "study=s", "attack.images=100"]
            assert run_script("train", *arguments) == 0


@pytest.fixture(scope="session")
def study(once):
    """What training a dense network and a low-rank one leaves, to be copied."""
    return once("two", train_two) / "runs"


@pytest.fixture
def runs(study, tmp_path):
    """A dense run and a low-rank one of the same study, by name."""
    shutil.copytree(study, tmp_path / "runs")
    found = {path.name.split("-")[2]: path for path in (tmp_path / "runs" / "s").glob("lenet5-*")}
    assert set(found) == {"baseline", "condlr"}
    return found


def test_every_attack_on_a_finished_run(script, runs):
    run = runs["condlr"]
    cheap = [
        (["attack=fgsm"], "fgsm"),
        (["attack=fgm_l2_relative"], "fgm"),
        (["attack=pgd", "attack.steps=3", "attack.restarts=2", "attack.loss=dlr"], "pgd3x2-dlr"),
        (["attack=pgd_l2", "attack.steps=3"], "pgd3-margin"),
        (
            ["attack=pgd_l2_relative", "attack.steps=1", "attack.random_start=false"],
            "pgd1-margin-random_start=False",
        ),
        (["attack=square", "attack.queries=5"], "square5"),
        (["attack=transfer", "attack.steps=3"], "transfer-pgd3-margin"),
        (["attack=noise"], "noise"),
    ]
    for arguments, label in cheap:
        status, _, err = script("evaluate", f"run={run}", *FEW, *arguments)
        assert status == 0, err
        found = [row["n"] for row in rows(run, "evaluation.csv") if row["attack"] == label]
        assert found[-2:] == ["10", "10"]
    status, _, err = script(
        "evaluate",
        f"run={run}",
        "attack=simba",
        "attack.iterations=[1,4]",
        "attack.images=10",
        "attack.eps=[0.3]",
    )
    assert status == 0, err
    simba = [row for row in rows(run, "evaluation.csv") if row["attack"].startswith("simba")]
    assert [(row["attack"], row["norm"]) for row in simba] == [
        ("simba-dct-1", "step"),
        ("simba-dct-4", "step"),
    ]
    # The same attack on other images, or in another norm, does not take an earlier one's place.
    fgsm = [row for row in rows(run, "evaluation.csv") if row["attack"] == "fgsm"]
    assert sorted(row["n"] for row in fgsm) == ["10", "10", "100", "100"]


def test_attacks_are_options_of_a_sweep(script, tmp_path):
    sweep = ["-m", *SMALL, "attack.steps=2", "attack.images=40", "method=baseline,vanilla", "study=a"]
    assert script("train", *sweep, "attack=transfer")[0] == 0, "the dense network comes first"
    status, out, err = script("train", *sweep, "attack=pgd")
    assert status == 0, err
    assert out.count("is done already") == 1, "another attack trains nothing again"
    assert "2 runs: 1 done, 1 skipped" in out, "transferred to itself it is PGD"
    for run in (tmp_path / "runs" / "a").glob("lenet5-*"):
        dense = "baseline" in run.name  # which is attacked with its own images
        expected = {"pgd2-margin"} if dense else {"pgd2-margin", "transfer-pgd2-margin"}
        assert {row["attack"] for row in rows(run, "evaluation.csv")} == expected
    before = [path.read_bytes() for path in (tmp_path / "runs" / "a").rglob("evaluation.csv")]
    assert script("train", *sweep, "attack=transfer")[0] == 0
    assert before == [path.read_bytes() for path in (tmp_path / "runs" / "a").rglob("evaluation.csv")]


def test_an_audit_and_analyses_up_to_the_tables(script, runs, tmp_path, monkeypatch):
    # What takes longest asks no more of a dense network than of the other
    for run, more in ((runs["baseline"], ""), (runs["condlr"], ",conditioning,guarantees")):
        status, out, err = script("evaluate", f"run={run}", *FEW, f"analysis=[audit,cost{more}]")
        assert status == 0, err
        assert "active test" in out
        assert "exported: weights" in out
        assert len(rows(run, "audit.csv")) == len(CHECKS)
    assert "Lipschitz bound" in out
    assert {row["layer"] for row in rows(run, "conditioning.csv")} == {"conv1", "conv2", "fc1", "fc2"}
    status = {row["check"]: row["status"] for row in rows(runs["baseline"], "audit.csv")}
    assert status["transfer"] == "not done", "the dense network has no other to transfer from"
    status = {row["check"]: row["status"] for row in rows(runs["condlr"], "audit.csv")}
    assert status["transfer"] in ("pass", "warning")
    found = {row["quantity"]: row["value"] for row in rows(runs["condlr"], "guarantees.csv")}
    assert float(found["bound / measured, smallest"]) >= 1
    assert rows(runs["baseline"], "cost.csv")[0]["train_weights_ratio"] == "1.0"
    # What is there is not done again, unless asked for.
    before = rows(runs["condlr"], "evaluation.csv"), rows(runs["condlr"], "audit.csv")
    pattern = f"run={tmp_path}/runs/s/*-c0.5-s0-*"
    status, out, _ = script("evaluate", pattern, *FEW, "analysis=audit")
    assert "was evaluated already" in out
    assert (rows(runs["condlr"], "evaluation.csv"), rows(runs["condlr"], "audit.csv")) == before
    monkeypatch.setenv("WHERE", str(tmp_path))  # in quotes, which keep * from the shell
    assert "was evaluated already" in script("evaluate", "run='$WHERE/runs/s/*'", *FEW)[1]
    status, out, _ = script("evaluate", f"run={tmp_path}/runs/s/*", *FEW, "again=true")
    assert out.count("fgsm 0.1") == 2
    # Once more, at another strength: kept beside the first.
    assert script("evaluate", f"run={runs['condlr']}", *FEW, "attack.eps=[0.05]", "analysis=audit")[0] == 0
    assert len(rows(runs["condlr"], "audit.csv")) == 2 * len(CHECKS)

    script("evaluate", f"run={runs['condlr']}", *FEW, "attack=pgd", "attack.steps=2")
    assert script("collect", "study=s")[0] == 0
    status, out, err = script("tables", "study=s")
    assert status == 0, err
    assert "by attack" in out
    results = tmp_path / "results" / "s"
    for name in ("audit", "conditioning", "guarantees", "cost", "attacks"):
        assert (results / f"{name}.md").read_text().count("|") > 20
    assert "audit warns" in (results / "table.md").read_text()
    (runs["condlr"] / "audit.csv").unlink()
    (runs["baseline"] / "audit.csv").unlink()
    assert script("collect", "study=s")[0] == 0
    assert script("tables", "study=s")[0] == 0
    assert not (results / "audit.md").exists(), "nothing stale is left"
    assert "No row was audited" in (results / "table.md").read_text()


def test_only_strengths_that_are_missing_are_attacked(script, runs):
    run, few = runs["condlr"], ["attack=pgd", "attack.steps=2", "attack.images=50"]
    assert script("evaluate", f"run={run}", *few, "attack.eps=[0,0.1]")[0] == 0
    before = [row for row in rows(run, "evaluation.csv") if row["attack"] == "pgd2-margin"]
    status, out, _ = script("evaluate", f"run={run}", *few, "attack.eps=[0,0.1,0.2]")
    after = [row for row in rows(run, "evaluation.csv") if row["attack"] == "pgd2-margin"]
    assert status == 0
    assert after[:2] == before, "down to the seconds that it took"
    assert [row["eps"] for row in after] == ["0.0", "0.1", "0.2"]
    assert "pgd2-margin 0.1" in out
    assert script("evaluate", f"run={run}", *few, "attack.eps=0.3")[0] == 0, "one strength needs no brackets"


def test_a_run_of_a_pattern_that_is_not_done_stops_no_other(script, runs):
    dense = runs["baseline"] / "run.json"
    dense.write_text(dense.read_text().replace('"status": "done"', '"status": "failed"'))
    result = script("evaluate", f"run={runs['condlr'].parent}/*", *FEW)
    complains(result, "not evaluated, because they are not done: lenet5-digits-baseline")
    assert "10" in {row["n"] for row in rows(runs["condlr"], "evaluation.csv")}
    complains(
        script("evaluate", f"run={runs['condlr'].parent}"), r"is not a run: give a run in it, or run='.*/\*'"
    )


def test_runs_whose_weights_were_left_elsewhere_stop_no_other(script, runs):
    assert script("evaluate", f"run={runs['baseline']}", *FEW, "analysis=audit")[0] == 0
    for name in ("model.safetensors", "checkpoint.pt"):
        (runs["baseline"] / name).unlink()
    before = {path: path.read_bytes() for path in runs["baseline"].iterdir() if path.is_file()}
    alone = [f"run={runs['baseline']}", *FEW]
    status, out, err = script("evaluate", *alone, "analysis=audit")
    assert status == 0, err
    assert "was evaluated already" in out
    assert "active test" in out, "what is there needs no weights"
    missing = "baseline.*model.safetensors is missing: bring these weights back, or remove .*baseline"
    for arguments in (
        ["attack.eps=[0.2]"], ["again=true"], ["analysis=conditioning"], ["analysis=cost"],
        ["data_root=nowhere", "attack.eps=[0.2]"],
        ["attack.eps=[0.1]", "analysis=audit", "attack.seed=1"],
    ):  # fmt: skip
        complains(script("evaluate", *alone, *arguments), missing)
    complains(script("evaluate", *alone, "analysis=crosscheck", "analysis.crosscheck.images=5"), missing)
    both = [f"run={runs['condlr'].parent}/*", "attack.images=40", "attack.eps=[0,0.1]"]
    complains(
        script("evaluate", *both),
        f"not evaluated, because their weights are missing: lenet5-.* \\(.*{missing}",
    )
    assert "40" in {row["n"] for row in rows(runs["condlr"], "evaluation.csv")}
    assert before == {path: path.read_bytes() for path in runs["baseline"].iterdir() if path.is_file()}


def test_images_of_a_network_whose_weights_are_elsewhere_cannot_be_made(script, runs):
    for name in ("model.safetensors", "checkpoint.pt"):
        (runs["baseline"] / name).unlink()
    transfer = [f"run={runs['condlr']}", "attack=transfer", "attack.steps=1", *FEW]
    complains(script("evaluate", *transfer), "baseline.*model.safetensors is missing: bring these weights")
    source = f"attack.source={runs['baseline']}"
    complains(script("evaluate", *transfer, source), "baseline.*model.safetensors is missing: bring these")
    assert script("evaluate", f"run={runs['condlr']}", *FEW, "analysis=audit")[0] == 0
    checks = {row["check"]: row["status"] for row in rows(runs["condlr"], "audit.csv")}
    assert checks["transfer"] == "not done"


@pytest.mark.parametrize(
    ("attack", "norm", "strengths"),
    [("noise", "std", [0, 0.05, 0.1, 0.2, 0.4]), ("pgd_l2", "l2", [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5])],
)
def test_an_attack_of_another_norm_has_strengths_of_its_own(script, runs, attack, norm, strengths):
    """Those of its file, which may refer to the dataset's."""
    steps = ["attack.steps=1"] if attack == "pgd_l2" else []
    status, _, err = script(
        "evaluate", f"run={runs['condlr']}", f"attack={attack}", "attack.images=5", *steps
    )
    assert status == 0, err
    found = [row for row in rows(runs["condlr"], "evaluation.csv") if row["norm"] == norm and row["n"] == "5"]
    assert [float(row["eps"]) for row in found] == strengths


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["attack=pgd", "attack.loss=hinge"], "attack.loss must be one of ce, margin"),
        (["attack=pgd", "attack.norm=l3", "attack.eps=[0.1]"], "attack.norm must be one of linf"),
        (["attack=pgd", "attack.steps=0"], "attack.steps must be in"),
        (["attack=pgd", "attack.images=0"], "attack.images must be in"),
        (["attack=pgd", "attack.norm=l2"], "attack.eps: name the strengths in the norm l2"),
        (["attack.images=100000"], "attack.images=100000, but there are only"),
        (["attack=simba", "attack.eps=[0.2]", "attack.iterations=[]"], "attack.iterations is empty"),
        (["attack=transfer", "attack.source=nowhere"], "nowhere is not a run"),
        (["attack=transfer", "attack.source="], "attack.source"),
        (["attack=noise", "attack.eps=[-1]"], "attack.eps must be in"),
        (["attack.eps={a:1}"], r"attack.eps must be numbers, or fractions such as 8/255; got \{'a': 1\}"),
        (["analysis=audit", "attack.eps=[0]"], "audit: an audit needs an attack: eps must be larger than 0"),
        (["analysis=maybe"], "analysis/maybe.*audit"),
        (["analysis=[cost,audit,cost]"], "analysis names something twice: cost, audit, cost"),
        (["analysis=audit", "analysis.audit.images=0"], "analysis.audit.images must be in"),
        (["analysis=audit", "analysis.audit.a=0"], "analysis.audit.a"),
        (["shift=corruptions", "shift.kinds=[fog]"], "shift.kinds must be one of"),
        (["shift=cifar10_c"], "CIFAR-10-C is for networks trained on cifar10; .* was trained on digits"),
        (["shift=corruptions", "shift.images=100000"], "shift.images=100000, but there are only"),
        (["analysis=crosscheck", "analysis.crosscheck.images=100000"], "crosscheck: images=100000, but"),
        (["attack=noise", "attack.eps=[0.2]", "attack.images=5", "analysis=audit"], "audit: norm must be"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line(script, one_run, arguments, pattern):
    complains(script("evaluate", f"run={one_run}", *arguments), pattern)


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    where = tmp_path_factory.mktemp("one")
    with chdir(where):
        assert run_script("train", *SMALL, "study=one", "attack.images=20") == 0
    return next((where / "runs" / "one").glob("lenet5-*"))


def test_a_transfer_without_its_source_is_one_line_before_training(script, tmp_path):
    result = script("train", *SMALL, "attack=transfer", "attack.images=20")
    complains(result, "baseline.* is not a run: train it first, with method=baseline")
    assert not list(tmp_path.rglob("history.csv"))


def test_a_network_of_other_data_is_no_source(script, runs, tmp_path):
    import numpy as np

    for part, n in (("train", 40), ("t10k", 20)):
        raw = tmp_path / "data" / "FashionMNIST" / "raw"
        write_idx(raw / f"{part}-images-idx3-ubyte", np.zeros((n, 28, 28)))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(n) % 10)
    arguments = ["dataset=fashion_mnist", "dataset.download=false", "protocol=demo", "protocol.epochs=1"]
    source = f"attack.source={runs['baseline']}"
    complains(script("train", *arguments, "attack=transfer", source), "was trained on another dataset")


def test_a_damaged_audit_is_one_line(script, one_run):
    (one_run / "audit.csv").write_text("norm,eps\nlinf,0.1\n")
    arguments = [f"run={one_run}", "attack.images=20", "attack.eps=[0.1]", "analysis=audit"]
    complains(script("evaluate", *arguments), r"audit.csv is damaged \(no column 'n'\)")
    (one_run / "audit.csv").unlink()


def test_a_run_whose_config_is_from_before_a_key_was_there_is_evaluated(script, runs):
    run = runs["condlr"]
    config = run / "config.yaml"
    lines = config.read_text().splitlines(keepends=True)
    old = [line for line in lines if not line.startswith(("record_every:", "  decay:"))]
    assert len(old) == len(lines) - 2
    config.write_text("".join([*old, "flow: null\n"]))  # and one that was there once
    status, out, err = script("evaluate", f"run={run}", "attack.eps=[0.3]")
    assert status == 0, out + err


def test_strengths_may_be_written_as_fractions(script, tmp_path):
    few = ["dataset=digits", "protocol=demo", "protocol.epochs=1", "attack.images=40", "method=baseline"]
    assert script("train", *few, "attack.eps=[0,2/255,0.5/255]")[0] == 0
    (run,) = (tmp_path / "runs" / "default").glob("lenet5-*")
    made = [float(row["eps"]) for row in rows(run, "evaluation.csv")]
    assert made == [0, 0.5 / 255, 2 / 255]
    assert script("train", "-m", *few, "attack.eps=4/255,16/255")[0] == 0
    evaluate = ["evaluate", f"run={run}", "attack.images=40"]
    assert script(*evaluate, "attack.eps='32 / 255'")[0] == 0
    assert "evaluated already" in script(*evaluate)[1], "at the strengths of the run"
    made = [float(row["eps"]) for row in rows(run, "evaluation.csv")]
    assert made == [0, 0.5 / 255, 2 / 255, 4 / 255, 16 / 255, 32 / 255]


@pytest.mark.parametrize(
    ("eps", "said"),
    [
        ("3/0", "fractions such as 8/255; got '3/0'"),
        ("eight/255", "fractions such as 8/255; got 'eight/255'"),
        ("[0,1/2/3]", "fractions such as 8/255; got '1/2/3'"),
        ("16", r"must be in \[0, 1\], as pixels are; got 16: of 255 levels that is 16/255"),
        ("[0,0.5/255,4]", r"must be in \[0, 1\], as pixels are; got 4: of 255 levels that is 4/255"),
        ("300/255", r"must be in \[0, 1\]"),
        ("-2/255", r"must be in \[0, 1\]"),
        ("nan/255", r"must be in \[0, 1\]"),
        ("null", "eps"),
    ],
)
def test_strengths_that_are_none_are_one_line(script, tmp_path, eps, said):
    complains(script("train", *SMALL, f"attack.eps={eps}"), said)
    complains(script("evaluate", "run=x", "analysis=crosscheck", f"analysis.crosscheck.eps={eps}"), said)


def test_strengths_that_print_alike_are_one(script, tmp_path):
    few = [*SMALL, "method=baseline", "attack.images=40"]
    assert script("train", *few, "attack.eps=[0,0.0313725]")[0] == 0
    assert script("train", *few, "seed=1", "attack.eps=[0,8/255]")[0] == 0
    ((first,), (second,)) = ([*tmp_path.glob(f"runs/default/*-s{seed}-*")] for seed in (0, 1))
    for eps in ("8/255", "0.03137254901960784", "[0.0313725,8/255]", "[0.03137251]"):
        for run in (first, second):
            status, out, err = script("evaluate", f"run={run}", "attack.images=40", f"attack.eps={eps}")
            assert (status, "evaluated already" in out) == (0, True), out + err
    assert [len(rows(run, "evaluation.csv")) for run in (first, second)] == [2, 2]
    assert script("evaluate", f"run={first}", "attack.images=40", "attack.eps=0.031373")[0] == 0
    assert len(rows(first, "evaluation.csv")) == 3, "which prints as another"
    assert script("evaluate", f"run={first}", "attack.images=40", "attack.eps=8/255", "again=true")[0] == 0
    assert len(rows(first, "evaluation.csv")) == 3
    status, out, _ = script("train", *SMALL, "method=baseline", "attack.images=40", "attack.eps=8/255")
    assert "is done already" in out
    assert script("collect", "study=default")[0] == 0
    assert script("tables", "study=default")[0] == 0
    table = (tmp_path / "results" / "default" / "table.md").read_text()
    assert table.count("ε=0.0313725") == 1
    (row,) = [line for line in table.splitlines() if line.startswith("| Baseline")]
    assert "±" in row, "a mean of both seeds"


def test_cells_of_one_run_that_print_alike_count_once(tmp_path):
    """As they were collected before strengths that print alike were one."""
    study = ROOT / "results" / "reproduce_mnist"
    cells = pd.read_csv(study / "cells.csv", dtype=str)
    six = cells[cells["eps"] == "0.06"]
    pd.concat([cells, six.assign(eps="0.06000000001")]).to_csv(tmp_path / "cells.csv", index=False)
    read = results.read(tmp_path)
    assert set(read["eps"]) == {float(eps) for eps in cells["eps"]}
    assert len(read) == len(cells)


def test_as_printed():
    assert as_printed(8 / 255) == as_printed(0.0313725) == 0.0313725
    assert as_printed(0.1 + 0.2) == 0.3
    assert as_printed(0.0313726) != as_printed(0.0313725)
    assert distinct([8 / 255, 0.2, 0.0313725, 0, 0.2]) == [0, 8 / 255, 0.2]
    assert strengths("8/255") == [8 / 255] and strengths([0, "1/4", 0.5]) == [0, 0.25, 0.5]


def test_a_run_given_as_a_dot_or_a_link_has_its_dense_network(script, runs, tmp_path):
    run = runs["condlr"]
    (tmp_path / "link").symlink_to(run)
    transfer = ["attack=transfer", "attack.steps=1", *FEW]
    assert script("evaluate", f"run={tmp_path / 'link'}", *transfer)[0] == 0
    with chdir(run):
        assert script("evaluate", "run=.", *transfer)[0] == 0
    found = [row["attack"] for row in rows(run, "evaluation.csv")]
    assert found.count("transfer-pgd1-margin") == 2, "one row a strength"


def test_a_pattern_of_studies_is_told_from_one_of_runs(script, runs):
    study = runs["condlr"].parent
    shutil.copytree(study, study.parent / "t")
    complains(script("evaluate", f"run={study.parent}/*"), r"matches studies, no runs: say run='.*/\*/\*'")
