"""What a report holds, whatever it is written as: sections of text, facts, tables, figures and commands.

Text is plain but for `**bold**`, `*emphasis*` and `` `code` ``, which mean the same in every format.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from condlr.report._style import Drawing
from condlr.report.claims import Claim, Comparison
from condlr.report.sheet import NONE, Sheet, anchor


@dataclass(frozen=True)
class Link:
    """Text that leads to a place beside the report; `target` is relative to where the report lies."""

    text: str
    target: str


@dataclass(frozen=True)
class Facts:
    """Names and what is known of them."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Grid:
    """A table of text; columns of numbers are set to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | Link]]

    @property
    def filled(self) -> "Grid":
        """Without columns that hold nothing."""
        kept = [i for i in range(len(self.header)) if any(row[i] not in NONE for row in self.rows)]
        return Grid([self.header[i] for i in kept], [[row[i] for i in kept] for row in self.rows])


@dataclass(frozen=True)
class Fragment:
    """Captions, tables and lists that are written as Markdown already."""

    markdown: str


@dataclass(frozen=True)
class Verdicts:
    """A claim of the paper, what each setting of the runs says of it, and a picture; not empty."""

    claims: Sequence[Claim]
    drawing: Drawing


@dataclass(frozen=True)
class Overview:
    """A line for each claim: its verdict where most images were attacked, and elsewhere."""

    claims: Sequence[Sequence[Claim]]

    @property
    def grid(self) -> Grid:
        """The verdicts are bold."""
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
    """Lines for a shell."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Folded:
    """What is shown when asked for."""

    summary: str
    blocks: "Sequence[Block]"


Block = str | Link | Facts | Grid | Sheet | Fragment | Drawing | Verdicts | Overview | Commands | Folded


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    heading: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """The heading as an address."""
        return anchor(self.heading)


@dataclass(frozen=True)
class Document:
    """A report: a title, what it says in short, and its sections."""

    title: str
    lead: Sequence[Block]
    sections: Sequence[Section] = field(default_factory=list)


_NUMBER = re.compile(r"([*]{2})?[+−-]?[\d,.]+(e[+-]?\d+)?( ?%)?( ±[\d.]+)?( †)?([*]{2})?|∞")


def points(comparison: Comparison) -> str:
    """A difference of accuracies in points, and two standard errors of it, if they are known."""
    spread = "" if math.isnan(comparison.margin) else f" ±{100 * comparison.margin:.2f}"
    return f"{round(100 * comparison.difference, 2) + 0.0:+.2f}{spread}".replace("-", "−")


def alternative(drawing: Drawing) -> str:
    """What is read out in place of a figure: its caption, without the settings that follow."""
    return drawing.caption.partition(". ")[0].rstrip(".")


def numeric(rows: Sequence[Sequence[str | Link]]) -> list[bool]:
    """Which columns of a table hold numbers, maybe emphasised, and at most a dash where there is none."""
    columns = (list(column) for column in zip(*rows, strict=True))
    return [
        any(cell not in NONE for cell in column)
        and all(isinstance(cell, str) and (cell in NONE or _NUMBER.fullmatch(cell)) for cell in column)
        for column in columns
    ]
