"""The paper's tables in every format: what is marked, what is compared, what is missing."""

import shutil
import subprocess
from html.parser import HTMLParser

import pandas as pd
import pytest

from condlr.report import comparisons, html, published, tables
from condlr.report.latex import latex, tex
from condlr.report.markdown import markdown
from condlr.report.protocols import differences
from condlr.report.results import CONTEXT
from condlr.report.tables import Cell
from tests.report.study import PAPER, cells

VGG = {"dataset": "cifar10", "model": "vgg16", "n": 10_000}


def whole(**changes):
    """As `cells`, attacked on all test images."""
    return cells(**({"n": 10_000} | changes))


def lines_of(frame):
    (table,) = tables.tables(frame, PAPER)
    return table, {(line.label, line.compression): line for line in table.lines}


def vgg():
    """The same of VGG16 on CIFAR-10, at its largest strength."""
    frame = whole(**VGG)
    return frame.assign(eps=frame["eps"].replace(0.06, 0.006), run_id="vgg" + frame["run_id"])


def test_ties_are_all_marked_and_the_mean_decides():
    frame = cells()
    clean = frame["eps"].eq(0)
    frame.loc[clean & frame["label"].eq("condlr-tau0.1"), "accuracy"] = [0.97, 0.99]
    frame.loc[clean & frame["label"].eq("vanilla"), "accuracy"] = [0.98, 0.98]
    _, lines = lines_of(frame)
    marks = {name: (line.cells[0.0].group_best, line.cells[0.0].best) for (name, _), line in lines.items()}
    assert marks == {"Baseline": (False, True), "CondLR τ=0.1": (True, False), "Vanilla": (True, False)}


def test_the_best_of_all_stands_out_beside_the_best_of_its_group():
    table, lines = lines_of(cells())
    best = lines["CondLR τ=0.1", 0.5].cells[0.06]
    assert best.best and best.group_best
    text = html.table(table.sheet)
    assert '<td class="number group-best best">93.00 ±1.41</td>' in text
    assert '<td class="number group-best">98.00 ±1.41</td>' in text
    assert r"\cellcolor{gray!25}98.00 $\pm$1.41" in latex(table.sheet)


@pytest.mark.parametrize(
    ("accuracy", "seeds", "std", "beyond"),
    [(0.92, 2, 0.01, False), (0.9201, 2, 0.01, True), (0.8799, 3, 0.01, True), (0.88, 3, 0.01, False),
     (0.99, 1, float("nan"), False), (0.9, 2, 0.0, False), (0.91, 2, 0.0, True)],
)  # fmt: skip
def test_a_difference_of_two_standard_deviations_is_not_beyond_them(accuracy, seeds, std, beyond):
    cell = Cell(accuracy, std, seeds, published=0.9)
    assert cell.difference == pytest.approx(accuracy - 0.9)
    assert cell.beyond is beyond


def test_single_seeds_have_differences_without_marks():
    table, lines = lines_of(cells()[lambda frame: frame["seed"].eq(0)])
    assert lines["Vanilla", 0.5].cells[0.0].value("difference").text == "+0.30"
    assert "two seeds have (no row here has them)." in " ".join(table.notes)
    assert "difference" in markdown(table.sheet)
    rows = [line for line in markdown(table.sheet).splitlines() if line.startswith("|")]
    assert not any("‡" in row for row in rows)


def test_the_camera_ready_values_stand_below_those_of_v1():
    table, lines = lines_of(vgg())
    cell = lines["Vanilla", 0.5].cells[0.006]
    assert (cell.published, cell.camera_ready) == (0.3856, 0.3849)
    assert cell.difference == pytest.approx(0.92 - 0.3856)
    text = markdown(table.sheet)
    assert text.count("*camera-ready*") == 8
    assert "2505.08022" in text


def test_pgd_in_the_euclidean_norm_is_compared_with_the_camera_ready_version():
    frame = vgg().assign(attack="pgd10-ce", norm="l2")
    table, lines = lines_of(frame.assign(eps=frame["eps"].replace(0.006, 0.3)))
    cell = lines["Vanilla", 0.5].cells[0.3]
    assert (cell.published, cell.camera_ready) == (None, 0.2184)
    assert cell.difference == pytest.approx(0.92 - 0.2184)
    assert table.number is None
    assert len(table.lines) == 3
    assert not lines_of(frame.assign(norm="linf"))[0].has_published


def test_a_half_done_study_shows_every_row_of_the_paper():
    table, lines = lines_of(whole())
    assert table.number == 2
    assert table.caption.startswith("Table 2. LeNet5 on MNIST")
    assert len(table.lines) == 17
    assert [line.label for line in table.lines[:5]] == [
        "Baseline", "Cayley SGD", "Projected SGD", "CondLR τ=0", "CondLR τ=0.1",
    ]  # fmt: skip
    assert table.strengths == [0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06]
    absent = lines["DLRT", 0.8]
    assert (absent.cells[0.06].ours, absent.cells[0.06].published) == ("–", 0.9067)
    assert table.missing.startswith(
        "Not run yet, 14 of the paper's rows: Cayley SGD, Projected SGD, CondLR τ=0 50 %"
    )
    assert "DLRT 80 %" not in table.audit_note
    assert tables.frame(table)["accuracy"].notna().sum() == 6


@pytest.mark.parametrize(
    "change", [{"n": 1000}, {"dataset": "digits"}, {"official_data": False}, {"attack": "pgd50-ce"}]
)
def test_other_tables_have_their_own_rows_alone(change):
    table, _ = lines_of(whole(**change))
    assert table.number is None
    assert len(table.lines) == 3
    assert not table.missing


def test_table_1_pairs_two_networks():
    made = list(tables.tables(pd.concat([whole(), vgg()]), PAPER))
    assert [table.number for table in made] == [2, 3] or [table.number for table in made] == [3, 2]
    (sheet,) = tables.table1(made, PAPER)
    blocks = [(column.block, column.name) for column in sheet.columns if column.strength]
    assert blocks == [
        ("MNIST", "clean"), ("MNIST", "ε=0.02"), ("MNIST", "ε=0.04"), ("MNIST", "ε=0.06"),
        ("CIFAR-10", "clean"), ("CIFAR-10", "ε=0.002"), ("CIFAR-10", "ε=0.004"), ("CIFAR-10", "ε=0.006"),
    ]  # fmt: skip
    rows = [row for group in sheet.groups for row in group]
    assert [len([row for row in group if row.kind == "ours"]) for group in sheet.groups] == [3, 7, 7]
    (ours,) = (
        row for row in rows if row.name == "Vanilla" and row.values[0].text == "50" and row.kind == "ours"
    )
    texts = [value.text for value in ours.values]
    own = ["50.0", "2", "98.00 ±1.41", "–", "–", "92.00 ±1.41"]
    assert texts == ["50", *own, *own]


def test_table_1_of_one_network_has_dashes_for_the_other():
    (sheet,) = tables.table1(list(tables.tables(vgg(), PAPER)), PAPER)
    assert "LeNet5 on MNIST (not run)" in sheet.caption
    ours, v1 = sheet.groups[0][:2]
    assert [value.text for value in ours.values][:7] == ["0", *["–"] * 6]
    assert [value.text for value in v1.values][3:7] == ["99.08", "98.15", "96.47", "93.28"]
    assert not list(tables.table1(list(tables.tables(cells(), PAPER)), PAPER)), (
        "100 images are not the paper's"
    )


def test_table_1_is_made_for_each_protocol():
    other = whole(protocol="released_code", epochs=5)
    made = list(tables.tables(pd.concat([whole(), other]), PAPER))
    captions = [sheet.caption for sheet in tables.table1(made, PAPER)]
    assert ["protocol paper" in caption for caption in captions] == [True, False]
    assert "LeNet5 on MNIST (5 epochs)" in captions[1]


def test_slips_are_found_in_the_files(tmp_path):
    assert len(published.table1(PAPER, "mnist", "lenet5")) == 17 * 4
    table, _ = lines_of(whole())
    assert table.slips == [
        "LeNet5 on MNIST, CondLR s=1 at 50 %, ε=0, 0.02, 0.04, 0.06: Table 1 prints "
        "96.06, 94.14, 91.56, 87.73, Table 2 prints 98.68, 98.09, 97.28, 96.14."
    ]
    (slip,) = published.slips(PAPER, "cifar10", "vgg16")
    assert slip == ("condlr-tau0.5", 0.5, 0.006, 0.487, 0.4877)
    shutil.copytree(PAPER, tmp_path, dirs_exist_ok=True)
    first = tmp_path / "table1.csv"
    first.write_text(first.read_text().replace("0.487\n", "0.4877\n").replace("0.9328", "0.9329"))
    assert not published.slips(tmp_path, "cifar10", "vgg16")
    assert published.slips(tmp_path, "mnist", "lenet5")[0] == ("baseline", 0.0, 0.06, 0.9329, 0.9328)


def test_the_legend_names_what_differs_from_the_paper():
    frame = whole(
        epochs=20, protocol="released_code",
        settings="lr=0.1 lr_factor=0.4 held_out=0.25 rank_rule=released_code",
        options="slope=0.01 tau=0.1 centre=mean preconditioner=exact",
    )  # fmt: skip
    (table,) = tables.tables(frame, PAPER)
    text = " ".join(table.notes)
    assert "epochs 20 (paper: 120)" in text
    assert "held_out 0.25 (paper: 0.0; the part of the training images that is kept back" in text
    assert "rank_rule released code (paper: params;" in text
    assert "CondLR: centre mean (paper: rms; of the band of singular values)" in text
    for same in ("lr 0.1", "lr_factor", "preconditioner", "Vanilla: "):
        assert same not in text.partition("What differs")[2]


def test_nothing_differs_from_the_paper_where_nothing_does():
    frame = whole(
        epochs=120, settings="lr=0.05 lr_milestones=[70,100]", options="batch_norm_momentum=0.1", **VGG
    )
    context = {name: frame[name].iloc[0] for name in CONTEXT}
    assert differences(context, frame) == []
    (found,) = differences(context, frame.assign(options="batch_norm_momentum=0.9"))
    assert found.startswith("settings: batch_norm_momentum 0.9 (paper: 0.1;")
    unit = frame.assign(label="condlr-unit", options="tau=0.0 centre=one")
    assert differences(context, unit) == [], "s = 1 is what the row is"
    (clamped,) = differences(context | {"attack": "fgsm-unclamped"}, frame)
    assert "not clamped" in clamped


class Strict(HTMLParser):
    """Fails on what is not closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.rows, self.texts = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append(0)
        if tag in ("td", "th"):
            self.rows[-1] += int(dict(attrs).get("colspan") or 1)
            assert tag == "td" or dict(attrs)["scope"]
        assert "style" not in dict(attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_html_is_well_formed_and_escaped():
    frame = pd.concat([whole(), vgg()])
    frame = pd.concat([frame, frame.assign(options="a=<b>&\"'", row_id=frame["row_id"] + "x")])
    made = list(tables.tables(frame, PAPER))
    sheets = [*tables.table1(made, PAPER), *(table.sheet for table in made)]
    for sheet in sheets:
        parser = Strict()
        parser.feed(html.table(sheet))
        parser.close()
        assert not parser.open
        assert parser.rows[-1] == len(sheet.columns) + 1
        assert len(set(parser.rows[2:])) == 1
        assert any("<b>&\"'" in text for text in parser.texts)
    page = html.document("a < b", sheets)
    assert page.startswith("<!DOCTYPE html>")
    assert "<title>a &lt; b</title>" in page
    assert 'class="difference"' in page
    assert 'class="number beyond"' in page


def test_latex_compiles(tmp_path):
    if shutil.which("pdflatex") is None:
        pytest.skip("pdflatex is not installed: the tables' LaTeX was not compiled")
    odd = "100 % & #1_a $x$ {y} ~ ^2 \\z ‖x‖2 ℓ∞ ℓ2 τ ε ± † ‡ – × < > | ∞ ≤ · → é"
    frame = pd.concat([whole(), vgg(), whole(protocol="released_code")]).assign(
        options=f"a={odd.replace(' ', '')}"
    )
    other = frame.assign(options="a=1", row_id=frame["row_id"] + "x")
    made = list(tables.tables(pd.concat([frame, other]), PAPER))
    sheets = [*comparisons.by_protocol(made), *tables.table1(made, PAPER), *(table.sheet for table in made)]
    (tmp_path / "table.tex").write_text("\n".join(map(latex, sheets)) + tex(odd))
    (tmp_path / "main.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs,graphicx}\\usepackage[table]{xcolor}\n"
        "\\begin{document}\\input{table}\\end{document}\n"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Float too large" not in done.stdout
    assert (tmp_path / "main.pdf").read_bytes().startswith(b"%PDF")


def test_the_csv_has_all_that_was_published_and_measured():
    table, _ = lines_of(vgg())
    frame = tables.frame(table)
    assert len(frame) == 17 * 7
    columns = {
        "v1",
        "camera_ready",
        "accuracy",
        "std",
        "seeds",
        "epochs",
        "protocol",
        "requested",
        "measured",
    }
    assert columns | {"difference", "beyond"} <= {*frame.columns}
    row = frame[frame["row"].eq("Vanilla") & frame["requested"].eq(0.5) & frame["eps"].eq(0.006)].iloc[0]
    assert (row["v1"], row["camera_ready"], row["seeds"], row["measured"]) == (0.3856, 0.3849, 2, 0.5)
    assert row["difference"] == pytest.approx(row["accuracy"] - row["v1"])
    assert bool(row["beyond"])
