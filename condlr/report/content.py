"""The content of a report in any format: sections of text, facts, tables, figures and commands.

Text is plain but for `**bold**`, `*emphasis*` and `` `code` ``, which mean the same in every format.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from condlr.report import numbers
from condlr.report._style import Drawing
from condlr.report.evidence import Claim, Comparison
from condlr.report.sheet import NONE, Sheet, anchor


@dataclass(frozen=True)
class Link:
    """A link; `target` is relative to the report."""

    text: str
    target: str


@dataclass(frozen=True)
class Facts:
    """Names and their values."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Grid:
    """A table of text; columns of numbers are aligned to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | Link]]

    @property
    def filled(self) -> "Grid":
        """The table without empty columns."""
        kept = [i for i in range(len(self.header)) if any(row[i] not in NONE for row in self.rows)]
        return Grid([self.header[i] for i in kept], [[row[i] for i in kept] for row in self.rows])


@dataclass(frozen=True)
class Fragment:
    """Content that is already Markdown."""

    markdown: str


@dataclass(frozen=True)
class Verdicts:
    """A claim of the paper with its verdict in each setting (at least one), and a picture."""

    claims: Sequence[Claim]
    drawing: Drawing


@dataclass(frozen=True)
class Overview:
    """A line for each claim: its verdict on the most attacked images, and its other verdicts."""

    claims: Sequence[Sequence[Claim]]

    @property
    def grid(self) -> Grid:
        """The claims as a table, with bold verdicts."""
        header = ["claim", "verdict", "points", "comparison that decides", "verdict elsewhere"]
        rows = []
        for first, *others in self.claims:
            comparison = first.decisive
            counts = Counter(claim.verdict for claim in others)
            elsewhere = ", ".join(f"{verdict} ×{count}" for verdict, count in counts.items())
            rows.append([
                Link(first.title, f"#{first.anchor}"), f"**{first.verdict}**",
                points(comparison), str(comparison), elsewhere,
            ])  # fmt: skip
        return Grid(header, rows).filled


@dataclass(frozen=True)
class Commands:
    """Shell commands."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Folded:
    """Blocks that a reader can unfold."""

    summary: str
    blocks: "Sequence[Block]"


Block = str | Link | Facts | Grid | Sheet | Fragment | Drawing | Verdicts | Overview | Commands | Folded


@dataclass(frozen=True)
class Section:
    """A heading and its blocks."""

    heading: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """The address of the heading."""
        return anchor(self.heading)


@dataclass(frozen=True)
class Document:
    """A report: a title, a summary, and sections."""

    title: str
    lead: Sequence[Block]
    sections: Sequence[Section] = field(default_factory=list)


# The heading of `detectable`
SEEN = "detectable in 4 of 5 studies"

_NUMBER = re.compile(r"([*]{2})?[+−-]?[\d,.]+(e[+-]?\d+)?( ?%)?( ±[\d.]+)?( †)?([*]{2})?|∞")


def detectable(claim: Claim) -> str:
    """The difference in points that such runs would show; empty where they decide, or nothing is known."""
    least = 100 * claim.decisive.detectable
    return f"{least:.2f}" if claim.verdict == "undecided" and not math.isnan(least) else ""


def points(comparison: Comparison) -> str:
    """A difference of accuracies in percentage points, ± the margin that it must exceed, if that is known."""
    spread = "" if math.isnan(comparison.margin) else f" ±{100 * comparison.margin:.2f}"
    return f"{numbers.points(comparison.difference)}{spread}".replace("-", "−")


def alternative(drawing: Drawing) -> str:
    """The alternative text of a figure: its caption without the settings."""
    return drawing.caption.partition(". ")[0].rstrip(".")


def numeric(rows: Sequence[Sequence[str | Link]]) -> list[bool]:
    """For each column, whether it holds only numbers (maybe emphasised) and missing values."""
    columns = (list(column) for column in zip(*rows, strict=True))
    return [
        any(cell not in NONE for cell in column)
        and all(isinstance(cell, str) and (cell in NONE or _NUMBER.fullmatch(cell)) for cell in column)
        for column in columns
    ]
