r"""Sheets as LaTeX tables. They need booktabs, graphicx and xcolor with its option `table`."""

import re
from itertools import groupby

from condlr.report.sheet import Sheet, Value

_SIGNS = {
    "\\": r"\textbackslash{}", "%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "$": r"\$",
    "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "|": r"$|$",
    "ε": r"$\varepsilon$", "τ": r"$\tau$", "σ": r"$\sigma$", "±": r"$\pm$", "×": r"$\times$", "·": r"$\cdot$",
    "ℓ∞": r"$\ell_\infty$", "ℓ2": r"$\ell_2$", "‖x‖2": r"$\|x\|_2$", "∞": r"$\infty$", "≤": r"$\le$",
    "†": r"$^\dagger$", "‡": r"$^\ddagger$", "–": "--", "→": r"$\to$",
}  # fmt: skip
_PATTERN = re.compile("|".join(map(re.escape, sorted(_SIGNS, key=len, reverse=True))))


def latex(sheet: Sheet) -> str:
    """The best of a group is shaded, the best of all bold, as in the paper."""
    lines = [
        r"\begin{table}[htbp]", r"\centering\small", rf"\caption{{{tex(_caption(sheet))}.}}",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * len(sheet.columns)}}}", r"\toprule",
        *_head(sheet),
    ]  # fmt: skip
    for group in sheet.groups:
        lines.append(r"\midrule")
        for row in group:
            name = tex(row.name) if row.kind == "ours" else rf"\quad {tex(row.name.strip())}"
            lines.append(" & ".join([name, *map(_marked, row.values)]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}}"]
    notes = [*sheet.settings, *sheet.legend("Shaded", "Bold")]
    # The notes stand outside the float: the longest table with its notes does not fit on a page.
    below = [r"{\footnotesize\raggedright", rf"\noindent\emph{{{tex(_caption(sheet))}.}}\par"]
    below += [*(rf"\noindent {tex(note)}\par" for note in notes), r"\medskip}"]
    return "\n".join([*lines, r"\end{table}", *(below if notes else [])]) + "\n"


def _caption(sheet: Sheet) -> str:
    """The caption without a table number: LaTeX adds its own."""
    return re.sub(r"^Table (\d)\.", r"As Table \1 of the paper.", sheet.caption)


def tex(text: str) -> str:
    """Text in ASCII, with the special characters of LaTeX escaped."""
    escaped = _PATTERN.sub(lambda found: _SIGNS[found[0]], text)
    return escaped.encode("ascii", "replace").decode()


def _head(sheet: Sheet) -> list[str]:
    names = " & ".join(["row", *(tex(column.name) for column in sheet.columns)]) + r" \\"
    if not any(column.block for column in sheet.columns):
        return [names]
    cells, rules, at = [""], [], 2
    for block, columns in groupby(sheet.columns, key=lambda column: column.block):
        size = len([*columns])
        cells.append(rf"\multicolumn{{{size}}}{{c}}{{{tex(block)}}}")
        rules += [rf"\cmidrule(lr){{{at}-{at + size - 1}}}"] if block else []
        at += size
    return [" & ".join(cells) + r" \\", *rules, names]


def _marked(value: Value) -> str:
    text = rf"\textbf{{{tex(value.text)}}}" if value.best else tex(value.text + "‡" * value.beyond)
    return rf"\cellcolor{{gray!25}}{text}" if value.group_best else text
