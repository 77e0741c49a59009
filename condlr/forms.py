"""The form in which each low-rank layer is computed: the fastest on this machine, by measurement."""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condlr._support import machine
from condlr._support.errors import one_of
from condlr._support.files import write
from condlr._support.inputs import call, copied, require_module, untouched
from condlr.convolutions import CONVOLUTIONS, TRANSPOSED
from condlr.factorization import low_rank_layers
from condlr.layers import FORMS, LowRank

_CONVOLUTIONS = (*CONVOLUTIONS, *TRANSPOSED)
# Rounds of timing; fewer if they take longer than _SECONDS in all.
_ROUNDS, _SECONDS = 9, 0.3
# An unusual form must save at least this share of the time: less is noise.
_WORTHWHILE = 0.05


def choose_forms(model: nn.Module, example: Any) -> dict[str, str]:
    """Give each low-rank layer of `model` the form (see `LowRank.form`) that is fastest in training.

    The forward and backward pass of each layer is timed, for about a second in all, on the input that it
    gets when the network sees `example`. Results are kept in `$XDG_CACHE_HOME/condlr/forms.json` (`~/.cache`
    by default), so that layers of the same shapes are timed once per machine, and all runs use the same
    forms. Results from a busy machine are not kept. The network's weights, buffers and random state do not
    change.

    Args:
        model: on its device.
        example: a batch as in training: a tensor, a tuple of positional arguments, or a mapping of keywords.

    Returns:
        The chosen forms by layer name; `set_forms` makes the same choice elsewhere.
    """
    names = {layer: name for name, layer in low_rank_layers(require_module("choose_forms", model)).items()}
    known, found, chosen = _read(), {}, {}

    def measure(layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        assert isinstance(layer, LowRank)
        if names[layer] in chosen:
            return
        x = inputs[0] if inputs else named["input"]
        key = _key(layer, x)
        if known.get(key) not in _forms_of(layer):
            known[key] = found[key] = _fastest(layer, x)
        chosen[names[layer]] = known[key]

    hooks = [layer.register_forward_pre_hook(measure, with_kwargs=True) for layer in names]
    try:
        with torch.inference_mode(False), untouched(model), torch.enable_grad():
            call(model, copied(example))
    finally:
        for hook in hooks:
            hook.remove()
    set_forms(model, chosen)
    if found and not machine.busy():  # on a busy machine, waiting for a core decides which form is faster
        _write(found)
    return chosen


def set_forms(model: nn.Module, forms: Mapping[str, str] | str) -> None:
    """Set the form of each layer named in `forms`, or one form for all low-rank layers.

    Raises:
        ValueError: unknown form, or no low-rank layer of that name.
    """
    layers = low_rank_layers(require_module("set_forms", model))
    if isinstance(forms, str):
        one_of("forms", forms, FORMS)
        forms = dict.fromkeys(layers, forms)
    if not isinstance(forms, Mapping):
        raise ValueError(f"forms is one form, or forms by layer name; got {forms!r}")
    for name, form in forms.items():
        if name not in layers:
            raise ValueError(
                f"forms: no low-rank layer is named {name!r}; there are {', '.join(layers) or 'none'}"
            )
        one_of(f"forms.{name}", form, FORMS)
    for name, form in forms.items():
        layers[name].form = form


def forms(model: nn.Module) -> dict[str, str]:
    """The form of each low-rank layer of `model`, by name."""
    return {name: layer.form for name, layer in low_rank_layers(model).items()}


def _forms_of(layer: LowRank) -> tuple[str, ...]:
    """The candidates. A convolution is never chained: it has many more pixels than U has rows."""
    chained = layer.S is not None and layer.S.ndim == 2 and not isinstance(layer, _CONVOLUTIONS)
    return tuple(form for form in FORMS if chained or form != "chained")


def _fastest(layer: LowRank, x: Tensor) -> str:
    """The form of `layer` with the least time, over a few rounds of all forms, for inputs like `x`."""
    before, forms = layer.form, _forms_of(layer)
    x = x.detach().requires_grad_(x.requires_grad)
    rounds: list[list[float]] = []
    try:
        while len(rounds) <= _ROUNDS and not (len(rounds) > 2 and sum(map(sum, rounds)) > _SECONDS):
            rounds.append([_seconds(layer, form, x) for form in forms])
    finally:
        layer.form = before
    # The first round includes one-time initialisations.
    times = dict(zip(forms, map(min, zip(*rounds[1:], strict=True)), strict=True))
    # For fewer inputs than U has rows, a separate product with S is cheaper than forming U S.
    few = x.numel() // x.shape[-1] < layer.shape[0]
    usual = "chained" if few and "chained" in forms else "factored"
    fastest = min(forms, key=lambda form: times[form])
    return fastest if times[fastest] < (1 - _WORTHWHILE) * times[usual] else usual


def _seconds(layer: LowRank, form: str, x: Tensor) -> float:
    layer.form = form
    started = time.perf_counter()
    _pass(layer, x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - started


def _pass(layer: LowRank, x: Tensor) -> None:
    inputs = [p for p in (x, *layer.parameters()) if p.requires_grad]
    y = layer.forward(x)  # type: ignore[operator]
    if inputs:
        torch.autograd.grad(y, inputs, torch.ones_like(y))


def _key(layer: LowRank, x: Tensor) -> str:
    """A hash of everything that a layer's time depends on."""
    core = None if layer.S is None else layer.S.ndim
    trained = tuple(p.requires_grad for p in layer.parameters())
    facts = [
        machine.name(x.device),
        torch.__version__,
        layer.shape,
        layer.rank,
        _forms_of(layer),
        core,
        trained,
    ]
    facts += [tuple(x.shape), x.stride(), x.dtype, x.requires_grad, torch.is_autocast_enabled(x.device.type)]
    if isinstance(layer, _CONVOLUTIONS):
        facts += [layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.padding_mode]
    if isinstance(layer, TRANSPOSED):
        facts += ["transposed", layer.output_padding]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _path() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification ignores relative paths, such as an unexpanded `~/cache`.
    return (root if root.is_absolute() else Path.home() / ".cache") / "condlr" / "forms.json"


def _read() -> dict[str, str]:
    """Earlier results; empty if the file cannot be read."""
    with suppress(OSError, ValueError, RuntimeError):
        content = json.loads(_path().read_text("utf-8"))
        if isinstance(content, dict):
            return content
    return {}


def _write(found: Mapping[str, str]) -> None:
    with suppress(OSError, RuntimeError):
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps({**_read(), **found}, indent=1).encode())
