"""From the text of a config to values of the types that a dataclass declares."""

import os
import pickle
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import fields
from functools import lru_cache
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from condlr._support.errors import UserError
from condlr._support.rooms import find

# Keys that name a file or directory. No shell expands `~` behind `key=`, so we do.
_PATHS = ("run", "start", "runs_dir", "data_root", "results_dir", "paper")

T = TypeVar("T")


def typed(schema: type[T], config: DictConfig) -> T:
    """A script's config as an instance of its schema."""
    return construct(schema, convert(schema, resolved(config)))


def choose(group: str, room: str, keys: Mapping[str, Any], base: type[T]) -> tuple[T, dict[str, Any]]:
    """The instance that a config group describes, and all its keys with defaults filled in."""
    options = dict(keys)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"{group}.name is missing: it names a file of condlr/{room}/")
    kind = find(room, name, base)
    complete = convert(kind, options, group)
    return construct(kind, complete, group), {"name": name} | complete


def resolved(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """A composed config as plain values, without Hydra's own part, as config.yaml holds it."""
    if not isinstance(config, DictConfig):
        return _with_home(config)
    try:
        return _with_home({str(key): _plain(config[key]) for key in config if key != "hydra"})
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from error


def _plain(node: Any) -> Any:
    is_group = OmegaConf.is_config(node)
    return OmegaConf.to_container(node, resolve=True, throw_on_missing=True) if is_group else node


def _with_home(values: Mapping[str, Any]) -> dict[str, Any]:
    for key in ("runs_dir", "results_dir"):
        if values.get(key) == "":
            usual = key.removesuffix("_dir")
            raise UserError(f"{key} is empty: name a directory, or leave it at {usual}")
    paths = {key: expanded(values[key]) for key in _PATHS if key in values}
    attack = values.get("attack")
    if isinstance(attack, dict) and "source" in attack:
        paths["attack"] = attack | {"source": expanded(attack["source"])}
    return dict(values) | paths


def expanded(path: T) -> T | str:
    """A path with a leading `~` or `~user` expanded; a value that is not a string is returned unchanged.

    Raises:
        UserError: there is no such home directory.
    """
    if not isinstance(path, str) or not path.startswith("~"):
        return path
    found = os.path.expanduser(path)  # noqa: PTH111 (Path's drops what the text ends with)
    if found.startswith("~"):
        raise UserError(f"{path}: there is no such home directory; a name that begins with ~ is ./{path}")
    return found


def one_line(error: BaseException) -> str:
    """The message of a Hydra or OmegaConf error in one line, without the parts that do not help a user."""
    text = str(error).split("Config search path")[0]
    text = re.sub(r"To append to your config use \+([\w.]*).*", _no_such_key, text)
    lines = [line.strip() for line in text.splitlines()]
    noise = ("full_key:", "reference_type=", "object_type=", "See https://")
    key = next((line[len("full_key:") :].strip() for line in lines if line.startswith("full_key:")), "")
    kept = " ".join(line for line in lines if line and not line.startswith(noise))
    return f"{key}: {kept}" if key and key not in kept else kept


def _no_such_key(found: re.Match[str]) -> str:
    within, _, key = found[1].rpartition(".")
    # Hydra sets no key of a group that is null, and some groups are null within another
    whole = f" If {within} is a group that is null, give it whole, as in {within}={{{key}:...}}."
    return f"There is no such key; see --help.{whole if '.' in within else ''}"


def convert(schema: type, values: Mapping[str, Any], group: str = "") -> dict[str, Any]:
    """`values` converted to the types of a dataclass's fields, with defaults filled in."""
    free = [field.name for field in fields(schema) if field.type == dict[str, Any]]
    apart = {key: values[key] for key in free if isinstance(values.get(key), dict)}  # of any types
    for field in fields(schema):
        value, of_union = values.get(field.name), get_origin(field.type) in (Union, UnionType)
        kinds = get_args(field.type) if of_union else (field.type,)
        if value is not None and not isinstance(value, Mapping) and dict in map(get_origin, kinds):
            where = f"{group}.{field.name}" if group else field.name
            raise UserError(f"{where} is a group of keys, as in {where}={{key:value}}; got {value!r}")
    typed = pickle.dumps(dict(values) | {key: {} for key in apart})
    plain = pickle.loads(_converted(schema, typed, group)) | deepcopy(apart)
    if missing := _missing(plain):
        raise UserError(f"{group}.{missing[0]} is missing" if group else f"{missing[0]} is missing")
    return plain


@lru_cache(maxsize=512)  # OmegaConf takes 10 ms for a group, and the runs of a sweep share theirs
def _converted(schema: type, pickled: bytes, group: str) -> bytes:
    values = pickle.loads(pickled)
    prefix = f"{group}." if group else ""
    known = [field.name for field in fields(schema)]
    if unknown := [key for key in values if key not in known]:
        choices = f"the keys of {group} are {', '.join(known)}" if known else f"{group} has no other keys"
        raise UserError(f"{prefix}{unknown[0]}: there is no such key; {choices if group else 'see --help'}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), values)
        return pickle.dumps(OmegaConf.to_container(merged))
    except OmegaConfBaseException as error:
        raise UserError(prefix + one_line(error)) from error


def _missing(values: Mapping[Any, Any], prefix: str = "") -> list[str]:
    """The keys without a value; nested keys are written with dots."""
    found = [f"{prefix}{key}" for key, value in values.items() if value == "???"]
    for key, value in values.items():
        if isinstance(value, dict):
            found += _missing(value, f"{prefix}{key}.")
    return found


def construct(kind: type[T], values: Mapping[str, Any], group: str = "") -> T:
    """The instance of these values; what is wrong with them is a `UserError` that names the key."""
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(f"{group}.{error}" if group else str(error)) from None
