"""Low-rank activations under gradient attacks, beside their published numbers."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from condlr.report.numbers import accuracy
from condlr.report.results import by_row, contexts, summarize
from condlr.report.sheet import Column, Row, Sheet, Value
from condlr.report.titles import Known, attack_title, setting

SOURCE = (
    "Published: of ResNet-50, by the author's post on arXiv 1804.07090v5; the length of a step and the "
    "number of restarts are not stated."
)
# The published rows, by the beginnings of our labels.
_ROWS = {"baseline+lr_layer": "lr", "baseline+": "", "baseline": "vanilla", "snip": "snip", "srn": "srn"}
_PREFIX = "eps_"


def sheets(cells: pd.DataFrame, paper: Path) -> Iterator[Sheet]:
    """A sheet for each PGD of the published radii against networks with low-rank activations."""
    path = paper / "lr_layer_pgd_resnet50_cifar10.csv"
    if not path.exists():
        return
    published = pd.read_csv(path)
    radii = {name: _radius(name) for name in published if name.startswith(_PREFIX)}
    for known, frame in contexts(summarize(cells)):
        ours = frame["label"].str.startswith("baseline+lr_layer").any()
        alike = (known["dataset"], known["norm"]) == ("cifar10", "linf")
        if alike and ours and known["attack"].startswith("pgd"):
            columns = {
                name: frame[np.isclose(frame["eps"], radius, rtol=1e-3)] for name, radius in radii.items()
            }
            if all(map(len, columns.values())):
                yield _sheet(known, frame, columns, published)


def _sheet(
    known: Known, frame: pd.DataFrame, columns: Mapping[str, pd.DataFrame], published: pd.DataFrame
) -> Sheet:
    lines = []
    for key, _ in by_row(frame.drop_duplicates("row_id")):
        found = (part[part["row_id"].eq(key.row_id)] for part in columns.values())
        texts = [accuracy(*part[["accuracy", "std"]].iloc[0]) if len(part) else "" for part in found]
        lines.append(Row(key.title, [*map(Value, texts)]))
        told = next((there for start, there in _ROWS.items() if key.label.startswith(start)), "")
        for line in published[published["method"].eq(told)].to_dict("records"):
            texts = [accuracy(line[name] / 100) for name in columns]
            lines.append(Row(f"  published, {line['steps']} steps", [*map(Value, texts)], "published"))
    caption = f"{setting(known)}, {attack_title(known['attack'])}, {known['n']:,} images: accuracy (%)"
    headings = [Column(name.removeprefix(_PREFIX).replace("_", "/"), "ε") for name in columns]
    return Sheet(caption, headings, [lines], [*_doubts(published)], rules=[SOURCE])


def _radius(name: str) -> float:
    above, below = name.removeprefix(_PREFIX).split("_")
    return int(above) / int(below)


def _doubts(published: pd.DataFrame) -> Iterator[str]:
    """What the published numbers say about the attack."""
    most = published[published["steps"].eq(published["steps"].max())].set_index("method")
    if {"vanilla", "lr"} <= {*most.index}:
        radii = [name for name in published if name.startswith(_PREFIX)]
        first, last = (name.removeprefix(_PREFIX).replace("_", "/") for name in (radii[0], radii[-1]))
        lost = most[radii[0]] - most[radii[-1]]
        yield (
            f"From ε = {first} to {last} the published network without LR-layers loses {lost['vanilla']:.1f} "
            f"points, the one with them {lost['lr']:.1f}. An attack that hardly gains from a larger radius "
            "does not find what is there: this is the mark of masked gradients. Compare the attacks on other "
            "losses, AutoAttack, and the audit."
        )
