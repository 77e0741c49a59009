"""Penalties beside the published numbers of frame regularisation."""

import math

import pandas as pd
import pytest
from scipy import stats

from condlr.report import claims, frames
from tests.report.study import PAPER
from tests.report.test_claims import study

FRAME, OCNN = "baseline+frame-weight=0.001", "baseline+ocnn"
CIFAR = {"dataset": "cifar10", "model": "resnet18"}


def made(**changes):
    """Two seeds of the dense network, with and without penalties, of 99, 98 and 97 %, and of CondLR."""
    rows = {("baseline", 0.0): 0.99, (OCNN, 0.0): 0.98, (FRAME, 0.0): 0.97, ("condlr-tau0.1", 0.5): 0.9}
    return pd.concat([study({row: 0.5}, clean, **CIFAR, **changes) for row, clean in rows.items()])


def texts(sheet):
    return [(row.kind, row.name, *(value.text for value in row.values)) for row in sheet.groups[0]]


def test_gains_of_accuracy_beside_the_published_ones():
    (sheet,) = frames.sheets(made(), None, PAPER)
    assert texts(sheet) == [
        ("ours", "Baseline", "99.00 ±0.14"),
        ("published", "  published, ResNet-34", "94.53 ±0.03"),
        ("published", "  published, ResNet-50", "94.83 ±0.04"),
        ("ours", "Baseline + frame weight=0.001", "97.00 ±0.14 (-2.00)"),
        ("published", "  published, ResNet-34", "95.17 ±0.05 (+0.64)"),
        ("published", "  published, ResNet-50", "95.25 ±0.04 (+0.42)"),
        ("ours", "Baseline + OCNN", "98.00 ±0.14 (-1.00)"),
        ("published", "  published, ResNet-34", "95.03 ±0.04 (+0.50)"),
        ("published", "  published, ResNet-50", "95.29 ±0.03 (+0.46)"),
    ]
    assert "ResNet-18 on CIFAR-10" in sheet.caption


def test_a_setting_without_such_rows_has_no_sheet(tmp_path):
    cells = made()
    assert not [*frames.sheets(cells[cells["label"] != "baseline"], None, PAPER)], "nothing to compare with"
    assert not [*frames.sheets(cells[cells["label"].isin(["baseline", "condlr-tau0.1"])], None, PAPER)]
    weights = cells[cells["label"].eq(FRAME)].assign(label="baseline+frame", row_id="another", run_id="more")
    assert not [*frames.sheets(pd.concat([cells, weights]), None, PAPER)], "two weights of one penalty"
    (unpublished,) = frames.sheets(made().assign(dataset="mnist"), None, PAPER)
    assert {kind for kind, *_ in texts(unpublished)} == {"ours"}
    (alone,) = frames.sheets(cells, None, tmp_path)
    assert {kind for kind, *_ in texts(alone)} == {"ours"}, "without the published tables"


def test_gains_on_shifted_images():
    cells = made()
    runs = cells.drop_duplicates("run_id")[["run_id", "row_id", "label", "compression", "seed"]]
    lower = runs["label"].map({"baseline": 0.0, FRAME: 0.1}).fillna(0.2)
    sets = [
        runs.assign(shift=shift, name=name, severity=severity, n=1000, shift_seed=0, accuracy=value - lower)
        for shift, name, severity, value in (
            ("corruptions", "jpeg", 1, 0.8), ("corruptions", "jpeg", 5, 0.6), ("cifar10_c", "fog", 3, 0.5),
        )
    ]  # fmt: skip
    _, sheet = frames.sheets(cells, pd.concat(sets), PAPER)
    assert [column.name for column in sheet.columns] == ["clean", "Corruptions", "CIFAR-10-C"]
    assert texts(sheet)[:4] == [
        ("ours", "Baseline", "99.00", "70.00", "50.00"),
        ("published", "  published", "94.53", "", "74.77"),
        ("ours", "Baseline + frame weight=0.001", "97.00 (-2.00)", "60.00 (-10.00)", "40.00 (-10.00)"),
        ("published", "  published", "94.53 (+0.00)", "", "76.65 (+1.88)"),
    ]


def test_success_of_simba_by_directions():
    start = made(n=1000, attack="simba-dct-1", norm="step").query("eps == 0")
    struck = [
        start.assign(attack=f"simba-dct-{count}", eps=eps, accuracy=start["accuracy"] * (1 - share))
        for count, eps, share in ((1, 0.2, 0.01), (10, 0.2, 0.3), (1, 4.0, 0.5))
    ]
    simba = pd.concat([start, start.assign(attack="simba-dct-10"), *struck])
    _, sheet = frames.sheets(pd.concat([made(), simba]), None, PAPER)
    assert [column.heading for column in sheet.columns] == ["directions 1", "directions 10"]
    rows = texts(sheet)
    assert [row[1] for row in rows if row[0] == "ours"][-1] == "CondLR τ=0.1, 50 %"
    assert rows[1] == ("published", "  published", "52.08", "59.37")
    found = frames.successes(simba).query("eps == 0.2 and directions == 10").iloc[0]
    assert (found["right"], found["fooled"]) == (1980, 594), "both seeds together"
    low, high = frames.wilson(594, 1980)
    assert rows[0][3] == f"30.0 [{100 * low:.1f}, {100 * high:.1f}]"
    step, doubts = sheet.notes
    assert step.count(" % at ") == 2 and "50.0 [" in step and "at 4" in step and "52.08" in step
    assert "96 (none), 92 (ocnn, but for 92.06), 91 (frame, but for 80.20)" in doubts
    assert "0.7 to 1.8 standard errors" in doubts


def test_tables_in_the_making():
    """Runs that were not shifted, or attacked at no strength 0; networks that get nothing right."""
    cells = made()
    runs = cells.drop_duplicates("run_id")[["run_id", "row_id", "label", "compression", "seed"]]
    shifted = runs[runs["label"].eq(FRAME)].assign(
        shift="corruptions", name="jpeg", severity=1, n=1000, shift_seed=0, accuracy=0.5
    )
    _, sheet = frames.sheets(cells, shifted, PAPER)
    assert texts(sheet)[0] == ("ours", "Baseline + frame weight=0.001", "97.00", "50.00")
    (sheet,) = frames.sheets(cells[cells["eps"].gt(0)], None, PAPER)
    assert {row[2] for row in texts(sheet) if row[0] == "ours"} == {""}
    start = made(n=1000.0, attack="simba-dct-10", norm="step").query("eps == 0")
    start.loc[start["label"].eq(OCNN), "accuracy"] = 0.0
    struck = start.assign(eps=0.2, accuracy=start["accuracy"] / 2)
    _, sheet = frames.sheets(pd.concat([cells, start, struck]), None, PAPER)
    assert "1,000 images" in sheet.caption
    assert "Baseline + OCNN" not in [row[1] for row in texts(sheet)]
    assert claims.claims(pd.concat([cells, start, struck]))


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (3, 10), (594, 1980), (20, 20)])
def test_the_interval_of_wilson(hits, trials):
    known = stats.binomtest(hits, trials).proportion_ci(method="wilson")
    assert frames.wilson(hits, trials) == pytest.approx((known.low, known.high), abs=1e-7)


@pytest.mark.parametrize("images", [23, 91, 96])
def test_the_sample_behind_percentages(images):
    shares = [round(count / images, 4) for count in (1, images // 3, images // 2, images - 2)]
    cut = [math.floor(1e4 * share) / 1e4 for share in (2 / images, 5 / images)]
    assert frames.sample([*shares, *cut]) == (images, [])
    size, odd = frames.sample([*shares, *cut, 0.5 + 1 / 1999])
    assert size == images and len(odd) == 1
