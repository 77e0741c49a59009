"""Tables of the accuracy on shifted images."""

import pandas as pd
import pytest

from condlr.report import claims
from condlr.report.shifts import by_severity, markdown

RUNS = {"baseline": 0.0, "baseline+so": 0.0, "condlr-tau0.1": 0.5}
# Accuracies of (fog, snow) at severities 1 and 2
ACCURACIES = {
    "baseline": ((0.8, 0.6), (0.9, 0.7)),  # the errors of a change sum to 0.6 and 0.4
    "baseline+so": ((0.9, 0.8), (0.9, 0.8)),  # 0.3 and 0.3
    "condlr-tau0.1": ((0.8, 0.6), (0.8, 0.4)),  # 0.6 and 0.8
}


def facts(label, seed=0):
    return {
        "run_id": f"{label}-{seed}", "dataset": "cifar10", "model": "resnet18", "protocol": "frame",
        "epochs": 3, "settings": "lr=0.1", "label": label, "compression": RUNS[label], "seed": seed,
        "status": "done",
    }  # fmt: skip


def clean():
    rows = [
        facts(label) | {"attack": "fgsm", "eps": eps, "n": n, "accuracy": value}
        for label in RUNS
        for eps, n, value in ((0.0, 10_000, 0.95), (0.0, 500, 0.94), (0.1, 10_000, 0.3))
    ]
    return pd.DataFrame(rows)


def shifted(**changes):
    rows = [
        facts(label)
        | {"shift": "cifar10_c", "name": name, "severity": severity, "n": 10_000, "shift_seed": 0}
        | {"accuracy": value}
        for label, values in ACCURACIES.items()
        for name, by_severity in zip(("fog", "jpeg_compression"), values, strict=True)
        for severity, value in enumerate(by_severity, start=1)
    ]
    return pd.DataFrame(rows).assign(**changes)


def lines(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n") if "|" in line]


def test_means_and_errors_relative_to_the_baseline():
    text = markdown(shifted(), clean())
    header, _, *rows = lines(text)
    assert text.startswith("**CIFAR-10-C: accuracy in %, 10,000 images a set**\n\n| run | clean | mean |")
    assert header[3:] == ["error ratio", "fog", "jpeg compression", "severity 1", "severity 2"]
    assert rows[0] == ["Baseline, seed 0", "95.00", "75.00", "1.000", "70.00", "80.00", "85.00", "65.00"]
    found = {row[0]: row[2:4] for row in rows}
    assert found["Baseline + SO, seed 0"] == ["85.00", "0.625"], "the mean of 0.3 / 0.6 and 0.3 / 0.4"
    assert found["CondLR τ=0.1 50 %, seed 0"] == ["65.00", "1.500"], "the mean of 0.6 / 0.6 and 0.8 / 0.4"
    assert "error ratio: for each change the error over all severities, divided" in text


@pytest.mark.parametrize(
    "lacking",
    [
        lambda frame: frame[frame["label"].ne("baseline")],
        lambda frame: frame[frame["label"].eq("baseline")],
        lambda frame: frame.assign(seed=frame["label"].eq("baseline").astype(int)),
        lambda frame: frame.assign(epochs=frame["label"].eq("baseline").astype(int)),
        lambda frame: frame[frame["label"].ne("baseline") | frame["severity"].eq(1)],
        lambda frame: frame.assign(accuracy=frame["accuracy"].where(frame["label"].ne("baseline"), 1.0)),
    ],
)
def test_without_a_baseline_on_the_same_images_there_is_no_ratio(lacking):
    text = markdown(lacking(shifted()), clean())
    assert "error ratio" not in text
    assert "| run | clean | mean | fog |" in text


def test_means_are_over_the_sets_that_all_runs_have():
    """A run that lacks the hard ones would look the best."""
    frame = shifted()
    lacking = frame[frame["label"].ne("condlr-tau0.1") | frame["severity"].eq(1)]
    text = markdown(lacking, clean())
    header, _, *rows = lines(text)
    assert {row[0]: row[2] for row in rows} == {
        "Baseline, seed 0": "85.00", "Baseline + SO, seed 0": "90.00", "CondLR τ=0.1 50 %, seed 0": "80.00"
    }  # fmt: skip
    assert all(row[header.index("severity 2")] == "–" for row in rows)
    assert "Means over the 2 of 4 sets that all runs have." in text
    assert "sets that all runs have" not in markdown(frame, clean())
    means = claims._shifted(lacking, frame)
    assert dict(zip(means["run_id"], means["accuracy"], strict=True)) == pytest.approx(
        {"baseline-0": 0.85, "baseline+so-0": 0.9, "condlr-tau0.1-0": 0.8}
    )
    assert {*means["name"]} == {"CIFAR-10-C"} and {*means["n"]} == {10_000}
    apart = frame[(frame["label"].eq("baseline")) == (frame["name"].eq("fog"))]
    assert claims._shifted(apart, frame).empty, "no set is shared"


def test_each_change_at_each_severity():
    header, _, *rows = lines(by_severity(shifted()))
    assert header == ["run", "change", "mean", "severity 1", "severity 2"]
    assert rows[:2] == [
        ["Baseline, seed 0", "fog", "70.00", "80.00", "60.00"],
        ["Baseline, seed 0", "jpeg compression", "80.00", "90.00", "70.00"],
    ]
    assert len(rows) == 6
    one = shifted()
    assert lines(by_severity(one[1:]))[2][2:] == ["60.00", "–", "60.00"], "a set that a run lacks"
    for few in (one["severity"].eq(1), one["name"].eq("fog")):
        assert not by_severity(one[few]), "the other table has it"


def test_sets_that_may_overlap_have_no_mean():
    """As CINIC-10's, which also differ in their numbers of images."""
    frame = shifted(shift="cinic10", severity=None)
    frame = frame.assign(
        name=frame["name"].map({"fog": "imagenet", "jpeg_compression": "whole"}),
        n=frame["name"].map({"fog": 70_000, "jpeg_compression": 90_000}),
    ).drop_duplicates(["run_id", "name"])
    text = markdown(frame, clean())
    header, _, *rows = lines(text)
    assert header == ["run", "clean", "imagenet (n=70,000)", "whole (n=90,000)"]
    assert rows[0] == ["Baseline, seed 0", "95.00", "80.00", "90.00"]
    assert "the training images that the network has seen" in text
    assert not by_severity(frame)
