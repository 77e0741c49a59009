"""The page over all studies says what their reports say."""

import re

import pytest

from tests.helpers import ROOT

RESULTS = ROOT / "results"
PAGE = (RESULTS / "README.md").read_text("utf-8")
LINES = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.count("|") == 6 and "**" in line
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line[4]}-{line[0]}"[:60])
def test_a_verdict_is_that_of_its_report(line):
    claim, verdict, points, comparison, study = line
    report = (RESULTS / study / "report.md").read_text("utf-8")
    rows = [row for row in report.splitlines() if row.startswith(f"| [{claim}](")]
    assert len(rows) == 1
    cells = [cell.strip() for cell in rows[0].strip("|").split("|")]
    assert cells[1:4] == [verdict, points, comparison]


def test_the_page_has_verdicts_and_every_study():
    assert len(LINES) > 10
    linked = set(re.findall(r"\]\((\w+)[/)]", PAGE))
    assert {path.name for path in RESULTS.iterdir() if path.is_dir()} <= linked | {"paper"}


@pytest.mark.parametrize("page", sorted(RESULTS.glob("*/report.*")), ids=lambda page: page.parent.name)
def test_a_report_links_to_nothing_outside_of_the_project(page):
    assert "../../../" not in page.read_text("utf-8")
