"""The arithmetic of float32 tensors: strict, or with products in fewer bits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PRECISIONS = ("float32", "tf32", "bf16")


@contextmanager
def strict(device: torch.device) -> Iterator[None]:
    """Float32 as IEEE has it in the body: no autocast and no TF32, whatever holds around it."""
    with products("ieee", device), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def products(kind: str, device: torch.device) -> Iterator[None]:
    """How products and convolutions of float32 tensors on `device` are computed: `ieee` or `tf32`."""
    backends: Any = torch.backends
    if device.type == "cuda":
        settings = backends.cuda.matmul, backends.cudnn.conv
    else:
        settings = backends.mkldnn.matmul, backends.mkldnn.conv
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = kind
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
