"""What a report holds, whatever it is written as: sections of text, facts, tables, figures and commands.

Text is plain but for `**bold**`, `*emphasis*` and `` `code` ``, which mean the same in every format.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from condlr.report._style import Drawing
from condlr.report.claims import Claim
from condlr.report.sheet import Sheet


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


@dataclass(frozen=True)
class Fragment:
    """Captions, tables and lists that are written as Markdown already."""

    markdown: str


@dataclass(frozen=True)
class Verdicts:
    """A claim of the paper, and what each setting of the runs says of it; not empty."""

    claims: Sequence[Claim]


@dataclass(frozen=True)
class Commands:
    """Lines for a shell."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Folded:
    """What is shown when asked for."""

    summary: str
    blocks: "Sequence[Block]"


Block = str | Link | Facts | Grid | Sheet | Fragment | Drawing | Verdicts | Commands | Folded


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    heading: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """The heading as an address, formed as GitHub forms those of a Markdown file."""
        return re.sub(r"[^\w\- ]", "", self.heading.lower()).replace(" ", "-")


@dataclass(frozen=True)
class Document:
    """A report: a title, what it says in short, and its sections."""

    title: str
    lead: Sequence[Block]
    sections: Sequence[Section] = field(default_factory=list)


_NUMBER = re.compile(r"([*]{2})?[−-]?[\d,.]+(e[+-]?\d+)?( ?%)?( ±[\d.]+)?( †)?([*]{2})?|∞")
_NONE = ("", "–")


def alternative(drawing: Drawing) -> str:
    """What is read out in place of a figure: its caption, without the settings that follow."""
    return drawing.caption.partition(". ")[0].rstrip(".")


def numeric(rows: Sequence[Sequence[str | Link]]) -> list[bool]:
    """Which columns of a table hold numbers, maybe emphasised, and at most a dash where there is none."""
    columns = (list(column) for column in zip(*rows, strict=True))
    return [
        any(cell not in _NONE for cell in column)
        and all(isinstance(cell, str) and (cell in _NONE or _NUMBER.fullmatch(cell)) for cell in column)
        for column in columns
    ]
