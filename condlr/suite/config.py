"""The typed schema of a run's config, and every check of what a user asks for.

A config names classes, which `condlr._support.rooms` finds; their fields are the options. Checks that need
no torch come before torch is imported.
"""

import hashlib
import json
import math
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from condlr._support.errors import UserError, in_range, one_of
from condlr._support.rooms import available
from condlr._support.strengths import strengths
from condlr.suite.folders import folder
from condlr.suite.origin import Origin, origin, require_alike
from condlr.suite.protocol import Protocol, choose_protocol
from condlr.suite.values import choose, convert, expanded, resolved

if TYPE_CHECKING:
    from condlr.attacks.base import Attack
    from condlr.data.base import Dataset
    from condlr.factorization import Scheme
    from condlr.methods.base import Method
    from condlr.models.base import Architecture
    from condlr.penalties.base import Penalty

CONF = folder("conf", "conf")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("float32", "tf32", "bf16")
FORMS = ("measured", "factored", "chained", "multiplied")

# Keys that are not part of a run's identity: paths, the device, what is recorded, and the attack.
_NOT_IDENTITY = (
    "study",
    "runs_dir",
    "data_root",
    "device",
    "forms",
    "record_every",
    "record_operators",
    "attack",
    "budget",
)
# Keys whose null is part of a run's identity; they are older than the rule in `_identity`.
_NULL_COUNTS = ("compression", "train_images", "test_images")
# Keys of a protocol that act only where another group refers to them; they are part of its identity there.
_REFERRED = ("batch_norm_momentum", "clamp", "methods")


@dataclass
class _Schema:
    """The top level of a run's config; its groups are checked later."""

    dataset: dict[str, Any]
    model: dict[str, Any]
    method: dict[str, Any]
    protocol: dict[str, Any]
    attack: dict[str, Any]
    compression: float
    seed: int
    study: str
    runs_dir: str
    data_root: str
    device: str
    precision: str
    forms: Any
    record_every: int = 0
    record_operators: bool = False
    penalty: Any = None
    budget: float | None = None
    start: Any = None


@dataclass(frozen=True)
class RunConfig:
    """A run's config, checked, with the objects that it names.

    Attributes:
        identity: everything that the run's result depends on, as plain values.
        label: the method's label with its unusual options, and the penalty's after a +: `condlr-tau0.1+so`.
        attack: evaluated at the end. It is not part of the identity: asking for another attack on a
            finished run attacks it, and does not train it again.
        origin: the run that it begins with; None: random weights.
    """

    identity: dict[str, Any]
    label: str
    dataset: "Dataset"
    model: "Architecture"
    method: "Method"
    scheme: "Scheme"
    protocol: Protocol
    attack: "Attack"
    seed: int
    study: str
    runs_dir: Path
    data_root: Path
    device: str
    precision: str
    forms: str | dict[str, str]
    record_every: int
    record_operators: bool
    penalty: "Penalty | None" = None
    origin: Origin | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of the identity."""
        return fingerprint(self.identity)

    @property
    def run_id(self) -> str:
        """For example `lenet5-mnist-condlr-tau0.1-c0.5-s0-3fa9c1d2`."""
        # Only characters with which `run=<its directory>` needs no quotes
        parts = self.label.split("+") if self.penalty else [self.label]
        label = "+".join(re.sub(r"[^A-Za-z0-9._-]+", "_", part) for part in parts)
        names = [self.identity["model"]["name"], self.identity["dataset"]["name"], label]
        if self.scheme.compression is not None:
            names.append(f"c{self.scheme.compression:g}")
        return "-".join([*names, f"s{self.seed}", self.fingerprint])

    @property
    def row(self) -> dict[str, Any]:
        """The facts that tables show; runs that differ only in their seed share a `row_id`."""
        options, penalty = self.identity["model"] | self.identity["method"], self.identity.get("penalty", {})
        options |= {f"penalty.{key}": value for key, value in penalty.items() if key != "name"}
        return {
            "dataset": self.identity["dataset"]["name"],
            "model": self.identity["model"]["name"],
            "method": self.identity["method"]["name"],
            "label": self.label,
            "tau": self.identity["method"].get("tau"),
            "compression": self.scheme.compression or 0.0,
            "compresses": self.method.compresses,
            "protocol": self.protocol.name,
            "epochs": self.protocol.epochs,
            "settings": _as_text(self.identity["protocol"] | self._differing, without=("name", "epochs")),
            "options": _as_text(options, without=("name",)),
            "seed": self.seed,
            "row_id": fingerprint({key: v for key, v in self.identity.items() if key != "seed"}),
            **({"penalty": penalty["name"]} if penalty else {}),
        }

    @property
    def _differing(self) -> dict[str, Any]:
        """Unusual settings that are not the protocol's: the precision, the dataset's options, the start."""
        usual = {field.name: field.default for field in fields(self.dataset)}
        keys = self.identity["dataset"].items()
        unusual = {key: value for key, value in keys if key != "name" and value != usual.get(key)}
        unusual |= {} if self.precision == "float32" else {"precision": self.precision}
        return unusual | ({} if self.origin is None else {"start": self.origin.name})

    @property
    def directory(self) -> Path:
        """The run's directory."""
        return self.runs_dir / self.study / self.run_id

    @property
    def baseline(self) -> "RunConfig":
        """The same run with the method `baseline`, which is dense, and without a penalty."""
        from condlr.methods.base import Method

        method, keys = choose("method", "methods", {"name": "baseline"}, Method)
        return replace(
            self,
            identity={key: value for key, value in self.identity.items() if key != "penalty"}
            | {"method": keys, "compression": None},
            label=_label(method, keys, self.protocol),
            method=method,
            penalty=None,
            scheme=replace(self.scheme, compression=None),
        )


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Hash of an identity: 8 hexadecimal digits."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def check(config: DictConfig | Mapping[str, Any]) -> RunConfig:
    """Check a composed config of `scripts/train.py`, and find the classes that it names.

    Raises:
        UserError: names the key, the mistake and the valid values.
    """
    given = resolved(config)
    if given.get("flow", ...) is None:  # config.yaml had this key until 0.1, null in every run of a network
        del given["flow"]
    plain = convert(_Schema, given)
    values = {field.name: plain[field.name] for field in fields(_Schema)}
    protocol, values["protocol"] = choose_protocol(values["protocol"])
    _check_plain(values)
    method, method_keys = _method(values["method"], protocol)
    model, model_keys, dataset, dataset_keys = _model_and_dataset(values["model"], values["dataset"])
    attack = _attack(values["attack"], protocol)
    scheme = _scheme(values["compression"], values["budget"], protocol, method, model, dataset)
    penalty, penalty_keys = _penalty(values["penalty"])
    if penalty is not None:
        try:
            method.require_penalty(penalty.acts_on)
        except ValueError as error:
            raise UserError(f"penalty.{error}") from None
        if penalty.every > 1 and method.batches_without_step:
            raise UserError(
                f"penalty.every={penalty.every}: this method moves no weight in some batches, which may be "
                "just these; set penalty.every=1"
            )
    begun = origin(values["start"], dataset_keys["name"], model_keys["name"], values["seed"])
    if begun is not None:
        _require_kept(protocol, method_keys)
        if isinstance(values["start"], str):  # as config.yaml holds it, the start was looked at before
            require_alike(begun, dataset_keys, model_keys, values["seed"], protocol.held_out)
    label = _label(method, method_keys, protocol)
    if penalty is not None and penalty_keys is not None:
        label += f"+{'-'.join([penalty_keys['name'], *_unusual(penalty, penalty_keys)])}"
    found = {"dataset": dataset_keys, "model": model_keys, "method": method_keys, "penalty": penalty_keys}
    found |= {"compression": scheme.compression, "start": None if begun is None else begun.name}
    return RunConfig(
        _identity(values | found), label,
        dataset, model, method, scheme, protocol, attack, values["seed"], values["study"],
        Path(values["runs_dir"]), Path(values["data_root"]), values["device"], values["precision"],
        values["forms"], values["record_every"], values["record_operators"], penalty, begun,
    )  # fmt: skip


def _check_plain(values: Mapping[str, Any]) -> None:
    """Raise `UserError` for a value of the top level that cannot be."""
    try:
        in_range("compression", values["compression"], 0, 1, half_open=True)
        in_range("seed", values["seed"], 0, 2**32, half_open=True)
        if values["budget"] is not None:
            in_range("budget", values["budget"], 1, math.inf, half_open=True)
        one_of("device", values["device"], DEVICES)
        one_of("precision", values["precision"], PRECISIONS)
        _check_forms(values["forms"])
        in_range("record_every", values["record_every"], 0, math.inf, half_open=True)
        check_study(values["study"])
    except ValueError as error:
        raise UserError(str(error)) from None


def _method(keys: Mapping[str, Any], protocol: Protocol) -> tuple["Method", dict[str, Any]]:
    """The method and its keys, for a protocol that it can be trained with."""
    from condlr.methods.base import Method

    method, complete = choose("method", "methods", keys, Method)
    for name, options in protocol.methods.items():
        if name not in available("methods"):
            choices = ", ".join(available("methods"))
            raise UserError(f"protocol.methods.{name}: there is no such method; choose from {choices}")
        if name == complete["name"] and (unknown := [key for key in options if key not in complete]):
            raise UserError(f"protocol.methods.{name}.{unknown[0]}: the method {name} has no such key")
    if (kind := protocol.optimizer or "sgd") not in method.optimizers:
        able = " or ".join(method.optimizers)
        raise UserError(f"protocol.optimizer={kind}: the method {complete['name']} trains with {able}")
    try:
        method.require_epochs(protocol.epochs)
    except ValueError as error:
        raise UserError(f"method.{error}") from None
    return method, complete


def _model_and_dataset(
    model_keys: Mapping[str, Any], dataset_keys: Mapping[str, Any]
) -> tuple["Architecture", dict[str, Any], "Dataset", dict[str, Any]]:
    """A network and the images that it takes, and all keys of both."""
    from condlr.data.base import Dataset
    from condlr.models.base import Architecture

    model, model_keys = choose("model", "models", model_keys, Architecture)
    # `conf/attack` refers to a dataset's strengths; they are part of the attack
    of_images = {key: value for key, value in dataset_keys.items() if key != "strengths"}
    dataset, dataset_keys = choose("dataset", "data", of_images, Dataset)
    if dataset.shape is not None:
        try:
            model.require(dataset.shape)
        except ValueError as error:
            both = f"model={model_keys['name']} with dataset={dataset_keys['name']}"
            raise UserError(f"{both}: {error}") from None
    return model, model_keys, dataset, dataset_keys


def _attack(keys: Mapping[str, Any], protocol: Protocol) -> "Attack":
    """The attack, whose strengths may be texts such as 8/255."""
    from condlr.attacks.base import Attack

    keys = {
        key: [value] if key == "iterations" and isinstance(value, int | float) else value
        for key, value in keys.items()
    }
    try:
        keys |= {"eps": strengths(keys["eps"])} if "eps" in keys else {}
    except ValueError as error:
        raise UserError(f"attack.{error}") from None
    if keys.get("clamp", True) is None:
        keys |= {"clamp": protocol.clamp}
    return choose("attack", "attacks", keys, Attack)[0]


def _scheme(
    compression: float,
    budget: float | None,
    protocol: Protocol,
    method: "Method",
    model: "Architecture",
    dataset: "Dataset",
) -> "Scheme":
    """How layers are replaced: compressed as asked, or as the budget needs; a dense method has neither."""
    from condlr.factorization import Scheme

    asked = compression if method.compresses else None
    try:
        scheme = Scheme(asked, protocol.rank_rule, protocol.classifier, protocol.init, protocol.decay)
    except ValueError as error:
        raise UserError(f"protocol.{error}") from None
    if budget is None or not method.compresses:
        return scheme
    return replace(scheme, compression=_compression_for(budget, method, scheme, model, dataset))


def _penalty(keys: Any) -> tuple["Penalty | None", dict[str, Any] | None]:
    from condlr.penalties.base import Penalty

    if keys is None:
        return None, None
    if not isinstance(keys, dict):
        raise UserError(f"penalty must be a group of keys, as in penalty=so; got {keys!r}")
    if keys and "name" not in keys:
        raise UserError(f"penalty.{next(iter(keys))} is set, but no penalty is chosen, as in penalty=so")
    return choose("penalty", "penalties", keys, Penalty)


def _require_kept(protocol: Protocol, method: Mapping[str, Any]) -> None:
    """Raise `UserError` for settings that would draw anew what a start has learned."""
    inits = {"protocol.init": protocol.init, "method.init": method.get("init", "spectral")}
    for key, init in inits.items():
        if init != "spectral":
            raise UserError(f"{key}={init} draws weights anew: with start, set {key}=spectral")
    if protocol.decay is not None:
        raise UserError("protocol.decay sets singular values anew: with start, set protocol.decay=null")


def _compression_for(
    budget: float, method: "Method", scheme: "Scheme", model: "Architecture", dataset: "Dataset"
) -> float:
    """The smallest compression, in ten thousandths, whose exported network has at most `budget` weights."""
    import torch

    if dataset.shape is None or dataset.number_of_classes is None:
        what = "the shape of its images" if dataset.shape is None else "its number_of_classes"
        raise UserError(f"budget: this dataset does not say {what}; set compression instead")
    with torch.device("meta"):
        network = model.build(dataset.shape, dataset.number_of_classes)
    steps = range(10_000)

    def kept(step: int) -> int:
        return method.deployed(network, replace(scheme, compression=step / len(steps)))

    if kept(steps[-1]) > budget:
        raise UserError(f"budget={budget:g}: this network needs {kept(steps[-1]):,} weights with rank 1")
    return bisect_left(steps, True, key=lambda step: kept(step) <= budget) / len(steps)


def _identity(values: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a checked config that the run's result depends on.

    Left out are: `_NOT_IDENTITY`, a dataset's `download`, a protocol's `_REFERRED` keys, and every key that
    is null, except `_NULL_COUNTS`. So a new key that defaults to null renames no run.
    """
    elsewhere = {"protocol": _REFERRED, "dataset": ("download",)}

    def counted(keys: Mapping[str, Any], without: Sequence[str]) -> dict[str, Any]:
        return {
            key: value
            for key, value in keys.items()
            if key not in without and (value is not None or key in _NULL_COUNTS)
        }

    return {
        key: counted(value, elsewhere.get(key, ())) if isinstance(value, dict) else value
        for key, value in counted(values, _NOT_IDENTITY).items()
    }


def check_study(study: Any) -> None:
    """Raise `ValueError` if the name of a study would not do as the name of a folder."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", str(study)):
        raise ValueError(f"study must be a plain name of letters, digits, - _ .; got {study!r}")
    if study == "paper":
        raise ValueError("study=paper: that folder of the results has published numbers; choose another name")


def _check_forms(forms: Any) -> None:
    if isinstance(forms, dict):
        for name, form in forms.items():
            one_of(f"forms.{name}", form, FORMS[1:])
    else:
        one_of("forms", forms, FORMS)


def _label(method: "Method", keys: Mapping[str, Any], protocol: Protocol) -> str:
    """`condlr-tau0.1-retraction=polar`: the method's label, and options that are not as usual."""
    unusual = _unusual(method, keys, protocol.methods.get(keys["name"], {}), method.in_label)
    return "-".join([method.label(), *unusual])


def _unusual(
    thing: Any, keys: Mapping[str, Any], usual: Mapping[str, Any] = {}, without: Sequence[str] = ()
) -> list[str]:
    """The keys whose value is neither the default of their class nor the `usual` one: `retraction=polar`."""
    default: dict[str, Any] = {"name": keys["name"]}
    for option in fields(thing):
        made = option.default_factory
        default[option.name] = option.default if made is MISSING else made()
    default |= usual
    return [f"{key}={keys[key]}" for key in keys if keys[key] != default.get(key) and key not in without]


def published(results_dir: str) -> str:
    """The default of `paper`: <results_dir>/paper if it exists, else the numbers that come with condlr."""
    if not isinstance(results_dir, str):
        return ""  # the check of types names the key
    own = Path(expanded(results_dir)) / "paper"
    return str(own if own.is_dir() else folder("paper", "results/paper"))


def _as_text(keys: Mapping[str, Any], without: tuple[str, ...]) -> str:
    """Keys as on the command line: `lr=0.1 lr_milestones=[70,100]`."""
    parts = ((key, json.dumps(value, separators=(",", ":"))) for key, value in keys.items())
    return " ".join(f"{key}={value.strip(chr(34))}" for key, value in parts if key not in without)
