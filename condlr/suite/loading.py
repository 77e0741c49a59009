"""From a run's config to its data and its network."""

from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from condlr._support.errors import UserError
from condlr._support.seeds import derive_seed
from condlr.data.base import Data
from condlr.exporting import unfactorize
from condlr.factorization import low_rank_layers
from condlr.forms import set_forms
from condlr.models.base import standardized
from condlr.suite.config import RunConfig, check
from condlr.suite.runs import Run


def build(config: RunConfig, data: Data, begun: bool = True) -> nn.Module:
    """The initial network of a run, drawn from its seed, or made from the run that it starts from.

    Args:
        begun: whether to look at the weights of that run; where others replace them, it may be gone.
    """
    torch.manual_seed(derive_seed(config.seed, "init"))
    try:
        dense = standardized(config.model.build(data.shape, data.classes), data.standard)
        if begun and config.origin is not None:
            _begin(dense, Path(config.origin.run), data)
        model = config.method.apply(dense, config.scheme)
    except ValueError as error:
        raise UserError(str(error)) from error
    if config.scheme.decay is not None and not low_rank_layers(model):
        raise UserError("protocol.decay acts on low-rank layers, and this method makes none")
    return model


def load_network(run: Run, config: RunConfig, data: Data) -> nn.Module:
    """The trained network of a run, on the device of `data`, in eval mode."""
    model, weights = build(config, data, begun=False), run.load_model()
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{run.directory}: model.safetensors does not fit config.yaml: {error}") from error
    with suppress(ValueError):  # run.json was edited; a form changes the result only by rounding
        set_forms(model, run.info.get("forms", {}))
    return model.to(data.test.pixels.device).eval()


def _begin(dense: nn.Module, directory: Path, data: Data) -> None:
    """Give a dense network the weights of a trained one."""
    run = Run(directory)
    try:
        network = load_network(run, check(run.read_config()), data)
        dense.load_state_dict((unfactorize(network) if low_rank_layers(network) else network).state_dict())
    except UserError as error:
        raise UserError(f"start: {error}") from error
    except RuntimeError as error:
        raise UserError(f"start: the network of {directory} is another one: {error}") from error


def load_data(config: RunConfig, device: torch.device) -> Data:
    """The run's dataset on the device, with the held-out images split off."""
    data = config.dataset.load(config.data_root)
    data = data.shortened(config.dataset.train_images, config.dataset.test_images)
    data = data.hold_out(config.protocol.held_out, derive_seed(config.seed, "held_out"))
    if len(data.train) == 0:
        raise UserError(f"protocol.held_out={config.protocol.held_out:g} leaves no image to train on")
    if config.protocol.stop_at is not None and data.held_out is None:
        held_out = f"protocol.held_out={config.protocol.held_out:g}"
        raise UserError(f"{held_out} of {len(data.train)} images is none, and protocol.stop_at needs some")
    return data.to(device)


def pick_device(name: str) -> torch.device:
    """The device for auto, cpu or cuda."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("device=cuda, but PyTorch finds no CUDA device here: use device=auto or cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")
