"""Differences between the settings of runs and the paper's text, in words."""

import re
from collections.abc import Mapping
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from condlr.report.titles import Known, title
from condlr.suite.config import CONF

_MEANINGS = {
    "lr_milestones": "the epochs at which the learning rate is lowered",
    "lr_factor": "what the learning rate is multiplied by there",
    "held_out": "the part of the training images that is kept back for validation",
    "augmentation": "of training images",
    "rank_rule": "params solves r(n+m+r) = (1-compression)nm, released code takes "
    "ceil((1-compression) min(n,m)), which removes fewer weights",
    "classifier": "the last linear layer of low-rank networks",
    "init": "how low-rank layers start",
    "batch_norm_momentum": "the weight of the new batch in running statistics",
    "centre": "of the band of singular values",
    "preconditioner": "of the steps of U and V",
    "momentum": "where or whether momentum acts on constrained factors",
    "projection": "of S for τ=0",
    "inner_iterations": "of the Cayley transform",
    "first": "where the Cayley iteration starts",
    "cap": "of the step",
    "tall": "matrices with more outputs than inputs",
    "start": "of the weights",
    "unit_rows": "rows are normalised before each step",
    "qr_period": "steps between orthonormalisations by QR",
}  # fmt: skip


def differences(context: Known, cells: pd.DataFrame) -> list[str]:
    """What differs from the paper's text: phrases for the settings and each kind of row, maybe none."""
    paper = _paper(context["model"], context["dataset"])
    settings = {"epochs": context["epochs"], **_keys(context["settings"])}
    known = {"settings": _differing(settings, paper)}
    if "unclamped" in context["attack"]:
        known["settings"].append("adversarial images are not clamped to [0, 1] (paper: they are)")
    for label, options in cells[["label", "options"]].drop_duplicates().itertuples(index=False):
        name = re.split("[-+]", label)[0]
        own, stated = _keys(options), paper["methods"].get(name, {})
        if label == "condlr-unit":
            own.pop("centre", None)  # part of the row, not of the protocol
        known["settings"] += _differing({key: v for key, v in own.items() if key not in stated}, paper)
        known.setdefault(title(name), []).extend(_differing(own, stated))
    return [f"{name}: {'; '.join(dict.fromkeys(found))}" for name, found in known.items() if found]


def _differing(keys: Mapping[str, Any], paper: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} {_text(value)} (paper: {'; '.join(filter(None, [_text(paper[key]), _MEANINGS.get(key)]))})"
        for key, value in keys.items()
        if key in paper and value != paper[key]
    ]


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value).replace("_", " ")


def _keys(text: object) -> dict[str, Any]:
    """`lr=0.1 lr_milestones=[70,100]` as a mapping."""
    parts = str(text).split() if isinstance(text, str) else []
    return OmegaConf.to_container(OmegaConf.from_dotlist(parts))  # type: ignore[return-value]


def _paper(model: str, dataset: str) -> dict[str, Any]:
    """The protocol `paper` for a network and a dataset."""
    names = ("paper", f"model/paper_{model}", f"dataset/paper_{dataset}")
    parts = [CONF / "protocol" / f"{name}.yaml" for name in names]
    merged = OmegaConf.merge(*(OmegaConf.load(path) for path in parts if path.exists()))
    return OmegaConf.to_container(merged)  # type: ignore[return-value]
