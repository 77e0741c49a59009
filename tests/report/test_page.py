"""The report of a study: what it says, that it stands alone, and what a browser makes of it."""

import html.parser
import json
import math
import pickle
import re
import shutil
from contextlib import chdir
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from condlr._support.errors import UserError
from condlr._support.files import write_csv
from condlr.analysis.theory.flows import Settings
from condlr.analysis.theory.theorem1 import errors
from condlr.report import page, report_markdown
from condlr.report.chapters import document
from condlr.report.content import Document, Facts, Folded, Fragment, Grid, Link, Section, Verdicts
from condlr.report.numbers import duration
from condlr.report.provenance import provenance
from condlr.report.sheet import Column, Row, Sheet, Value
from condlr.suite.collecting import collect
from tests.helpers import ROOT, SMALL, run_script
from tests.report.browser import CHROMIUM, Browser
from tests.report.study import draw_pictures_alone

# All but a few look at runs that are trained for them, or with a browser
pytestmark = pytest.mark.slow

PAPER = ROOT / "results" / "paper"
VOID = {"meta", "link", "img", "br"}


class Parsed(html.parser.HTMLParser):
    """The elements of a page, in order; a tag that is not closed, or closed out of turn, is an error."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.text, self._open = [], [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), (tag, names)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, self.getpos()

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def made(study):
    return document(study, PAPER, study.parent.parent / "runs")


def make_pages(base):
    """Two small runs on digits, trained, attacked and collected: `runs/s`, `results/s`.

    And the reports of that study and of a large one with audits and analyses, and what they were made of.
    """
    with chdir(base):
        for method in ("baseline", "condlr"):
            arguments = ["study=s", "protocol.epochs=2", "record_every=2", f"method={method}"]
            assert run_script("train", *SMALL, *arguments) == 0
    small, large = base / "results" / "s", base / "results" / "l"
    small.mkdir(parents=True)
    for name, rows in collect(base / "runs" / "s").items():
        if rows:
            write_csv(small / f"{name}.csv", rows)
    shutil.copytree(ROOT / "results" / "mnist_attacks", large)
    for study in (small, large):
        with pytest.MonkeyPatch.context() as patch:
            draw_pictures_alone(patch)
            content = made(study)
        (study / "report.html").write_text(page.render(content))
        (study / "content.pickle").write_bytes(pickle.dumps(content))


@pytest.fixture(scope="session")
def trained(once):
    return once("pages", make_pages)


@pytest.fixture
def study(trained, tmp_path):
    """A copy of it to be spoilt; the runs are copied, too."""
    shutil.copytree(trained / "runs", tmp_path / "copy" / "runs")
    return Path(shutil.copytree(trained / "results" / "s", tmp_path / "copy" / "results" / "s"))


@pytest.fixture
def undrawn(monkeypatch):
    """Each figure is a dot: of what is about words, and pictures take their time."""

    def dot(figure, file, *, format, **_):
        Image.new("RGB", (1, 1)).save(file, format=format)

    monkeypatch.setattr(Figure, "savefig", dot)


@pytest.fixture(scope="module")
def content(trained):
    return pickle.loads((trained / "results" / "s" / "content.pickle").read_bytes())


def change(study, name, **columns):
    path = study / f"{name}.csv"
    pd.read_csv(path).assign(**columns).to_csv(path, index=False)


@pytest.mark.long
def test_both_formats_have_the_same_sections_rows_and_figures(trained, content):
    parsed, text = Parsed(page.render(content)), report_markdown.render(content)
    headings = [section.heading for section in content.sections]
    assert {"Accuracy", "Figures", "Training", "Runs", "Provenance", "To make it again"} <= {*headings}
    assert re.findall(r"^## (.*)$", text, re.M) == headings
    assert [attributes["id"] for attributes in parsed.all("section")] == [s.anchor for s in content.sections]
    pictures = re.findall(r"^!\[.+\]\((.+)\)$", text, re.M)
    assert len(pictures) == len(parsed.all("img")) > 0
    assert all((trained / "results" / "s" / name).exists() for name in pictures)
    assert all(attributes["alt"] for attributes in parsed.all("img"))
    for name in ("Baseline", "CondLR τ=0.1"):
        assert name in text
        assert name in "".join(parsed.text)


def test_contents_lead_to_sections_and_nothing_leaves_the_page(content):
    parsed = Parsed(page.render(content))
    ids = {attributes["id"] for _, attributes in parsed.elements if "id" in attributes}
    targets = [attributes["href"] for attributes in parsed.all("a")]
    assert {target[1:] for target in targets if target.startswith("#")} == ids
    assert not [target for target in targets if re.match(r"\w+:|/", target)]
    assert all(attributes["src"].startswith("data:image/png;base64,") for attributes in parsed.all("img"))
    assert {attributes["href"] for attributes in parsed.all("link")} == {"data:,"}
    assert not {"iframe", "object"} & {tag for tag, _ in parsed.elements}
    assert parsed.all("script") == [{}], "one script, which is ours, and within the page"
    assert [attributes["lang"] for attributes in parsed.all("html")] == ["en"]
    assert "viewport" in {attributes.get("name") for attributes in parsed.all("meta")}


def test_the_folder_of_a_run_is_a_link_where_it_is_there(undrawn, study):
    first, second = sorted((study.parent.parent / "runs" / "s").glob("lenet5-*"))
    shutil.rmtree(second)
    content = made(study)
    targets = [attributes["href"] for attributes in Parsed(page.render(content)).all("a")]
    assert f"../../runs/s/{first.name}/" in targets
    assert second.name not in " ".join(targets)
    assert (study / f"../../runs/s/{first.name}/").resolve() == first.resolve()
    assert second.name in report_markdown.render(content)


def test_labels_cannot_become_markup(undrawn, study):
    for name in ("cells", "history", "runs", "steps", "spectra"):
        if (study / f"{name}.csv").exists():
            change(study, name, label="vanilla-<script>alert('x|y')</script>")
    parsed = Parsed(page.render(made(study)))
    assert len(parsed.all("script")) == 1
    assert "<script>alert" in "".join(parsed.text)
    blocks = [Facts([("<b>", "<i>")]), Grid(["<b>|"], [["<u>|"]]), Link("<u>", "a"), Folded("<b>", ["<i>"])]
    content = Document("<b>", ["`<code>` & <i>"], [Section("A", blocks)])
    assert not {"b", "i", "u"} & {tag for tag, _ in Parsed(page.render(content)).elements}
    text = report_markdown.render(content)
    assert set(re.findall(r"<(/?\w+)", text.replace("`<code>`", ""))) == {
        "details", "/details", "summary", "/summary"
    }  # fmt: skip
    assert r"| &lt;u>\| |" in text


def test_markdown_of_tables_becomes_html():
    text = "**A & B**\n\n| row | x |\n| --- | ---: |\n| a\\|b | **1.5** |\n| *n* | – |\n\n- **w**: `c`<br>d\n"
    parsed = Parsed(page.block(Fragment(text)))
    assert [tag for tag, _ in parsed.elements if tag in ("strong", "em", "li", "code", "br")] == [
        "strong", "strong", "em", "li", "strong", "code", "br"
    ]  # fmt: skip
    assert {"A & B", "a|b", "1.5", "n", "–", "w", "c", "d"} <= {*parsed.text}
    assert [a.get("class") for a in parsed.all("td")] == ["number", "number"]
    grid = Grid(["a", "b"], [["x", "1"], ["y", "a long text, of more than a few words"]])
    parsed = Parsed(page.block(grid))
    assert [a.get("class") for a in parsed.all("td")] == ["long", "long"]


def test_a_study_without_runs_says_what_is_unknown(undrawn, study):
    (study / "runs.csv").unlink()
    facts = dict(provenance(pd.read_csv(study / "cells.csv"), None, "s").facts())
    assert facts["dates"] == facts["recording condition numbers"] == "not recorded"
    assert facts["runs"] == "2 done"
    assert "for 2 runs" in facts["training"]
    assert "Provenance" in report_markdown.render(made(study))


def test_what_recording_cost_is_a_part_of_the_training(trained):
    study = trained / "results" / "s"
    runs, cells = pd.read_csv(study / "runs.csv"), pd.read_csv(study / "cells.csv")
    origin = provenance(cells, runs, "s")
    infos = [json.loads(path.read_text()) for path in (trained / "runs" / "s").glob("*/run.json")]
    spent, training = (sum(info[key] for info in infos) for key in ("record_seconds", "train_seconds"))
    assert spent > 0
    assert origin.overhead == pytest.approx(spent / training)
    assert f"{100 * spent / training:.1f} %" in dict(origin.facts())["recording condition numbers"]
    assert math.isnan(provenance(cells, runs.drop(columns="record_seconds"), "s").overhead)
    facts = dict(origin.facts())
    assert facts["device"] == infos[0]["device"]
    assert f"torch {infos[0]['versions']['torch']}" in facts["versions"]
    assert origin.attack_seconds == pytest.approx(cells["attack_seconds"].sum()), "each strength has a share"
    both = provenance(cells, runs.assign(commit=["abc", "def+"]), "s")
    assert dict(both.facts())["commit"] == "abc (1 runs); def (with changes that were not committed) (1 runs)"


@pytest.mark.long
def test_runs_that_are_not_there_are_counted(study):
    cells = pd.read_csv(study / "cells.csv")
    assert provenance(cells, None, "s").planned is None
    origin = provenance(cells, None, "reproduce_mnist")
    assert (origin.planned, origin.missing) == (34 + 20, 52)
    assert next(origin.facts()) == ("runs", "2 done; 52 of the 54 planned missing")
    assert provenance(cells, None, "mnist_attacks").planned == 8
    again = cells[cells["label"].eq("baseline")].assign(seed=3, run_id="again")
    origin = provenance(pd.concat([cells, again]), None, "s")
    assert origin.incomplete == {"CondLR τ=0.1, 50 %": [3]}


def test_a_run_that_failed_is_shown_with_its_reason(undrawn, study):
    cells = pd.read_csv(study / "cells.csv")
    failed = cells["label"].eq("baseline")
    columns = ["attack", "eps", "accuracy", "n", "norm", "seconds"]
    cells.loc[failed, columns] = None
    cells.loc[failed, "status"] = "failed"
    cells.to_csv(study / "cells.csv", index=False)
    runs = pd.read_csv(study / "runs.csv").astype({"reason": object})
    runs.loc[runs["label"].eq("baseline"), ["status", "reason", "train_seconds"]] = [
        "failed",
        "no space",
        None,
    ]
    runs.to_csv(study / "runs.csv", index=False)
    text = report_markdown.render(made(study))
    assert "1 done, 1 failed" in text
    assert re.search(r"\| Baseline, seed 0 \| failed \| no space \| – \|", text)


def test_a_study_of_which_nothing_is_done_has_a_report(undrawn, study):
    change(study, "cells", status="running", eps=None, accuracy=None, attack=None)
    content = made(study)
    assert str(content.lead[0]).endswith("No run is done and evaluated yet.")
    assert "Accuracy" not in [section.heading for section in content.sections]
    Parsed(page.render(content))


def test_a_study_of_a_matrix_flow_has_a_report(undrawn, tmp_path):
    (tmp_path / "f").mkdir()
    settings = Settings(n=9, m=8, rank=3, steps=[1, 4, 16], etas=[0.05], weak=[0.1, 1.0], weak_steps=16)
    frame = pd.DataFrame(errors(settings)).assign(commit="0123456789ab+", torch="2.9")
    frame.to_csv(tmp_path / "f" / "flow.csv", index=False)
    content = document(tmp_path / "f", PAPER, tmp_path)
    assert [section.heading for section in content.sections] == [
        "Theorem 1", "Figures", "Provenance", "To make it again",
    ]  # fmt: skip
    parsed = Parsed(page.render(content))
    assert len(parsed.all("img")) == 2
    assert {"rotation", "0123456789ab (with changes that were not committed)"} <= {*parsed.text}


@pytest.mark.parametrize(
    ("spoil", "pattern"),
    [
        (lambda study: (study / "cells.csv").unlink(), "cells.csv is missing"),
        (lambda study: (study / "history.csv").unlink(), "history.csv is missing"),
        (lambda study: (study / "runs.csv").write_text(""), "runs.csv is not a table of results"),
        (lambda study: (study / "runs.csv").write_text("a,b\n1,2\n"), "runs.csv lacks the columns"),
    ],
)
def test_what_is_missing_or_damaged_ends_in_one_line(undrawn, study, spoil, pattern):
    spoil(study)
    with pytest.raises(UserError, match=pattern) as error:
        made(study)
    assert "\n" not in str(error.value)


def test_a_picture_that_is_none_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"a\.png is no picture"):
        page.picture(tmp_path / "a.png")


def test_last_figures_are_of_the_most_images_and_the_largest_strength(undrawn, study):
    cells = pd.read_csv(study / "cells.csv")
    fewer = cells.assign(n=10, accuracy=0.1234)
    other = cells[cells["label"].eq("baseline")].assign(attack="pgd50-ce", eps=0.9, accuracy=0.4321)
    pd.concat([fewer, other, cells, fewer]).to_csv(study / "cells.csv", index=False)
    text = report_markdown.render(made(study)).partition("## Runs")[2]
    for _, run in cells.groupby("run_id"):
        clean, robust = run.sort_values("eps")["accuracy"]
        assert re.search(rf"\| {100 * clean:.2f} \| {100 * robust:.2f} \| \[{run['run_id'].iloc[0]}", text)


def test_durations():
    assert [duration(s) for s in (0.33, 9.96, 12.4, 61, 3661)] == [
        "0.3 s", "10 s", "12 s", "1 min 1 s", "1 h 1 min"
    ]  # fmt: skip


def test_the_script_writes_both_files_and_refuses_what_is_not_there(script, study, monkeypatch):
    base = study.parent.parent
    draw_pictures_alone(monkeypatch)
    monkeypatch.chdir(base)
    status, out, err = script("report", "study=s", f"paper={PAPER}")
    assert status == 0, err
    assert out.split() == ["results/s/report.html", "results/s/report.md"]
    assert str(base) not in (study / "report.html").read_text() + (study / "report.md").read_text()
    status, out, err = script("report", "study=other", f"paper={PAPER}")
    assert (status, out) == (1, "")
    assert re.fullmatch(r"error: results/other/cells\.csv is missing.*\n", err)


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no chromium here to look at pages with")
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(trained, content):
    """The report of the small study, and that of a large one with audits and analyses."""
    small, large = (trained / "results" / name for name in "sl")
    other = pickle.loads((large / "content.pickle").read_bytes())
    return {"small": (small / "report.html", content), "large": (large / "report.html", other)}


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", ["small", "large"])
def test_a_browser_shows_it_all(browser, pages, name, width):
    path, content = pages[name]
    assert path.stat().st_size < 3e6
    browser.open(path, width)
    assert browser.ask("innerWidth") == width
    for opened in ("false", "true"):
        browser.ask(f"document.querySelectorAll('details').forEach(d => d.open = {opened})")
        assert browser.ask("document.documentElement.scrollWidth") <= width
        inside = "[...document.querySelectorAll('main > section > *')]"
        assert browser.ask(f"{inside}.every(e => e.getBoundingClientRect().right <= innerWidth)")
    assert browser.ask("document.images.length") > 0
    shown = "i => i.complete && i.naturalWidth > 0 && i.clientWidth > 250"
    assert browser.ask(f"[...document.images].every({shown})")
    anchors = "[...document.querySelectorAll('nav a')].map(a => document.getElementById(a.hash.slice(1)).id)"
    assert browser.ask(anchors) == [section.anchor for section in content.sections]
    runs = browser.ask("document.querySelectorAll('#runs tbody tr').length")
    assert runs == {"small": 2, "large": 16}[name]
    assert browser.ask("[...document.querySelectorAll('tbody th')].every(h => h.scope == 'row')")
    assert browser.complaints() == []
    assert browser.requests() == [path.resolve().as_uri()]


def test_the_first_column_of_a_wide_table_stays(browser, pages):
    browser.open(pages["large"][0], 400)
    place = """(() => {
        const boxes = [...document.querySelectorAll('#accuracy .table')]
        const box = boxes.find(b => b.scrollWidth > b.clientWidth + 150)
        const cell = box.querySelector('tbody th')
        const before = cell.getBoundingClientRect().left
        box.scrollLeft = 150
        return [box.scrollLeft, cell.getBoundingClientRect().left - before]
    })()"""
    assert browser.ask(place) == [150, 0]


def test_a_click_sorts_a_table_and_rows_keep_what_stands_below_them(browser, pages):
    browser.open(pages["large"][0], 1400)
    rows = """(([section, at, nth]) => document.querySelectorAll(`#${section} table`)[nth]
        .querySelectorAll('tbody tr').values().map(r => r.className || r.cells[at].innerText).toArray())"""
    click = """(([section, at, nth]) => document.querySelectorAll(`#${section} table`)[nth]
        .querySelector(`[data-column="${at}"], thead th:nth-child(${at + 1}):not([data-column])`).click())"""
    browser.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
    before = browser.ask(f"{rows}(['accuracy', 4, 1])")
    browser.ask(f"{click}(['accuracy', 4, 1])")
    after = browser.ask(f"{rows}(['accuracy', 4, 1])")
    assert after != before
    assert sorted(after) == sorted(before)
    numbers = [float(text.split()[0]) for text in after if text[0].isdigit()]
    assert numbers == sorted(numbers)
    kinds = [text for text in after if not text[0].isdigit() and text != "–"]
    assert {*kinds} <= {"published", "camera-ready", "difference"}
    assert after[0][0].isdigit(), "no row's published values come before the row"
    assert after[-1] in (*kinds, "–"), "what has no value comes last"
    browser.ask(f"{click}(['accuracy', 4, 1])")
    numbers = [float(t.split()[0]) for t in browser.ask(f"{rows}(['accuracy', 4, 1])") if t[0].isdigit()]
    assert numbers == sorted(numbers, reverse=True)
    seconds = "t => t.match(/min/) ? 60 * parseFloat(t) + parseFloat(t.split('min')[1]) : parseFloat(t)"
    times = browser.ask(
        f"(() => {{ {click}(['runs', 2, 0]); return {rows}(['runs', 2, 0]).map({seconds}) }})()"
    )
    assert times == sorted(times)
    assert browser.complaints() == []


def test_a_page_opens_with_its_figure_and_the_claims(browser, pages):
    path, content = pages["large"]
    figure, overview, lead, _ = content.lead
    assert figure.png.stem == "robustness"
    assert str(lead).startswith("8 rows, 2 seeds")
    verdicts = [block for block in content.sections[0].blocks if isinstance(block, Verdicts)]
    titles = [verdict.claims[0].title for verdict in verdicts]
    assert [row[0].text for row in overview.grid.rows] == titles
    assert [verdict.drawing.png.exists() for verdict in verdicts] == [True] * len(titles)
    text = report_markdown.render(content)
    places = [
        text.index(part) for part in ("(robustness.png)", "| claim | verdict |", "8 rows, 2 seeds", "## ")
    ]
    assert places == sorted(places)
    for width, stacked in ((400, True), (1400, False)):
        browser.open(path, width)
        first = "[...document.querySelector('header .verdicts tbody tr').cells]"
        boxes = f"{first}.map(cell => cell.getBoundingClientRect().top)"
        assert (len({*browser.ask(boxes)}) > 1) == stacked
        wide = (
            "[...document.querySelectorAll('p, li, figcaption, .verdicts')].filter(e => e.checkVisibility())"
        )
        fits = "e => e.getBoundingClientRect().right <= innerWidth + 1 && e.scrollWidth <= e.clientWidth + 1"
        assert browser.ask(f"{wide}.every({fits})"), "no prose scrolls sideways"
        links = "[...document.querySelectorAll('header .verdicts a')]"
        anchors = f"{links}.map(a => document.getElementById(a.hash.slice(1)).tagName)"
        assert browser.ask(anchors) == ["ARTICLE"] * len(titles)


def test_what_was_not_run_has_no_columns(content):
    sheet = Sheet("c", [Column("a"), Column("b")], [[
        Row("x", [Value("1"), Value("–")]), Row("v1", [Value(""), Value("2")], "published"),
    ]])  # fmt: skip
    assert sheet.run == Sheet("c", [Column("a")], [[Row("x", [Value("1")])]])
    assert Grid(["a", "b"], [["x", "–"], ["y", ""]]).filled == Grid(["a"], [["x"], ["y"]])


def test_the_policy_of_a_page_lets_no_script_run(browser, pages, tmp_path):
    text = pages["small"][0].read_text()
    (tmp_path / "p.html").write_text(text.replace("</main>", "<script>document.title = 'x'</script></main>"))
    browser.open(tmp_path / "p.html", 800)
    assert browser.ask("document.title").startswith("s: ")
    assert any("Content Security Policy" in json.dumps(said) for said in browser.complaints())
