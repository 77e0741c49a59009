"""Low-rank representations: virtual layers that pull activations into an affine subspace.

    extra = condlr.low_rank_activations(model, {"layer4": 10})
    ...
    loss = F.cross_entropy(model(images), labels) + extra()
    ...
    plain = condlr.export(model)          # without the virtual layers

The LR-layer of Sanyal, Kanade, Torr and Dokania, "Robustness via Deep Low-Rank Representations" (arXiv
1804.07090). The network forwards its activations unchanged, so nothing of the layer is left at test time.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from numbers import Integral
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr._support.errors import in_range, one_of
from condlr._support.inputs import require_module, require_names
from condlr._support.precision import strict
from condlr._support.seeds import derive_seed
from condlr.manifolds.truncation import WAYS, truncate

SUBSPACES = (*WAYS, "pca")
# Up to so many dimensions W is a matrix (16 MB in float32); beyond it is a product of two thin ones.
MATRIX_LIMIT = 2048
# Steps between two truncations of W.
PERIOD = 10
# The largest learning rate of W and b: with momentum 0.9 they diverge from 0.4 on.
FASTEST = 0.3
# The largest norm of P and Q. At the minimum of L_c P Q^T is a projector, of norm 1.
LONGEST = 2.0
# Weight of the past in the running mean and covariance of `pca`.
MEMORY = 0.99

_NAME = "low_rank_activations"
INPUT = ".input"


class VirtualLayer(nn.Module):
    r"""The subspace of one layer's activations.

    For a batch of activations a in R^m, the rows of A (n, m), with W (m, m) of rank r and b in R^m,

        L_c = 1/n sum_i ||W^T (a_i + b) - (a_i + b)||^2,      L_n = 1/n sum_i |1 - ||a_i|| |

    L_n keeps A and b from shrinking to 0. The gradients with respect to A flow into the network. W and b take
    a step of gradient descent of their own at each call, with momentum, along

        dL_c/dW = 2/n (A + b)^T R,    dL_c/db = 2/n sum_i (R (W^T - I))_i,    R = (A + b) W - (A + b),

    divided by max(1, 1/n ||A + b||^2). The curvature of L_c in W is at most twice that mean, so that no batch
    makes the step too long, at a learning rate of at most `FASTEST`; where ||a|| = 1, as L_n wants it, it is
    plain gradient descent. Every tenth step W is truncated to rank r.

    Two deviations from the paper. Beyond 2048 dimensions W is kept as P Q^T, P and Q of r columns, which need
    no truncation; their norms are held at 2 at most, which bounds their mutual growth. And W and b have an
    optimiser of their own, so that any training loop serves.

    Without gradients, as in a validation, nothing is learned.

    W starts as the orthogonal projector on r random directions, b at 0. All tensors are buffers, which a
    state dict has; they are made at the first batch, when m is known.

    Args:
        rank: r.
        subspace: how W gets rank r: `svd`, `randomised`, `nystrom` (`condlr.manifolds.truncation`), or `pca`,
            the closed form that minimises L_c: every tenth step W becomes the orthogonal projector on the r
            leading principal components of a running covariance, b minus the running mean.
        lr, momentum: of W and b; `lr` may be changed at any time, and counts as `FASTEST` where it is larger.
        seed: of random directions and samples.
        name: of the activations; a saved state knows whose it is.
    """

    # What a step changes, and what `pca` keeps instead
    _MOVED, _KEPT = ("W", "P", "Q", "b"), ("mean", "covariance")

    def __init__(self, rank: int, subspace: str, lr: float, momentum: float, seed: int, name: str = ""):
        super().__init__()
        in_range("rank", rank, 1, math.inf)
        one_of("subspace", subspace, SUBSPACES)
        in_range("lr", lr, 0, math.inf)
        in_range("momentum", momentum, 0, 1, half_open=True)
        self.rank, self.subspace, self.lr, self.momentum, self.seed = rank, subspace, lr, momentum, seed
        for key in (*self._MOVED, *(f"speed_{key}" for key in self._MOVED), *self._KEPT):
            self.register_buffer(key, None)
        self.last: Tensor | None
        self.register_buffer("last", None)
        self.settings: Tensor
        known = [rank, SUBSPACES.index(subspace), crc32(name.encode())]
        self.register_buffer("settings", torch.tensor(known, device="cpu"))
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.taken = 0  # the same as a number, which a GPU need not be asked for
        self.noted: Tensor | None = None
        self.graded = True  # whether gradients were on as they were noted

    @override
    def __getstate__(self) -> dict[str, Any]:
        # A copy of the network has a forward pass of its own to wait for
        return vars(self) | {"noted": None}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over the buffers of another training.

        Raises:
            ValueError: it is of other activations, or has another subspace or rank.
        """
        found = state.get("settings")  # not in those of an older condlr
        if found is not None and found.tolist() != self.settings.tolist():
            rank, subspace, _ = found.tolist()
            raise ValueError(
                "the saved low-rank activations are of another module, subspace or rank: "
                f"{SUBSPACES[subspace]}, rank {rank}; these are {self.subspace}, rank {self.rank}"
            )
        if "b" in state and ("covariance" in state) != (self.subspace == "pca"):
            raise ValueError(f"the saved low-rank activations have another subspace than {self.subspace}")
        if "P" in state and state["P"].shape[1] != min(self.rank, len(state["P"])):
            raise ValueError(f"the saved low-rank activations have the rank {state['P'].shape[1]}")
        for name in {*self._buffers} - {"settings"}:
            found = state.get(name)
            setattr(self, name, None if found is None else found.detach().clone())
        self.taken = int(self.steps)

    def note(self, activations: Tensor) -> None:
        """Keep a batch's activations for the next call."""
        self.noted, self.graded = activations, torch.is_grad_enabled()

    @override
    def forward(self) -> tuple[Tensor, Tensor]:
        """L_c and L_n of the activations noted last, which are forgotten; W and b take their step."""
        if self.noted is None:
            raise RuntimeError(
                "no activations: call the network in training mode before its extra loss, and compile it "
                "only after low_rank_activations"
            )
        A, self.noted = self.noted, None
        if not len(A):  # nothing to learn from
            return A.sum(), A.sum()
        A = A.flatten(1)
        learns = torch.is_grad_enabled()
        if learns and not self.graded:
            raise RuntimeError(
                "the activations were computed without gradients, so the network cannot learn from their "
                "loss: say checkpoint(..., use_reentrant=False), or torch.no_grad() around the loss, too"
            )
        with strict(A.device):
            A = A.float() if A.dtype in (torch.float16, torch.bfloat16) else A
            if self.b is None:
                self._start(A)
            assert self.b is not None
            if (self.b.device, self.b.dtype) != (A.device, A.dtype):  # the network was moved, or loaded
                self.to(A.device, A.dtype)
            if A.shape[1] != len(self.b):
                raise ValueError(f"activations of {A.shape[1]} dimensions, after others of {len(self.b)}")
            if learns and self.subspace == "pca":
                self._follow(A.detach())
            # Copies, for the step below changes the originals, and the backward pass needs these values
            moved, maps = A + self.b.clone(), [matrix.clone() for matrix in self._maps()]
            R = _through(moved, maps) - moved
            losses = R.square().sum() / len(A), (1 - A.norm(dim=1)).abs().mean()
            if learns:
                self.last = torch.stack(losses).detach()
                if self.subspace != "pca":
                    self._step(moved.detach(), R.detach())
                self.taken += 1
                self.steps += 1
            return losses

    def _maps(self) -> list[Tensor]:
        """The factors of W, from the left."""
        return [self.W] if self.W is not None else [self.P, self.Q.mT]  # type: ignore[list-item,union-attr]

    @torch.inference_mode(False)
    def _start(self, A: Tensor) -> None:
        m = A.shape[1]
        if m > MATRIX_LIMIT and self.subspace == "pca":
            raise ValueError(f"subspace=pca is for at most {MATRIX_LIMIT} dimensions; these are {m}")
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "directions"))
        directions = torch.randn(m, min(self.rank, m), generator=generator, device="cpu", dtype=torch.float64)
        Q = torch.linalg.qr(directions).Q.to(A)
        self.b = A.new_zeros(m)
        if m <= MATRIX_LIMIT:
            self.W = Q @ Q.mT
        else:
            self.P, self.Q = Q, Q.clone()
        if self.subspace == "pca":
            self.mean, self.covariance = A.new_zeros(m), A.new_zeros(m, m)
            return
        for name in self._MOVED:
            moving = getattr(self, name)
            setattr(self, f"speed_{name}", None if moving is None else torch.zeros_like(moving))

    @torch.no_grad()
    def _step(self, moved: Tensor, R: Tensor) -> None:
        """Gradient descent on W (or P and Q) and b, and the truncation where it is due."""
        if self.W is not None:
            gradients = {"W": moved.mT @ R, "b": (R @ self.W.mT - R).sum(0)}
        else:
            assert self.P is not None and self.Q is not None
            seen = R @ self.Q
            gradients = {
                "P": moved.mT @ seen, "Q": R.mT @ (moved @ self.P), "b": (seen @ self.P.mT - R).sum(0)
            }  # fmt: skip
        scale = 2 / len(moved) / (moved.square().sum() / len(moved)).clamp_min(1)
        finite = scale.isfinite() & R.square().sum().isfinite()  # else the batch teaches nothing
        for name, gradient in gradients.items():
            speed = getattr(self, f"speed_{name}")
            speed.mul_(self.momentum).add_(torch.where(finite, gradient * scale, 0))
            getattr(self, name).sub_(min(self.lr, FASTEST) * speed)
        for name in ("P", "Q"):
            if (factor := getattr(self, name)) is not None:
                _hold(factor, getattr(self, f"speed_{name}"))
        if self.W is not None and (self.taken + 1) % PERIOD == 0:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "truncation", self.taken))
            self.W.copy_(truncate(self.W, self.rank, self.subspace, generator))

    @torch.no_grad()
    def _follow(self, A: Tensor) -> None:
        """Renew the running mean and covariance, and from them W and b where that is due."""
        assert self.mean is not None and self.covariance is not None
        assert self.W is not None and self.b is not None
        # The first finite batch counts whole
        share = torch.where(self.covariance.any() | self.mean.any(), 1 - MEMORY, 1.0).to(A)
        finite = A.square().sum().isfinite()  # else the batch teaches nothing
        self.mean.copy_(torch.where(finite, self.mean.lerp(A.mean(0), share), self.mean))
        centred = A - self.mean
        spread = self.covariance.lerp(centred.mT @ centred / len(A), share)
        self.covariance.copy_(torch.where(finite, spread, self.covariance))
        if self.taken % PERIOD == 0:
            leading = torch.linalg.eigh(self.covariance).eigenvectors[:, -self.rank :]
            self.W.copy_(leading @ leading.mT)
            self.b.copy_(-self.mean)


class LowRankActivations(nn.Module):
    """The virtual layers of a network; a call is their loss, projection sum L_c + norm sum L_n.

    Attributes:
        layers: a `VirtualLayer` for each.
        projection, norm: the weights of the two losses; 1 in the paper.
    """

    def __init__(self, layers: Mapping[str, VirtualLayer], projection: float, norm: float):
        super().__init__()
        in_range("projection", projection, 0, math.inf)
        in_range("norm", norm, 0, math.inf)
        self.layers = nn.ModuleList(layers.values())
        self.projection, self.norm = projection, norm

    @property
    def last(self) -> float | None:
        """The loss of the last call that learned, or None; it is part of the state."""
        found = [layer.last for layer in self.layers]
        if any(losses is None for losses in found):
            return None
        near, unit = torch.stack(found).sum(0).tolist()  # type: ignore[arg-type]
        return self.projection * near + self.norm * unit

    @property
    def lr(self) -> float:
        """Of W and b in all layers."""
        return self.layers[0].lr  # type: ignore[return-value]

    @lr.setter
    def lr(self, value: float) -> None:
        in_range("lr", value, 0, math.inf)
        for layer in self.layers:
            assert isinstance(layer, VirtualLayer)
            layer.lr = value

    @override
    def forward(self) -> Tensor:
        """The loss of the last forward pass in training mode, to be added to the network's own.

        Raises:
            RuntimeError: there was none since the last call.
        """
        return torch.stack(self.terms()).sum()

    def terms(self) -> list[Tensor]:
        """The loss of each layer."""
        losses = [layer() for layer in self.layers]
        return [self.projection * near + self.norm * unit for near, unit in losses]


class _Tap:
    """A hook that gives a layer's activations in training to their virtual layer."""

    def __init__(self, name: str, layer: VirtualLayer, of_input: bool = False):
        self.name, self.layer, self.of_input = name, layer, of_input

    def __call__(self, module: nn.Module, given: tuple[Any, ...], last: Any = None) -> None:
        """`last` is the output; of a hook before the layer, the inputs given by keyword."""
        if not module.training:
            return
        activations = next(iter((*given, *last.values())), None) if self.of_input else last
        if not isinstance(activations, Tensor):
            raise TypeError(f"{self.name} is a {type(activations).__name__}, not a tensor")
        if activations.ndim < 2:
            raise ValueError(
                f"{self.name} has the shape {tuple(activations.shape)}: low-rank activations are (n, ...)"
            )
        self.layer.note(activations.clone())  # what follows may change it in place


class _Saved:
    """A hook that adds the state of virtual layers to a network's state dict."""

    def __init__(self, extra: LowRankActivations):
        self.extra = extra

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        state |= {f"{prefix}{_NAME}.{key}": value for key, value in self.extra.state_dict().items()}


class _Loaded(_Saved):
    """A hook that takes it from there; a state dict without it changes nothing."""

    @override
    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for number, layer in enumerate(self.extra.layers):
            assert isinstance(layer, VirtualLayer)
            own = f"{prefix}{_NAME}.layers.{number}."
            if found := {key.removeprefix(own): state.pop(key) for key in [*state] if key.startswith(own)}:
                layer.load(found)


def _is_whole(rank: object) -> bool:
    return isinstance(rank, Integral) and not isinstance(rank, bool)


def low_rank_activations(
    model: nn.Module,
    ranks: Mapping[str, int],
    *,
    projection: float = 1.0,
    norm: float = 1.0,
    subspace: str = "svd",
    lr: float = 0.1,
    momentum: float = 0.9,
    seed: int = 0,
) -> LowRankActivations:
    """Add LR-layers to a network; the returned object is the loss to add to its own, `loss + extra()`.

    The layers are virtual: they see the activations of forward passes in training mode, and change none. The
    state dict of the network has their tensors (`low_rank_activations.*`), so that a training that is resumed
    goes on with the same bits. `condlr.export` leaves them out, and `remove` takes them off the network. With
    several processes (DistributedDataParallel), each has subspaces of its own, from its part of the images.

    Args:
        model: any network.
        ranks: r of each of the activations. They have the name of the module whose output they are, or
            `name.input` for the input of a module. All dimensions but the first are one vector.
        projection, norm: the weights of L_c and L_n, see `VirtualLayer`. The paper has 1. Activations much
            longer than 1, such as the output of a convolution without normalisation, need less.
        subspace, lr, momentum, seed: see `VirtualLayer`.

    Raises:
        ValueError: no such module, no rank, or the network has such layers already.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> extra = low_rank_activations(net, {"1": 3})
        >>> loss = net(torch.randn(5, 8)).square().mean() + extra()
    """
    require_module("low_rank_activations", model)
    if not isinstance(ranks, Mapping) or not all(map(_is_whole, ranks.values())):
        raise ValueError(f"ranks are whole numbers by the names of activations, {{'1': 3}}; got {ranks!r}")
    require_names("ranks", ranks, of="modules")
    if any(isinstance(hook, _Saved) for hook in model._state_dict_hooks.values()):
        raise ValueError("the network has low-rank activations: condlr.activations.remove(model) first")
    if not ranks:
        raise ValueError("ranks is empty: name at least one module")
    modules = {name: module for name, module in model.named_modules() if name}
    for name in ranks:
        if name not in modules and name.removesuffix(INPUT) not in modules:
            raise ValueError(f"ranks: the network has no module {name!r}; it has {', '.join(modules)}")
    layers = {
        name: VirtualLayer(rank, subspace, lr, momentum, derive_seed(seed, name), name)
        for name, rank in ranks.items()
    }
    extra = LowRankActivations(layers, projection, norm)
    for name, layer in layers.items():
        if name in modules:
            modules[name].register_forward_hook(_Tap(f"the output of {name}", layer))
        else:
            place = name.removesuffix(INPUT)
            tap = _Tap(f"the input of {place}", layer, of_input=True)
            modules[place].register_forward_pre_hook(tap, with_kwargs=True)
    # Not a submodule: a network may call all that it has, as nn.Sequential does
    model.register_state_dict_post_hook(_Saved(extra))
    model.register_load_state_dict_pre_hook(_Loaded(extra))
    return extra


def whole_name(model: nn.Module, name: str) -> str:
    """The full name of the one module whose name ends so, with `.input` if `name` has it.

    Raises:
        ValueError: there is none, or several.
    """
    place = name.removesuffix(INPUT)
    names = [other for other, _ in model.named_modules() if other]
    if name in names:
        return name
    found = [place] if place in names else [other for other in names if other.endswith(f".{place}")]
    if len(found) != 1:
        which = f"several of {', '.join(found)}" if found else f"none of {', '.join(names)}"
        raise ValueError(f"layers: {place!r} names {which}")
    return found[0] + name.removeprefix(place)


def short_name(model: nn.Module, name: str) -> str:
    """The shortest name by which `whole_name` finds the same activations: one way to write what has several.

    Raises:
        ValueError: see `whole_name`.
    """
    whole = whole_name(model, name)
    parts = whole.removesuffix(INPUT).split(".")
    ending = INPUT if whole.endswith(INPUT) else ""
    for first in reversed(range(1, len(parts))):
        short = ".".join(parts[first:]) + ending
        with suppress(ValueError):
            if whole_name(model, short) == whole:
                return short
    return whole


def remove(model: nn.Module) -> bool:
    """Take the low-rank activations off a network, and say whether there were any."""
    ours, found = (_Tap, _Saved, _Loaded), False
    for module in model.modules():
        for hooks in (
            module._forward_hooks, module._forward_pre_hooks,
            module._state_dict_hooks, module._load_state_dict_pre_hooks,
        ):  # fmt: skip
            for key, hook in [*hooks.items()]:
                if isinstance(getattr(hook, "hook", hook), ours):  # PyTorch wraps some
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
                    found = True
    return found


def _hold(factor: Tensor, speed: Tensor) -> None:
    """Keep the norm of P or Q at 2 at most, and its momentum from growing there."""
    norm = torch.linalg.eigvalsh(factor.mT @ factor)[-1].clamp_min(0).sqrt()
    factor.mul_((LONGEST / norm).clamp_max(1))
    speed.mul_(norm <= LONGEST)


def _through(rows: Tensor, maps: list[Tensor]) -> Tensor:
    for matrix in maps:
        rows = rows @ matrix
    return rows
