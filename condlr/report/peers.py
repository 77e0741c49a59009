"""condlr beside other libraries, as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from condlr.report.markdown import piped
from condlr.report.numbers import condition, shown
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
    table = piped(HEADER, map(cells, lines), LEFT)
    known = ("device", "threads")
    where = ", ".join(f"{name} {shown(facts[name])}" for name in known if facts.get(name) is not None)
    return f"{table}\n\n{LEGEND.format(rank=RANK)}\n\n{where}.\n"
