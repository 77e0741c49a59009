"""Titles of what runs recorded as labels: rows, runs, settings, networks and attacks."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import pandas as pd

from condlr._support.rooms import available, find
from condlr.attacks.base import NORM_TITLES, Attack
from condlr.data.base import Dataset
from condlr.methods.base import Method
from condlr.models.base import Architecture
from condlr.penalties.base import Penalty
from condlr.report.numbers import counted

T = TypeVar("T")
_LIST = re.compile(r"=\[([^]]*)\]")
# What the runs of a table share, by column.
Known = dict[str, Any]


def title(label: str, variant: str = "") -> str:
    """A row as tables and legends print it: `CondLR τ=0.1 + SO`, and its variant if there is one.

    A list among its options, `layers=['conv1', 'conv2']`, is printed as `layers=conv1,conv2`.
    """
    method, penalty = _parts(label)
    whole = " ".join([_method(method).title_of(method) + penalty, variant]).rstrip()
    return _LIST.sub(lambda found: "=" + found[1].replace("'", "").replace(" ", ""), whole)


def row_title(label: str, compression: float, variant: str = "") -> str:
    """`CondLR τ=0.1, 80 %`."""
    return title(label, variant) + (f", {100 * compression:g} %" if compression else "")


def run_title(run: Mapping[str, Any] | pd.Series) -> str:
    """`CondLR τ=0.1 80 %, seed 0`."""
    compression = f" {100 * run['compression']:g} %" if run["compression"] else ""
    return f"{title(str(run['label']))}{compression}, seed {run['seed']}"


def run_titles(runs: pd.DataFrame) -> dict[str, str]:
    """The title of each run, by run_id; where several have the same, with what tells them apart.

    `CondLR τ=0.1 80 %, seed 0 (lr=0.05)`.
    """
    told = told_apart(runs)
    return {
        str(run["run_id"]): run_title(run) + (f" ({told[run['run_id']]})" if told[run["run_id"]] else "")
        for _, run in runs.drop_duplicates("run_id").iterrows()
    }


def told_apart(runs: pd.DataFrame, shown: Collection[str] = ()) -> dict[str, str]:
    """By run_id, what tells a run from others of the same title: `lr=0.05`; empty where none has it.

    Network, protocol and epochs do where they can, else settings and options.

    Args:
        shown: columns that stand beside the title.
    """
    first = runs.drop_duplicates("run_id").set_index("run_id").fillna({"settings": "", "options": ""})
    coarse = [name for name in ("dataset", "model", "protocol", "epochs") if name in first]
    fine = [name for name in ("settings", "options") if name in first]
    alike = [first.apply(run_title, axis=1), *(first[name] for name in shown)]
    told = pd.Series("", first.index)
    for texts in (
        [" ".join(f"{name}={run[name]}" for name in coarse) for _, run in first.iterrows()],
        [" ".join(run[name] for name in fine) for _, run in first.iterrows()],
    ):
        groups = pd.Series(texts, first.index).groupby(alike)
        found = groups.transform(lambda group: group.map(differing(group.unique())))
        told, alike = (told + " " + found).str.strip(), [*alike, found]
    return {str(run): text for run, text in told.items()}


def differing(texts: Iterable[str]) -> dict[str, str]:
    """For each text of `key=value` parts those parts that not all texts have."""
    known = {text: dict(part.split("=", 1) for part in text.split()) for text in texts}
    return {
        text: " ".join(
            f"{key}={value}"
            for key, value in parts.items()
            if any(other.get(key) != value for other in known.values())
        )
        for text, parts in known.items()
    }


def setting(context: Known) -> str:
    """The shared setting of a table's rows, for its caption: `LeNet5 on MNIST, protocol paper, 10 epochs`."""
    base = decay(context)
    start = f", singular values falling as {base}⁻ⁱ at the start" if base else ""
    told = f", {context['told']}" if context.get("told") else ""
    return f"{network(context)}, protocol {context['protocol']}, {epochs(context)}{start}{told}"


def decay(context: Known) -> str:
    """The base of an ill-conditioned start; empty if there was none."""
    found = re.search(r"(?:^| )decay=([\d.e+-]+)", str(context["settings"]))
    return f"{float(found[1]):g}" if found else ""


def network(context: Known) -> str:
    """`LeNet5 on MNIST`."""
    return f"{model_title(context['model'])} on {dataset(context)}"


def model_title(name: str) -> str:
    """`LeNet5`."""
    return _known("models", name, Architecture).title or name


def dataset(context: Known) -> str:
    """`CIFAR-10`."""
    name = context["dataset"]
    return _known("data", name, Dataset).title or name


def epochs(context: Known) -> str:
    """`10 epochs`."""
    return counted(context["epochs"], "epoch")


def attack_title(label: str) -> str:
    """The title of an attack: `PGD-50×3 on the margin`. An unknown label stays as it is."""
    if label.startswith("transfer-"):
        made, _, source = label.removeprefix("transfer-").partition("-source=")
        return f"{attack_title(made)}, transferred{f' from {source}' if source else ''}"
    titles = (find("attacks", name, Attack).title_of(label) for name in available("attacks"))
    name, _, rest = label.partition("-")
    return next(filter(None, titles), name + (f", {rest}" if rest else ""))


def norm_title(norm: str) -> str:
    """A norm as captions print it."""
    return NORM_TITLES.get(norm, norm)


def place(label: str) -> int:
    """The rank of a label's method in tables."""
    return _method(_parts(label)[0]).order


def colour(label: str) -> str | None:
    """The colour of a row in figures, or None if its method defines none."""
    return _method(_parts(label)[0]).colours.get(label)


def _parts(label: str) -> tuple[str, str]:
    """The method's part of a row's label, and the title of its penalty after a +, if there is one."""
    method, plus, penalty = label.partition("+")
    name, *words = penalty.split("-")
    if not plus or name not in available("penalties"):
        return label, ""
    # Each option begins with its key; a word without one belongs to a value, such as 1e-05
    options = "".join(f" {word}" if "=" in word else f"-{word}" for word in words)
    return method, f" + {find('penalties', name, Penalty).title}{options}"


def _method(label: str) -> type[Method]:
    """The class of a method's label."""
    return _known("methods", label.partition("-")[0], Method)


def _known(room: str, name: str, base: type[T]) -> type[T]:
    """The class of that name, or the base class if the name is unknown."""
    return find(room, name, base) if name in available(room) else base
