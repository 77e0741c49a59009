"""The activations of a trained network on many images."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from condlr.activations import INPUT, short_name, whole_name
from condlr.analysis._layers import argument, blank, first_inputs
from condlr.data.base import Images
from condlr.evaluation import evaluating
from condlr.layers import LowRank

# Images in one pass.
_BATCH = 500


def penultimate(model: nn.Module, shape: Sequence[int]) -> str:
    """The name of the activations before the last linear layer: `fc.input`.

    Raises:
        ValueError: the network has no linear layer.
    """
    called = first_inputs(model, blank(model, shape), (nn.Linear, LowRank))
    linear = [name for name, x in called.items() if x.ndim == 2]
    if not linear:
        raise ValueError("the network has no linear layer: name the modules in `layers`")
    return f"{linear[-1]}{INPUT}"


def chosen(model: nn.Module, layers: Sequence[str], shape: Sequence[int]) -> list[str]:
    """The names of `layers` as tables have them; of none `penultimate`. However they are typed, each is once.

    Raises:
        ValueError: see `condlr.activations.whole_name`, or `penultimate`.
    """
    return [*dict.fromkeys(short_name(model, name) for name in layers or [penultimate(model, shape)])]


@torch.no_grad()
def activations(model: nn.Module, images: Images | Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """(n, m) for each name: the module's output, or the input of `name.input`, flattened, on the CPU.

    Args:
        model: any network; it is run in eval mode.
        images: or float pixels, (n, ...).
        names: see `condlr.activations.whole_name`.

    Raises:
        ValueError: see `condlr.activations.whole_name`; or the activations are not a tensor.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks, modules = [], dict(model.named_modules())
    for name in names:
        whole = whole_name(model, name)
        note = partial(_note, name, parts[name])
        if whole in modules:
            hooks.append(modules[whole].register_forward_hook(lambda *given, note=note: note(given[-1])))
        else:
            module = modules[whole.removesuffix(INPUT)]
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _, *given, note=note: note(argument(*given)), with_kwargs=True
                )
            )
    try:
        with evaluating(model):
            batches = images.split(_BATCH) if isinstance(images, Tensor) else _pixels(images)
            for pixels in batches:
                model(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    if silent := [name for name, found in parts.items() if not found]:
        raise ValueError(f"layers: the forward pass does not call {', '.join(silent)}")
    return {name: torch.cat(found) for name, found in parts.items()}


def _pixels(images: Images) -> Iterator[Tensor]:
    return (pixels for pixels, _ in images.batches(_BATCH))


def _note(name: str, parts: list[Tensor], value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"layers: {name} is a {type(value).__name__}, not a tensor")
    # A copy: what follows may change the value in place
    parts.append(value.detach().flatten(1).to("cpu", torch.float32, copy=True))
