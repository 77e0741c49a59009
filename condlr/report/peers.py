"""condlr beside other libraries, as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from condlr.report.numbers import condition, shown
from condlr.report.results import pipe
from condlr.suite.peers import RANK, Peer

HEADER = ("layer", "program", "ms", "of dense", "of free", "turns", "promise", "orthonormal to", "cond(W)")
# The columns of text.
LEFT = (0, 1, 6)

LEGEND = (
    "A step of SGD with momentum 0.9, forward and backward pass included, of one layer at rank {rank}: the "
    "median of interleaved turns. Free: the same factors U S Vᵀ without a constraint. Orthonormal to: max "
    "|UᵀU − I|, V likewise; cond(W): of the r largest singular values; both after the turns. condlr alone "
    "bounds cond(W)."
)


def cells(line: Peer) -> list[str]:
    """The cells of one line."""
    error = "" if line.orthonormality is None else f"{line.orthonormality:.1e}"
    times = f"{line.milliseconds:.2f}", f"{line.of_dense:.2f}", f"{line.of_free:.2f}", str(line.turns)
    return [line.layer, line.program, *times, line.promise, error, condition(line.condition)]


def markdown(lines: Sequence[Peer], facts: Mapping[str, Any]) -> str:
    """The table with its device and legend."""
    marks = ["---" if number in LEFT else "---:" for number in range(len(HEADER))]
    table = [pipe(HEADER), pipe(marks), *(pipe(cells(line)) for line in lines)]
    known = ("device", "threads")
    where = ", ".join(f"{name} {shown(facts[name])}" for name in known if facts.get(name) is not None)
    return "\n".join([*table, "", LEGEND.format(rank=RANK), "", f"{where}."]) + "\n"
