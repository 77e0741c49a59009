"""From a run's config to its data and its network."""

from contextlib import suppress

import torch
from torch import nn

from condlr._support.errors import UserError
from condlr._support.seeds import derive_seed
from condlr.data.base import Data
from condlr.factorization import low_rank_layers
from condlr.forms import set_forms
from condlr.models.base import standardized
from condlr.suite.config import RunConfig
from condlr.suite.runs import Run


def build(config: RunConfig, data: Data) -> nn.Module:
    """The initial network of a run, drawn from its seed alone."""
    torch.manual_seed(derive_seed(config.seed, "init"))
    try:
        dense = standardized(config.model.build(data.shape, data.classes), data.standard)
        model = config.method.apply(dense, config.scheme)
    except ValueError as error:
        raise UserError(str(error)) from error
    if config.scheme.decay is not None and not low_rank_layers(model):
        raise UserError("protocol.decay acts on low-rank layers, and this method makes none")
    return model


def load_network(run: Run, config: RunConfig, data: Data) -> nn.Module:
    """The trained network of a run, on the device of `data`, in eval mode."""
    model, weights = build(config, data), run.load_model()
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{run.directory}: model.safetensors does not fit config.yaml: {error}") from error
    with suppress(ValueError):  # run.json was edited; a form changes the result only by rounding
        set_forms(model, run.info.get("forms", {}))
    return model.to(data.test.pixels.device).eval()


def load_data(config: RunConfig, device: torch.device) -> Data:
    """The run's dataset on the device, with the held-out images split off."""
    data = config.dataset.load(config.data_root)
    data = data.shortened(config.dataset.train_images, config.dataset.test_images)
    data = data.hold_out(config.protocol.held_out, derive_seed(config.seed, "held_out"))
    if len(data.train) == 0:
        raise UserError(f"protocol.held_out={config.protocol.held_out:g} leaves no image to train on")
    return data.to(device)


def pick_device(name: str) -> torch.device:
    """The device for auto, cpu or cuda."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("device=cuda, but PyTorch finds no CUDA device here: use device=auto or cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")
