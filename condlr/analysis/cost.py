"""What a network costs in training and exported, counted rather than timed: weights, operations, memory."""

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

from condlr.analysis.base import Analysis, Start, Trained
from condlr.factorization import export, measure


@dataclass
class CountedCost(Analysis):
    """What a network costs in training and exported, beside the dense one, see `Cost`."""

    title: ClassVar[str] = "Cost, counted"
    caption: ClassVar[str] = "What the networks cost, counted"
    legend: ClassVar[str] = (
        "In brackets: the part of the dense network's. Peaks are of a step, and of a forward pass, at batch "
        "{batch_size}."
    )
    keys: ClassVar[tuple[str, ...]] = ("batch_size",)
    columns: ClassVar[Mapping[str, str]] = {
        "weights": "{train_weights} ({train_weights_ratio:.2f})",
        "FLOPs an image": "{train_flops} ({train_flops_ratio:.2f})",
        "state, bytes": "{train_state_bytes} ({train_state_bytes_ratio:.2f})",
        "peak, bytes": "{train_peak_bytes} ({train_peak_bytes_ratio:.2f})",
        "exported: weights": "{deploy_weights} ({deploy_weights_ratio:.2f})",
        "exported: FLOPs an image": "{deploy_flops} ({deploy_flops_ratio:.2f})",
        "exported: peak, bytes": "{deploy_peak_bytes} ({deploy_peak_bytes_ratio:.2f})",
    }
    place: ClassVar[int] = 30

    @override
    def rows(self, trained: Trained) -> list[Mapping[str, Any]]:
        def counted(network: nn.Module, of: Start) -> Cost:
            counted = cost(network, trained.data.shape, trained.batch_size, of.optimizer)
            return replace(counted, train_flops=of.method.passes * counted.train_flops)

        device = trained.data.test.pixels.device
        dense = counted(trained.dense_start.build().to(device), trained.dense_start)
        return [counted(trained.model, trained.start).as_dict(dense)]


@dataclass(frozen=True)
class Cost:
    r"""What a network costs in training, as it is, and exported (`condlr.export`).

    Operations are additions and multiplications of matrix products and convolutions, biases, activations,
    normalisation and pooling left out. For a layer with an n x m matrix whose output has p positions (1 for a
    linear layer, height x width for a convolution, padding counted as if it were image):

        layer                      forward, each image     forward, each step
        dense                      2 n m p
        U S V^T, factored          2 r (n + m) p           2 n r^2
        U S V^T, chained           2 r (n + m + r) p
        U S V^T, multiplied        2 n m p                 2 n r^2 + 2 n m r

    A pair U V^T, or a diagonal S, lacks the product 2 n r^2, or 2 r^2 p. The backward pass takes twice the
    forward pass: each product A B is followed by one for the gradient of A and one for that of B. Only the
    images need no gradient, which saves the first layer 2 n m p, or 2 r m p in the factored forms; frozen
    weights save more. What a step does once is shared out among the images of its batch. The exported network
    has no products of weights: 2 min(n m, r (n + m)) p in each layer.

    Attributes:
        batch_size: images in a batch, on which peaks depend, and operations where products belong to a step.
        train_weights: of linear and convolution layers, see `condlr.factorization.Size.trained`.
        train_parameters: all parameters, biases and normalisation included.
        train_flops: of a forward and backward pass, for each image.
        train_state_bytes: parameters and buffers, their gradients, and the optimiser's state.
        train_peak_bytes: the most that is held at one time of a step: parameters, buffers, the optimiser's
            state, images, labels, and what the step makes, gradients and activations.
        deploy_weights: as `train_weights`, of the exported network.
        deploy_parameters: as `train_parameters`.
        deploy_flops: of a forward pass, for each image.
        deploy_peak_bytes: the most that is held at one time of a forward pass: parameters, buffers, images,
            and what the pass makes.
    """

    batch_size: int
    train_weights: int
    train_parameters: int
    train_flops: float
    train_state_bytes: int
    train_peak_bytes: int
    deploy_weights: int
    deploy_parameters: int
    deploy_flops: float
    deploy_peak_bytes: int

    def as_dict(self, dense: "Cost | None" = None) -> dict[str, float]:
        """A line of a CSV; given the cost of the dense network also ratios to it, `train_flops_ratio` etc.

        Raises:
            ValueError: `dense` is for another batch size.
        """
        line = asdict(self)
        if dense is None:
            return line
        if dense.batch_size != self.batch_size:
            raise ValueError(f"batch_size is {self.batch_size} here and {dense.batch_size} for dense")
        counted = [field.name for field in fields(self) if field.name != "batch_size"]
        return line | {f"{name}_ratio": line[name] / getattr(dense, name) for name in counted}


def momentum_sgd(model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum, one value of state for each weight: what most methods train with."""
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.3)


def cost(
    model: nn.Module,
    shape: tuple[int, ...],
    batch_size: int = 128,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = momentum_sgd,
) -> Cost:
    """Count what `model` costs in training and exported.

    Two steps with cross-entropy and two forward passes are really taken, on random images and on copies: the
    network, its gradients, buffers and modes, and the random state are not touched. Layers are counted in the
    forms they have, see `condlr.set_forms`. A step is one forward and backward pass and the
    optimiser's; a method that takes more passes (DLRT: two) costs so many times `train_flops`.

    Args:
        model: classifies images; with low-rank layers or without.
        shape: of an image.
        batch_size: images in a batch.
        optimizer: makes one, given a network. The steps of its hooks, a constraint, count for the peak.

    Raises:
        ValueError: all parameters are frozen, or there are none.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        >>> counted = cost(net, (1, 28, 28), batch_size=4)
        >>> counted.train_parameters, counted.train_flops, counted.deploy_flops
        (7850, 31360.0, 15680.0)
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("this network has no parameter that is trained")
    like = next(model.parameters())
    size = measure(model)
    # Images, dropout, and the start of the exported layers, which is overwritten, are drawn.
    with torch.random.fork_rng([like.get_device()] if like.is_cuda else []):
        images = torch.rand(batch_size, *shape, device=like.device, dtype=like.dtype)
        train_flops, train_state, train_peak = _in_training(copy.deepcopy(model).train(), images, optimizer)
        plain = export(model).eval()
        deploy_flops, deploy_peak = _deployed(plain, images)
    return Cost(
        batch_size=batch_size,
        train_weights=size.trained,
        train_parameters=_parameters(model),
        train_flops=train_flops / batch_size,
        train_state_bytes=train_state,
        train_peak_bytes=train_peak,
        deploy_weights=size.deployed,
        deploy_parameters=_parameters(plain),
        deploy_flops=deploy_flops / batch_size,
        deploy_peak_bytes=deploy_peak,
    )


def flops(work: Callable[[], object]) -> int:
    """Operations of the matrix products and convolutions in `work`, see `Cost`."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def peak_bytes(work: Callable[[], object], held: Iterable[Tensor], device: torch.device) -> int:
    """The most bytes that are held during `work`: what is held before, and what it makes.

    On a CPU those are the bytes of tensors; what a kernel takes for itself is not seen. On CUDA it is, and
    sizes are rounded up as PyTorch allocates them; the device's peak statistics are reset.
    """
    before = sum(tensor.nbytes for tensor in held)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return before + torch.cuda.max_memory_allocated(device) - allocated
    with LiveBytes() as live:
        work()
    return before + live.peak


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """What stays from one step to the next: parameters, gradients, buffers, and the optimiser's state."""
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    yield from model.buffers()
    for values in optimizer.state.values():
        yield from (value for value in values.values() if torch.is_tensor(value))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations in its context make, while they live.

    Attributes:
        level: what lives now.
        peak: the most that lived at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.level = self.peak = 0
        self._known: set[int] = set()

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A view, or what is changed in place, is not made here: its memory is that of an argument.
        given = {storage.data_ptr() for storage in _storages((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for storage in _storages(made):
            if storage.data_ptr() not in given:
                self._add(storage)
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        address = storage.data_ptr()
        if address in self._known or not storage.nbytes():
            return
        self._known.add(address)
        self.level += storage.nbytes()
        self.peak = max(self.peak, self.level)
        weakref.finalize(storage, self._remove, address, storage.nbytes())

    def _remove(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.level -= size


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _in_training(
    model: nn.Module, images: Tensor, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
) -> tuple[int, int, int]:
    """Operations of a pass, bytes of the state, and bytes at the peak of a step."""
    optimizer = make_optimizer(model)
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)

    def pass_through() -> None:
        F.cross_entropy(model(images), labels).backward()

    def step() -> None:
        pass_through()
        optimizer.step()

    with torch.enable_grad():
        operations = flops(pass_through)
        optimizer.step()  # the first makes the optimiser's state
        kept = sum(tensor.nbytes for tensor in state(model, optimizer))
        optimizer.zero_grad()
        peak = peak_bytes(step, [*state(model, optimizer), images, labels], images.device)
    return operations, kept, peak


@torch.no_grad()
def _deployed(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """Operations of a forward pass, and bytes at its peak."""
    operations = flops(lambda: model(images))
    held = [*model.parameters(), *model.buffers(), images]
    return operations, peak_bytes(lambda: model(images), held, images.device)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
