"""The arithmetic of float32 tensors: strict, or with products in lower precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from condlr._support.errors import one_of

PRECISIONS = ("float32", "tf32", "bf16")


@contextmanager
def strict(device: torch.device) -> Iterator[None]:
    """IEEE float32 in the body: no autocast and no TF32."""
    with products("ieee"), torch.autocast(device.type, enabled=False):
        yield


def require(precision: str, device: torch.device) -> None:
    """Raise `ValueError` for an unknown precision, or one that `device` does not support."""
    one_of("precision", precision, PRECISIONS)
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision=tf32 is for CUDA devices; on {device.type} choose float32 or bf16")


@contextmanager
def training(model: nn.Module, precision: str, device: torch.device) -> Iterator[None]:
    """Run the forward and backward passes of `model` in `precision` in the body.

    `float32` is strict. `tf32` rounds the factors of matrix products and convolutions to 10 bits of mantissa,
    on GPUs that support it. `bf16` uses bfloat16 in the forward pass where PyTorch's autocast finds it safe;
    weights, gradients and logits are float32.

    Raises:
        ValueError: see `require`.
    """
    require(precision, device)
    with products("tf32" if precision == "tf32" else "ieee"):
        if precision != "bf16":
            yield
            return
        forward, own = model.forward, model.__dict__.get("forward")

        # Without a cache: the weights change in each step, and a graph must not record a cache.
        def in_bfloat16(*args: Any, **kwargs: Any) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
                return forward(*args, **kwargs).float()

        model.forward = in_bfloat16
        try:
            yield
        finally:
            del model.forward
            if own is not None:
                model.forward = own


@contextmanager
def products(kind: str) -> Iterator[None]:
    """Compute products and convolutions of float32 tensors as `ieee` or `tf32` in the body."""
    backends: Any = torch.backends
    families = backends.cudnn, backends.mkldnn
    single = backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv
    changed: list[tuple[Any, str]] = []
    try:
        # From the whole to its parts: what still differs then has a value of its own, and is not inherited
        for setting in (backends, *families, *single):
            if (before := setting.fp32_precision) != kind:
                changed.append((setting, before))
                setting.fp32_precision = kind
        yield
    finally:
        for setting, before in reversed(changed):
            setting.fp32_precision = before
