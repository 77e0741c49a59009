"""From cells to tables: means, marks, and published values beside ours."""

import io
import re

import pandas as pd
import pytest
from rich.console import Console

from condlr._support.errors import UserError
from condlr.analysis.guarantees import Guarantees
from condlr.analysis.sceptic.masking import CHECKS
from condlr.report import analysis, audit, chapters, comparisons, numbers, results, tables, titles
from condlr.report.latex import latex
from condlr.report.markdown import markdown
from condlr.report.terminal import print_sheet
from condlr.report.training import training
from tests.helpers import configured
from tests.report.study import PAPER, cells


def only_table(frame):
    (table,) = tables.tables(frame, PAPER)
    return table


def test_means_and_sample_standard_deviations():
    frame = results.summarize(cells()).set_index(["label", "eps"])
    assert frame.loc[("condlr-tau0.1", 0.06), "accuracy"] == pytest.approx(0.93)
    assert frame.loc[("condlr-tau0.1", 0.06), "std"] == pytest.approx(0.02 / 2**0.5)
    assert frame.loc[("condlr-tau0.1", 0.06), "seeds"] == 2
    assert pd.isna(frame.loc[("baseline", 0.06), "std"])
    assert frame.loc[("vanilla", 0.0), "seconds"] == pytest.approx(10.5)


def test_rows_that_differ_in_an_option_are_not_averaged_and_say_in_which():
    other = cells(options="slope=0.01 tau=0.1 init=gaussian")
    other["row_id"] += "other"
    table = only_table(pd.concat([cells(), other]))
    names = [line.label for line in table.lines]
    assert len(names) == 6
    assert {"Vanilla", "Vanilla init=gaussian", "Baseline", "Baseline init=gaussian"} <= set(names)
    assert "slope" not in " ".join(names)


def test_runs_of_different_settings_are_in_tables_of_their_own():
    other = cells(settings="lr=0.2 lr_milestones=[7,9]")
    other["row_id"] += "other"
    captions = [
        markdown(table.sheet).splitlines()[2] for table in tables.tables(pd.concat([cells(), other]), PAPER)
    ]
    assert captions == ["`lr=0.1 lr_milestones=[7,9]`", "`lr=0.2 lr_milestones=[7,9]`"]
    both = [
        titles.setting(known) for known, _ in results.contexts(results.summarize(pd.concat([cells(), other])))
    ]
    alone = only_table(cells()).caption.partition(":")[0]
    assert both == [f"{alone}, lr=0.1", f"{alone}, lr=0.2"], "each caption says which"


def test_runs_of_one_title_are_told_apart():
    """By network, protocol and epochs where these do, else by settings and options."""
    facts = {
        "dataset": "mnist", "model": "lenet5", "protocol": "paper", "epochs": 3, "settings": "lr=0.1 a=1",
        "options": "x=1", "label": "baseline", "compression": 0.0, "seed": 0,
    }  # fmt: skip
    changes = [{}, {"settings": "lr=0.05 a=1"}, {"protocol": "demo", "settings": "lr=7"}, {"seed": 1}]
    changes += [{"label": "condlr-tau0", "compression": 0.5}, {"options": "x=1 y=2", "protocol": "other"}]
    runs = pd.DataFrame([{"run_id": str(place), **facts, **change} for place, change in enumerate(changes)])
    assert [*titles.run_titles(runs).values()] == [
        "Baseline, seed 0 (protocol=paper lr=0.1)", "Baseline, seed 0 (protocol=paper lr=0.05)",
        "Baseline, seed 0 (protocol=demo)", "Baseline, seed 1", "CondLR τ=0 50 %, seed 0",
        "Baseline, seed 0 (protocol=other)",
    ]  # fmt: skip
    assert titles.told_apart(runs, ["protocol"])["2"] == ""
    assert {*titles.told_apart(runs.drop(columns=["settings", "options"])).values()} > {"protocol=paper"}


def test_audits_of_one_row_in_two_settings_are_two():
    one = audits(("baseline-0.0-0", "float64")).query("seed == 0").assign(settings="lr=0.1")
    other = audits().query("seed == 0").assign(settings="lr=0.2", run_id=lambda frame: frame["run_id"] + "x")
    told, grid, _ = chapters._audits(pd.concat([one, other]))
    assert told == "4 audits of 16 checks each: **the audit warns of 1 row**."
    names = [row[0] for row in grid.rows]
    assert names[:2] == ["Baseline, seed 0 (lr=0.1)", "Baseline, seed 0 (lr=0.2)"]
    assert "| Baseline, seed 0 (lr=0.2) | none |" in audit.markdown(pd.concat([one, other]))


def test_a_strength_that_one_row_lacks_shifts_nothing():
    extra = cells()
    extra = extra[extra["label"].eq("condlr-tau0.1") & extra["seed"].eq(0) & extra["eps"].eq(0)]
    table = only_table(pd.concat([cells(), extra.assign(eps=0.03, accuracy=0.5)]))
    assert table.strengths == [0.0, 0.03, 0.06]
    rows = {
        line.split("|")[1].strip(): line.split("|")
        for line in markdown(table.sheet).splitlines()[6:]
        if line.startswith("|")
    }
    header = markdown(table.sheet).splitlines()[4].split("|")
    column = header.index(" ε=0.03 ")
    assert rows["Baseline"][column] == " – "
    assert rows["CondLR τ=0.1"][column] == " 50.00 ", "and what has no rival is not the best"
    assert rows["CondLR τ=0.1"][header.index(" ε=0.06 ")] == " **<ins>93.00 ±1.41</ins>** "
    assert rows["CondLR τ=0.1"][header.index(" seeds ")] == " 1-2 "
    assert latex(table.sheet).count("--") >= 2


def test_runs_that_are_not_done_do_not_count():
    frame = cells()
    frame.loc[frame["seed"] == 1, "status"] = "running"
    assert results.summarize(frame)["seeds"].eq(1).all()
    with pytest.raises(UserError, match="no run of this study is done"):
        results.summarize(cells(status="failed"))


def test_the_best_of_each_compression_is_marked():
    table = only_table(cells())
    best = {(line.label, eps) for line in table.lines for eps, cell in line.cells.items() if cell.group_best}
    assert best == {("Vanilla", 0.0), ("CondLR τ=0.1", 0.06)}, "a row alone is the best of nothing"


def test_published_values_stand_beside_ours():
    """As printed in Table 2 of the paper."""
    table = only_table(cells())
    paper = {line.label: [cell.published for cell in line.cells.values()] for line in table.lines}
    assert paper == {
        "Baseline": [0.9908, 0.9328], "CondLR τ=0.1": [0.9873, 0.9668], "Vanilla": [0.9870, 0.9094],
    }  # fmt: skip
    known = results.published(PAPER, "mnist", "lenet5")
    assert known["condlr-unit", 0.5, 0.06] == 0.9614
    assert known["condlr-tau0", 0.8, 0.0] == 0.9881
    assert len(known) == 17 * 7
    assert not results.published(PAPER, "digits", "lenet5")
    assert len(results.published(PAPER, "cifar10", "vgg16")) == 17 * 7


def test_nothing_is_compared_where_nothing_was_published():
    assert not only_table(cells(dataset="digits")).has_published
    assert not only_table(cells(attack="pgd")).has_published
    assert not only_table(cells(official_data=False)).has_published


def test_markdown():
    text = markdown(only_table(cells()).sheet)
    lines = text.splitlines()
    assert (
        lines[0] == "**LeNet5 on MNIST, protocol paper, 3 epochs: accuracy (%) under FGSM (ℓ∞), 100 images**"
    )
    assert lines[2] == "`lr=0.1 lr_milestones=[7,9]`"
    assert "| clean | ε=0.06 |" in lines[4]
    assert {line.count("|") for line in lines if line.startswith("|")} == {lines[4].count("|")}
    (ours,) = (i for i, line in enumerate(lines) if line.startswith("| CondLR τ=0.1 |"))
    assert lines[ours].endswith("| **<ins>93.00 ±1.41</ins>** |")
    assert lines[ours + 1].startswith("| *arXiv v1* |")
    assert lines[ours + 1].endswith("| 98.73 | 96.68 |")
    assert lines[ours + 2].endswith("| -1.73 | -3.68‡ |")
    assert "| 12.3 |" in lines[ours]


def test_latex_is_escaped_and_balanced():
    text = latex(only_table(cells()).sheet)
    assert r"CondLR $\tau$=0.1" in text
    assert r"\cellcolor{gray!25}\textbf{93.00 $\pm$1.41}" in text
    assert text.count(r"\begin") == text.count(r"\end")
    assert text.count("{") == text.count("}")
    assert all(ord(letter) < 128 for letter in text)
    columns = text.split(r"\begin{tabular}{")[1].split("}")[0]
    for line in text.splitlines():
        if line.endswith(r"\\"):
            assert line.count("&") == len(columns) - 1


def printed(table, width):
    console = Console(file=io.StringIO(), width=width)
    print_sheet(table.sheet, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [30, 60, 80, 100, 160, 250])
def test_a_narrow_terminal_cuts_no_number(width):
    many = pd.concat([cells().assign(eps=lambda f, e=e: f["eps"] + e) for e in (0, 0.01, 0.02, 0.03)])
    table = only_table(many.drop_duplicates(["run_id", "eps"]))
    text = printed(table, width)
    assert "…" not in text
    for word in ("CondLR τ=0.1", "93.00 ±1.41", "clean", "ε=0.09"):
        assert word in text
    assert ("Too narrow to show" in text) == (width < 250)
    assert width < 60 or all(len(line) <= width for line in text.splitlines())


def test_the_terminal_shows_every_row():
    text = printed(only_table(cells()), 160)
    for word in ("Baseline", "CondLR τ=0.1", "Vanilla", "arXiv v1", "96.68", "93.00 ±1.41", "ε=0.06"):
        assert word in text


def test_csv_has_a_line_for_each_cell():
    frame = tables.frame(only_table(cells()))
    assert len(frame) == 6
    assert frame["accuracy"].between(0, 1).all()


def test_what_is_left_out_is_counted():
    frame = cells()
    frame.loc[frame["seed"] == 1, "status"] = "diverged"
    expected = "CondLR τ=0.1 50 % seed 1 (diverged), Vanilla 50 % seed 1 (diverged)"
    assert results.left_out(frame) == expected
    assert not results.left_out(cells())
    other = cells().assign(status="diverged")  # of the same names, at another learning rate
    other["run_id"] += "-fast"
    told = results.left_out(pd.concat([cells(), other])).split(", ")
    assert len(told) == other["run_id"].nunique()
    assert all(re.search(r"seed \d \(diverged\): \S+-fast$", text) for text in told)


def test_protocols_stand_side_by_side():
    other = cells(protocol="released_code", settings="lr_factor=0.3")
    other["accuracy"] -= 0.1
    other["row_id"] += "other"
    made = list(tables.tables(pd.concat([cells(), other[other["label"] != "vanilla"]]), PAPER))
    (sheet,) = comparisons.by_protocol(made)
    lines = markdown(sheet).splitlines()
    assert lines[0] == "**LeNet5 on MNIST, 3 epochs: accuracy (%) under FGSM, by protocol**"
    assert lines[2].count("released_code") == lines[2].count("paper") == lines[2].count("arXiv v1") == 2
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in lines[4:]}
    assert rows["Baseline"] == ["0", "99.00", "89.00", "99.08", "90.00", "80.00", "93.28"]
    assert rows["Vanilla"] == ["50", "98.00 ±1.41", "–", "98.70", "92.00 ±1.41", "–", "90.94"]
    assert not list(comparisons.by_protocol(made[:1]))


def test_rows_are_named_and_ordered_as_in_the_paper():
    labels = ["svd_prune", "vanilla", "dlrt", "condlr-unit", "condlr-tau0.5", "condlr-tau0", "cayley_sgd"]
    frames = [cells()[cells()["label"].eq("vanilla")].assign(label=x, row_id=x, run_id=x) for x in labels]
    named = [titles.title(label) for label in results.summarize(pd.concat(frames))["label"].unique()]
    assert named == ["Cayley SGD", "CondLR τ=0", "CondLR τ=0.5", "CondLR s=1", "DLRT", "Vanilla", "SVD prune"]
    published = results.published(PAPER, "cifar10", "vgg16")
    assert published["condlr-unit", 0.5, 0.006] == 0.3459
    assert {label for label, _, _ in published} == {
        "baseline", "cayley_sgd", "projected_sgd", "condlr-tau0", "condlr-tau0.1", "condlr-tau0.5",
        "condlr-unit", "dlrt", "vanilla", "svd_prune",
    }  # fmt: skip


def test_how_each_run_went():
    """A line for each run: first and last loss, the condition number at the end, the worst audit."""
    lines = []
    for epoch, (loss, cond, error) in enumerate([(None, 9.0, None), (2.0, 5.0, 3e-7), (1.25, 1.0999, 2e-7)]):
        for run in cells().drop_duplicates("run_id").to_dict("records"):
            audited = run["label"].startswith("condlr")
            lines.append(
                run
                | {"epoch": epoch, "step": 10 * epoch, "train_loss": loss, "cond": cond}
                | {"audit_orthonormality_error": error if audited else None}
            )
    rows = [
        line.strip("| ").split(" | ") for line in markdown(training(pd.DataFrame(lines))).splitlines()[4:9]
    ]
    assert [row[0] for row in rows] == ["Baseline", "CondLR τ=0.1", "CondLR τ=0.1", "Vanilla", "Vanilla"]
    assert [row[3] for row in rows] == ["0", "0", "1", "0", "1"]
    assert all(row[4:8] == ["2", "20", "2.000 → 1.250", "1.10"] for row in rows)
    assert rows[1][8] == "3.0e-07"
    assert len(rows[0]) == 8 or not rows[0][8].strip()
    held_out = pd.DataFrame(lines).assign(held_out_accuracy=0.1)
    held_out.loc[held_out["epoch"].eq(2), "held_out_accuracy"] = 0.8765
    sheet = training(held_out)
    assert sheet.columns[-1].heading == "held out"
    assert {row.values[-1].text for group in sheet.groups for row in group} == {"87.65"}
    assert "held out" not in [column.heading for column in training(pd.DataFrame(lines)).columns]


def audits(*warned):
    """Both seeds of CondLR and one of the baseline were audited; `warned` are (run, check)."""
    rows = []
    for label, compression, seed in [
        ("baseline", 0.0, 0),
        ("condlr-tau0.1", 0.5, 0),
        ("condlr-tau0.1", 0.5, 1),
    ]:
        run = f"{label}-{compression}-{seed}"
        for check in CHECKS:
            rows.append(
                {
                    "run_id": run, "label": label, "compression": compression, "seed": seed,
                    "row_id": f"{label}{compression}", "norm": "linf", "eps": 0.06, "n": 100, "check": check,
                    "attack_seed": 0,
                    "status": "warning" if (run, check) in warned else "pass", "found": f"{check} found",
                    "meaning": f"{check} means",
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def test_a_row_that_an_audit_warned_of_is_marked_in_every_format():
    marks = audit.Marks(audits(("condlr-tau0.1-0.5-1", "float64")))
    (table,) = tables.tables(cells(), PAPER, marks)
    text = markdown(table.sheet)
    assert "| CondLR τ=0.1 † |" in text
    assert "| Baseline |" in text
    assert "† not to be trusted, the audit warns: CondLR τ=0.1 50 % (float64 at ε=0.06)." in text
    assert "Not audited: Vanilla 50 %." in text
    assert r"CondLR $\tau$=0.1 $^\dagger$" in latex(table.sheet)
    console = Console(file=io.StringIO(), width=160)
    print_sheet(table.sheet, console)
    assert "CondLR τ=0.1 †" in console.file.getvalue()
    assert "Not audited: Vanilla 50 %" in console.file.getvalue()


def test_what_was_not_audited_is_said():
    assert "No row was audited" in markdown(only_table(cells()).sheet)
    (table,) = tables.tables(cells(), PAPER, audit.Marks(audits()))
    assert table.audit_note == "The audit warns of no row. Not audited: Vanilla 50 %."
    (other,) = tables.tables(cells(norm="l2"), PAPER, audit.Marks(audits()))
    assert "No row was audited in this norm" in other.audit_note


def test_a_mark_stands_where_its_warning_concerns_the_attack():
    marks = audit.Marks(audits(("condlr-tau0.1-0.5-1", "float64")))
    pgd = cells(attack="pgd50-margin")
    made = list(tables.tables(pd.concat([cells(), pgd]), PAPER, marks))
    assert [bool(line.warnings) for table in made for line in table.lines if "CondLR" in line.label] == [
        True,
        False,
    ]
    compared = list(comparisons.by_attack(made))
    text = markdown(compared[-1].sheet)
    assert "| CondLR τ=0.1 | 50 | 93.00 ±1.41 † | 93.00 ±1.41 |" in text
    assert "float64 at ε=0.06" in text


def test_the_note_beside_several_attacks_is_one_of_all_rows():
    pgd = cells(attack="pgd50-margin")
    few = pgd[pgd["label"].str.startswith("condlr")]
    made = list(tables.tables(pd.concat([cells(), few]), PAPER, audit.Marks(audits())))
    text = markdown([*comparisons.by_attack(made)][-1].sheet)
    assert text.count("The audit warns of no row.") == 1
    assert text.count("Not audited: Vanilla 50 %.") == 1


def test_the_audit_of_most_images_counts():
    few = audits(("condlr-tau0.1-0.5-1", "float64")).assign(n=5)
    marks = audit.Marks(pd.concat([few, audits()]))
    assert marks.of("condlr-tau0.10.5", "linf", "fgsm") == []


def test_each_run_has_an_audit_of_its_own():
    """A warning of one seed counts, also where another was audited on more images; a part is no audit."""
    more = audits(("condlr-tau0.1-0.5-1", "float64"))
    more["n"] = more["run_id"].map({"condlr-tau0.1-0.5-0": 300}).fillna(100)
    assert audit.Marks(more).of("condlr-tau0.10.5", "linf", "fgsm") == ["float64 at ε=0.06"]
    (table,) = tables.tables(cells(), PAPER, audit.Marks(more[:-1]))
    assert "the audit warns: CondLR τ=0.1 50 % (float64 at ε=0.06)" in table.audit_note
    assert "Audited with 1 of 2 seeds: CondLR τ=0.1 50 %." in table.audit_note
    assert not audit.Marks(more[more["check"].eq("float64")]).audited("condlr-tau0.10.5", "linf")


def test_no_cell_breaks_a_markdown_table():
    frame = audits().assign(found="the median of ||g||_2 is 1e-3")
    quantities = pd.DataFrame(
        [{"run_id": "a", "label": "vanilla", "compression": 0.5, "seed": 0, "quantity": "L", "value": 1.0,
          "note": "L ||x|| / ||f(x)||"}]
    )  # fmt: skip
    for text in (audit.markdown(frame), analysis.markdown(Guarantees, quantities)):
        lines = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) == 1


def test_the_audit_as_markdown():
    text = audit.markdown(audits(("condlr-tau0.1-0.5-1", "float64")))
    assert "**Audit at eps=0.06 (ℓ∞), on 100 images**" in text
    assert (
        "| Baseline, seed 0 | none | repeatable: repeatable found<br>gradients against differences:" in text
    )
    assert "| CondLR τ=0.1 50 %, seed 1 | float64 |" in text
    assert "- *float64*: float64 means." in text
    assert "zero gradients means" not in text, "only what was warned of is explained"


def test_an_attack_on_fewer_seeds_than_another_says_so():
    one = cells(attack="pgd50-margin")
    one = one[one["seed"].eq(one["seed"].min()) | one["label"].eq("vanilla")]
    compared = list(comparisons.by_attack(list(tables.tables(pd.concat([cells(), one]), PAPER))))
    text = markdown(compared[-1].sheet)
    assert "| CondLR τ=0.1 | 50 | 94.00 (1 of 2 seeds) | 93.00 ±1.41 |" in text
    assert text.count("seeds)") == 1


def test_attacks_of_one_strength_stand_side_by_side():
    stronger = cells(attack="pgd50x3-margin")
    stronger = stronger[stronger["eps"].eq(0.06) & stronger["label"].ne("vanilla")].assign(accuracy=0.5)
    made = list(tables.tables(pd.concat([cells(), stronger]), PAPER))
    (comparison,) = comparisons.by_attack(made)
    assert comparison.eps == 0.06
    names = [column.name for column in comparison.sheet.columns]
    assert names == ["requested", "FGSM (n=100)", "PGD-50×3 on the margin (n=100)"]
    text = markdown(comparison.sheet)
    assert "| CondLR τ=0.1 | 50 | 93.00 ±1.41 | 50.00 ±0.00 |" in text
    assert "| Vanilla | 50 | 92.00 ±1.41 | – |" in text
    console = Console(file=io.StringIO(), width=100)
    print_sheet(comparison.sheet, console)
    assert "50.00 ±0.00" in console.file.getvalue()
    assert not list(comparisons.by_attack(list(tables.tables(cells(), PAPER)))), (
        "one attack has nothing beside it"
    )


@pytest.mark.parametrize(
    ("label", "text"),
    [
        ("fgsm", "FGSM"), ("fgsm-unclamped", "FGSM, unclamped"), ("fgm", "FGM"), ("pgd50-ce", "PGD-50"),
        ("pgd40x5-margin-seed=1", "PGD-40×5 on the margin, seed=1"), ("autoattack", "AutoAttack"),
        ("pgd20-ce_rescaled", "PGD-20 on rescaled logits"), ("square5000", "Square, 5,000 queries"),
        ("simba-dct-frequencies=4-100", "SimBA, DCT, frequencies=4, 100 directions"), ("noise", "noise"),
        ("transfer-pgd50-margin", "PGD-50 on the margin, transferred"),
        ("transfer-fgsm-source=a/lenet5-x-s0", "FGSM, transferred from a/lenet5-x-s0"),
    ],
)  # fmt: skip
def test_attacks_have_names_a_person_can_read(label, text):
    assert titles.attack_title(label) == text


def test_numbers_of_analyses_are_readable():
    shown = [
        numbers.shown(v) for v in (None, float("nan"), float("inf"), 12345678, 0.25, 1234.5, 1.5e12, "x")
    ]
    assert shown == ["–", "–", "∞", "12,345,678", "0.25", "1,234", "1.5e+12", "x"]


def test_precision_and_part_of_the_data_make_a_table_of_their_own():
    """Tables share their settings, and what is not as usual is one of them."""

    def settings(*overrides):
        return configured(*overrides).row["settings"]

    usual = settings("dataset=digits")
    assert settings("dataset=digits", "precision=bf16") == f"{usual} precision=bf16"
    assert settings("dataset=digits", "dataset.train_images=500") == f"{usual} train_images=500"
    assert "precision" not in usual


def test_a_name_that_looks_like_a_number_is_a_name(tmp_path):
    other = cells(protocol=2025, settings="lr_factor=0.3")
    other[["row_id", "run_id"]] += "other"
    pd.concat([cells(protocol=2024), other]).assign(device="cpu", deploy_compression=0.0).to_csv(
        tmp_path / "cells.csv", index=False
    )
    (sheet,) = comparisons.by_protocol(list(tables.tables(results.read(tmp_path), PAPER)))
    assert markdown(sheet).splitlines()[2].count("2025") == 2
