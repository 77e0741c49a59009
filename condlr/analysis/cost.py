"""The cost of a network in training and exported: counts of weights, operations and bytes."""

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

from condlr.adversarial import Adversarial
from condlr.analysis.base import Analysis, Start, Trained
from condlr.factorization import export, measure
from condlr.penalties.base import Penalty


@dataclass
class CountedCost(Analysis):
    """The cost of a network in training and exported, compared with the dense one, see `Cost`.

    The attack of adversarial training counts. A penalty's operations, computed once in a step, are divided by
    the images of its batch, and by its `every`. Decompositions, such as eigenvalues, are not counted.
    """

    title: ClassVar[str] = "Cost, counted"
    caption: ClassVar[str] = "What the networks cost, counted"
    legend: ClassVar[str] = (
        "In brackets: the part of the dense network's. Peaks are of a step, and of a forward pass, at batch "
        "{batch_size}. Where ranks change in training, they are those at its end."
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
    order: ClassVar[int] = 30

    @override
    def rows(self, trained: Trained) -> list[Mapping[str, Any]]:
        def counted(network: nn.Module, of: Start) -> Cost:
            counted = cost(network, trained.data.shape, trained.batch_size, of.optimizer)
            shape = counted.batch_size, *trained.data.shape
            added = penalty_flops(of.penalty, network, shape) if of.penalty else 0
            added += attack_flops(of.adversarial, network, shape) if of.adversarial else 0
            return replace(counted, train_flops=of.method.passes * counted.train_flops + added / shape[0])

        device = trained.data.test.pixels.device
        dense = counted(trained.dense_start.build().to(device), trained.dense_start)
        return [counted(trained.model, trained.start).as_dict(dense)]


@dataclass(frozen=True)
class Cost:
    r"""The cost of a network in training, and exported by `condlr.export`.

    Operations are additions and multiplications in matrix products and convolutions, without biases,
    activations, normalisation and pooling. For a layer with an n x m matrix whose output has p positions (1
    for a linear layer, height x width for a convolution; padding counts as image):

        layer                      forward, each image     forward, each step
        dense                      2 n m p
        U S V^T, factored          2 r (n + m) p           2 n r^2
        U S V^T, chained           2 r (n + m + r) p
        U S V^T, multiplied        2 n m p                 2 n r^2 + 2 n m r

    U V^T, or a diagonal S, does not have the product 2 n r^2, or 2 r^2 p. The backward pass costs twice the
    forward pass: each product A B has one product for the gradient of A and one for that of B. Only images
    need no gradient, which saves 2 n m p in the first layer, or 2 r m p in the factored forms; frozen weights
    save more. Work that a step does once is divided by the images of its batch. The exported network has
    no products of weights: 2 min(n m, r (n + m)) p in each layer.

    Attributes:
        batch_size: images in a batch; peaks, and operations done once in a step, depend on it.
        train_weights: of linear and convolution layers, see `condlr.size.Size.trained`.
        train_parameters: all parameters, including biases and normalisation.
        train_flops: of a forward and backward pass, for each image.
        train_state_bytes: parameters and buffers, their gradients, and the optimiser's state.
        train_peak_bytes: the peak memory of a step: parameters, buffers, the optimiser's state, images,
            labels, gradients and activations.
        deploy_weights: as `train_weights`, of the exported network.
        deploy_parameters: as `train_parameters`.
        deploy_flops: of a forward pass, for each image.
        deploy_peak_bytes: the peak memory of a forward pass: parameters, buffers, images and activations.
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
        """A row of a CSV; with the cost of the dense network also the ratios to it, `train_flops_ratio` etc.

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
    """SGD with momentum, which most methods use: one value of state for each weight."""
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.3)


def cost(
    model: nn.Module,
    shape: tuple[int, ...],
    batch_size: int = 128,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = momentum_sgd,
) -> Cost:
    """Count the cost of `model` in training and exported.

    Two steps with cross-entropy and two forward passes are run on random images and on copies of the network,
    so the network and the random state do not change. Layers are counted in their current forms, see
    `condlr.set_forms`. A step has one forward and backward pass; for a method with more passes (DLRT: two),
    multiply `train_flops`.

    Args:
        model: classifies images; with or without low-rank layers.
        shape: of an image.
        batch_size: images in a batch.
        optimizer: makes an optimiser for a network. Its hooks, such as a constraint, count for the peak.

    Raises:
        ValueError: all parameters are frozen, or there are none.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        >>> counted = cost(net, (1, 28, 28), batch_size=4)
        >>> counted.train_parameters, counted.train_flops, counted.deploy_flops
        (7850, 31360.0, 15680.0)
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("this network has no trainable parameter")
    like = next(model.parameters())
    size = measure(model)
    # Images, dropout and the initialisation of exported layers draw random numbers
    with _random_state_kept(model):
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


def _random_state_kept(model: nn.Module) -> AbstractContextManager[None]:
    """Of the CPU and of the network's device."""
    like = next(model.parameters())
    return torch.random.fork_rng([like.get_device()] if like.is_cuda else [])


def penalty_flops(penalty: Penalty, model: nn.Module, shape: tuple[int, ...]) -> float:
    """Operations of a penalty's value and gradient, for each step of the training.

    Args:
        penalty, model: of the training.
        shape: of a batch of images, on which some penalties depend.
    """
    trained, own = copy.deepcopy(model), copy.copy(penalty)
    like = next(trained.parameters())
    with _random_state_kept(model):  # some penalties draw a start
        term = own.alone(trained, torch.rand(shape, device=like.device, dtype=like.dtype))
        return flops(lambda: term().backward()) / penalty.every


def attack_flops(attack: Adversarial, model: nn.Module, shape: tuple[int, ...]) -> float:
    """Operations of adversarial training's attack on a batch of images of this shape."""
    attacked = copy.deepcopy(model).requires_grad_(False).eval()
    like = next(attacked.parameters())
    images = torch.zeros(shape, device=like.device, dtype=like.dtype, requires_grad=True)
    return attack.gradients * attack.share * flops(lambda: attacked(images).sum().backward())


def flops(work: Callable[[], object]) -> int:
    """Operations of the matrix products and convolutions in `work`, see `Cost`."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def peak_bytes(work: Callable[[], object], held: Iterable[Tensor], device: torch.device) -> int:
    """The peak memory during `work`, including the tensors `held` before.

    On a CPU it counts the bytes of tensors, without the internal memory of kernels. On CUDA it includes that,
    with sizes rounded up as PyTorch allocates them; the device's peak statistics are reset.
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
    """The tensors that stay between steps: parameters, gradients, buffers and the optimiser's state."""
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    yield from model.buffers()
    for values in optimizer.state.values():
        yield from (value for value in values.values() if torch.is_tensor(value))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of living tensors that were made by operations in its context.

    Attributes:
        level: the present number.
        peak: the largest number so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.level = self.peak = 0
        self._known: set[int] = set()

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Views and in-place results share the memory of an argument, and are not counted.
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
    """Operations of a forward and backward pass, bytes of the state, and peak bytes of a step."""
    optimizer = make_optimizer(model)
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)

    def pass_through() -> None:
        F.cross_entropy(model(images), labels).backward()

    def step() -> None:
        pass_through()
        optimizer.step()

    with torch.enable_grad():
        operations = flops(pass_through)
        optimizer.step()  # the first step makes the optimiser's state
        kept = sum(tensor.nbytes for tensor in state(model, optimizer))
        optimizer.zero_grad()
        peak = peak_bytes(step, [*state(model, optimizer), images, labels], images.device)
    return operations, kept, peak


@torch.no_grad()
def _deployed(model: nn.Module, images: Tensor) -> tuple[int, int]:
    operations = flops(lambda: model(images))
    held = [*model.parameters(), *model.buffers(), images]
    return operations, peak_bytes(lambda: model(images), held, images.device)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
