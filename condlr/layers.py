"""Layers whose weight is a product of thin factors: U S V^T, U diag(s) V^T, or U V^T."""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from condlr._support.errors import one_of

CORES = ("full", "diagonal", "none")
FORMS = ("factored", "chained", "multiplied")

_WRITES = re.compile(
    r"__(set|setitem|i(add|sub|mul|truediv|div|floordiv|mod|pow|and|or|xor|lshift|rshift))__"
)


class _Related(type(Tensor)):
    """Makes every tensor an instance of the class, since `torch.testing` compares only related classes."""

    @override
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Tensor)


class Product(Tensor, metaclass=_Related):
    """The `weight` of a low-rank layer: computed at each access, and read-only.

    A write into the product would not change the factors, and would be lost silently. So in-place
    operations raise `RuntimeError`, also on views and on `.data`. Other operations return plain tensors.
    """

    @staticmethod
    def of(W: Tensor) -> Tensor:
        """W as a `Product`, or as a plain tensor where the program is being traced."""
        traced = torch.compiler.is_compiling() or not isinstance(W, Tensor)
        return W if traced else W.as_subclass(Product)

    @classmethod
    @override
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        first = next(iter((*args, *kwargs.values())), None)  # `nn.init` passes its tensor by keyword
        written = [kwargs.get("out"), first if _writes(name) else None]
        if any(type(target) is cls for target in _tensors(written)):
            raise RuntimeError(
                f"{name} would write into the weight of a low-rank layer, a product that is not kept: "
                "set it by layer.weight = tensor, or condlr.export the model first"
            )
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
            memory = {_memory(X) for X in _tensors(args) if type(X) is cls}
            views = isinstance(found, Tensor) and _memory(found) in memory
            return found.as_subclass(cls) if views else found

    # A saved or copied product is a plain tensor.
    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    @override
    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor), memo)


def _writes(name: str) -> bool:
    """Whether a function of PyTorch writes into its first argument: `add_`, `__iadd__`, `.data =`."""
    return bool(_WRITES.fullmatch(name)) or (name.endswith("_") and not name.endswith("__"))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _memory(X: Tensor) -> int:
    return X.untyped_storage().data_ptr() if X.layout == torch.strided else 0


class LowRank(nn.Module):
    """The base of `LowRankLinear` and `LowRankConv2d`: the factors of an n x m matrix W.

    Parameters:
        U: (n, r).
        Vt: V^T, (r, m), contiguous, so that it can be used as the weight of a layer without a copy.
        S: (r, r) for the core `full`; (r,) for `diagonal`, W = U diag(S) V^T; None for `none`, W = U V^T.
        bias: (n,), or None.

    Attributes:
        form: how y = W x is computed: `factored`, as (U S) (V^T x); `chained`, as U (S (V^T x));
            `multiplied`, as (U S V^T) x. They differ by rounding. Which is fastest depends on the layer, the
            batch and the machine, see `condlr.choose_forms`. The default is `chained` for a linear layer,
            which is never much slower, and `factored` for a convolution.
        dense_mean: the mean of all min(n, m) singular values of the dense weight that the layer was made
            from (`like`), or None.

    n is the number of outputs; m is the number of inputs times the area of the kernel. The factors are
    ordinary parameters; only a method such as `condlr.constrain` keeps U and V orthonormal. Methods may
    change the rank in training, and `load_state_dict` adopts the rank of the factors that it loads.
    """

    U: nn.Parameter
    Vt: nn.Parameter
    S: nn.Parameter | None
    bias: nn.Parameter | None
    form: str
    # Not compiled by TorchScript, which supports only a part of Python.
    __jit_unused_properties__ = ["V", "rank", "weight"]  # noqa: RUF012

    def __init__(self, n: int, m: int, rank: int, bias: bool, core: str, device=None, dtype=None):
        super().__init__()
        one_of("core", core, CORES)
        if not 1 <= rank <= min(n, m):
            raise ValueError(f"the rank of a {n} x {m} matrix is 1 to {min(n, m)}; got {rank}")
        kind = {"device": device, "dtype": dtype}
        self.U = nn.Parameter(torch.empty(n, rank, **kind))
        self.Vt = nn.Parameter(torch.empty(rank, m, **kind))
        shape = {"full": (rank, rank), "diagonal": (rank,)}.get(core)
        self.register_parameter("S", nn.Parameter(torch.empty(shape, **kind)) if shape else None)
        self.register_parameter("bias", nn.Parameter(torch.empty(n, **kind)) if bias else None)
        self.core, self.form = core, "factored"
        self.dense_mean: float | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set W to the best rank-r approximation of a matrix with PyTorch's default initialisation."""
        n, m = self.shape
        dense = self.U.new_empty(n, m)
        nn.init.kaiming_uniform_(dense, a=5**0.5)
        self.set_matrix(dense)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(m**-0.5), m**-0.5)

    @property
    def rank(self) -> int:
        """r, the number of columns of U and V."""
        return self.U.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (n, m) of W."""
        return self.U.shape[0], self.Vt.shape[1]

    @property
    def V(self) -> Tensor:
        """The transpose of the parameter `Vt`: (m, r)."""
        return self.Vt.mT

    @property
    def left(self) -> Tensor:
        """U S, or U for the pair: (n, r)."""
        S = self.S  # a local variable, which TorchScript can narrow to "not None"
        if S is None:
            return self.U
        return self.U @ S if self.core == "full" else self.U * S

    @property
    def matrix(self) -> Tensor:
        """W, (n, m), differentiable."""
        return self.left @ self.Vt

    @torch.no_grad()
    def set_factors(self, U: Tensor, S: Tensor | None, V: Tensor) -> None:
        """Copy the factors, whose rank may differ; then gradients are dropped."""
        for parameter, value in ((self.U, U), (self.S, S), (self.Vt, V.mT)):
            if parameter is None or value is None:
                assert parameter is None and value is None, "S is given where the layer has one"
            elif parameter.shape == value.shape:
                parameter.copy_(value)
            else:
                parameter.grad = None
                parameter.data = value.to(parameter).clone(memory_format=torch.contiguous_format)

    @torch.no_grad()
    def set_matrix(self, W: Tensor) -> Tensor:
        """Set the factors to the truncated SVD of W, (n, m), in float64: the nearest matrix of rank r.

        With a core, U and V are orthonormal and S = diag(sigma), descending. Without, the factors are
        U sqrt(Sigma) and V sqrt(Sigma) (spectral initialisation, Khodak et al., ICLR 2021).

        Returns:
            All min(n, m) singular values of W.
        """
        P, sigma, Qh = torch.linalg.svd(W.double(), full_matrices=False)
        self.set_svd(P[:, : self.rank], sigma[: self.rank], Qh[: self.rank].mT)
        return sigma

    @torch.no_grad()
    def set_svd(self, P: Tensor, sigma: Tensor, Q: Tensor) -> None:
        """Set the factors to W = P diag(sigma) Q^T, of (n, r), (r,), (m, r); see `set_matrix`."""
        if self.S is None:
            P, Q = P * sigma.sqrt(), Q * sigma.sqrt()
        else:
            self.S.copy_(torch.diag(sigma) if self.S.ndim == 2 else sigma)
        self.U.copy_(P)
        self.Vt.copy_(Q.mT)
        self.dense_mean = None

    @torch.no_grad()
    def singular_values(self) -> Tensor:
        """The r singular values of W in float64, descending, from r x r matrices.

        With the QR factorisations U = Q_U R_U and V = Q_V R_V they are those of R_U S R_V^T. U and V need
        not be orthonormal.
        """
        left = torch.linalg.qr(self.U.double(), mode="r").R
        right = torch.linalg.qr(self.V.double(), mode="r").R
        if self.S is not None:
            S = self.S.double()
            left = left @ S if self.core == "full" else left * S
        return torch.linalg.svdvals(left @ right.mT)

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":
            super().__setattr__(name, value)
        elif isinstance(value, nn.Parameter) or not isinstance(value, Tensor):
            raise TypeError(
                "the weight of a low-rank layer is a product, not a parameter: layer.weight = tensor sets "
                "its factors to the nearest matrix of their rank; condlr.export makes plain layers"
            )
        else:
            if value.flatten(1).shape != self.shape:
                raise ValueError(
                    f"the weight is viewed as a {self.shape} matrix; got a tensor of {tuple(value.shape)}"
                )
            self.set_matrix(value.detach().flatten(1))

    @override
    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        V = state_dict.get(prefix + "V")
        if isinstance(V, Tensor) and V.ndim == 2 and prefix + "Vt" not in state_dict:
            # From an older condlr, whose parameter was V
            state_dict[prefix + "Vt"] = state_dict.pop(prefix + "V").mT.contiguous()
        U, Vt = state_dict.get(prefix + "U"), state_dict.get(prefix + "Vt")
        if isinstance(U, Tensor) and isinstance(Vt, Tensor) and U.ndim == Vt.ndim == 2:
            self._take_rank(U.shape, Vt.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _take_rank(self, left: torch.Size, right: torch.Size) -> None:
        """Resize the factors to these shapes of U and V^T, if they fit W's shape."""
        (n, m), rank = self.shape, left[-1]
        if rank != self.rank and (*left, *right) == (n, rank, rank, m) and 1 <= rank <= min(n, m):
            S = None if self.S is None else self.S.new_empty([rank] * self.S.ndim)
            self.set_factors(self.U.new_empty(n, rank), S, self.Vt.new_empty(m, rank))


class LowRankLinear(LowRank):
    """A replacement of `nn.Linear`: y = W x + b with W = U S V^T.

    Args:
        in_features, out_features: m and n.
        rank: r <= min(n, m).
        bias: add b.
        core: `full`, `diagonal` or `none`: the kind of S, see `LowRank`.

    Shapes:
        x: (..., in_features); y: (..., out_features).

    Example:
        >>> layer = LowRankLinear(800, 500, rank=58)
        >>> layer(torch.zeros(4, 800)).shape
        torch.Size([4, 500])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        core: str = "full",
        device=None,
        dtype=None,
    ):
        super().__init__(out_features, in_features, rank, bias, core, device, dtype)
        self.in_features, self.out_features = in_features, out_features
        self.form = "chained" if core == "full" else "factored"

    @classmethod
    def like(cls, dense: nn.Linear, rank: int, core: str = "full") -> "LowRankLinear":
        """The layer of this rank nearest to `dense`, with its bias, device and dtype."""
        has_bias = dense.bias is not None
        shape = dense.in_features, dense.out_features
        layer = cls(*shape, rank, has_bias, core, device="meta", dtype=dense.weight.dtype)
        _take_over(layer, dense)
        return layer

    @property
    def weight(self) -> Tensor:
        """W, (out_features, in_features); see `Product`."""
        return Product.of(self.matrix)

    @override
    def forward(self, x: Tensor) -> Tensor:
        if self.form == "multiplied":
            return F.linear(x, self.matrix, self.bias)
        z, S = F.linear(x, self.Vt), self.S
        if self.form == "factored" or S is None:
            return F.linear(z, self.left, self.bias)
        z = F.linear(z, S) if self.core == "full" else z * S
        return F.linear(z, self.U, self.bias)

    @override
    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}" + _options(self)


class LowRankConv2d(LowRank):
    """A convolution whose kernel, viewed as out x (in kh kw), is U S V^T (see `LowRank` for other cores).

    It is computed as a kh x kw convolution with the r filters V^T, then a 1 x 1 convolution with U S, or as
    one convolution with the product (see `LowRank.form`). It takes the arguments of `nn.Conv2d` except
    `groups`.

    Shapes:
        x: (N, in_channels, H, W) or (in_channels, H, W); y as in `nn.Conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        rank: int,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        core: str = "full",
        device=None,
        dtype=None,
    ):
        # A dense layer on the meta device checks and normalises the arguments as PyTorch does.
        twin = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation,
            padding_mode=padding_mode, device="meta",
        )  # fmt: skip
        kh, kw = twin.kernel_size
        super().__init__(out_channels, in_channels * kh * kw, rank, bias, core, device, dtype)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.dilation = twin.kernel_size, twin.stride, twin.dilation
        self.padding, self.padding_mode = twin.padding, padding_mode
        self._pad = list(twin._reversed_padding_repeated_twice)
        self._padding = twin.padding if padding_mode == "zeros" else (0, 0)

    @classmethod
    def like(cls, dense: nn.Conv2d, rank: int, core: str = "full", nearest: bool = True) -> "LowRankConv2d":
        """The layer of this rank nearest to `dense` in the kernel's Frobenius norm, with its bias.

        Without `nearest` the caller sets the factors, which saves an SVD.
        """
        if dense.groups != 1:
            raise ValueError(f"a grouped convolution (groups={dense.groups}) stays dense")
        layer = cls(
            dense.in_channels, dense.out_channels, dense.kernel_size, rank,  # type: ignore[arg-type]
            dense.stride, dense.padding, dense.dilation,  # type: ignore[arg-type]
            bias=dense.bias is not None, padding_mode=dense.padding_mode, core=core,
            device="meta", dtype=dense.weight.dtype,
        )  # fmt: skip
        _take_over(layer, dense, nearest)
        return layer

    @property
    def filters(self) -> Tensor:
        """V^T as r filters: (r, in_channels, kh, kw)."""
        return self._as_kernel(self.Vt)

    @property
    def weight(self) -> Tensor:
        """The kernel, (out_channels, in_channels, kh, kw); see `Product`."""
        return Product.of(self._as_kernel(self.matrix))

    def _as_kernel(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1, self.in_channels, self.kernel_size[0], self.kernel_size[1])

    @override
    def forward(self, x: Tensor) -> Tensor:
        padding = self._padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._pad, mode=self.padding_mode)
        if self.form == "multiplied":
            kernel = self._as_kernel(self.matrix)
            return F.conv2d(x, kernel, self.bias, self.stride, padding, self.dilation)
        z = F.conv2d(x, self.filters, None, self.stride, padding, self.dilation)
        S = self.S
        if self.form == "factored" or S is None:
            return F.conv2d(z, self.left[:, :, None, None], self.bias)
        core = S if self.core == "full" else torch.diag(S)
        return F.conv2d(F.conv2d(z, core[:, :, None, None]), self.U[:, :, None, None], self.bias)

    @override
    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        return f"{text}, rank={self.rank}, stride={self.stride}" + _options(self)


def _options(layer: LowRank) -> str:
    core = "" if layer.core == "full" else f", core={layer.core}"
    return f", bias={layer.bias is not None}{core}"


def _take_over(layer: LowRank, dense: nn.Linear | nn.Conv2d, nearest: bool = True) -> None:
    """Give `layer`, which is on the meta device, the weights and the state of `dense`."""
    layer.to_empty(device=dense.weight.device)
    if nearest:
        sigma = layer.set_matrix(dense.weight.detach().flatten(1))
        layer.dense_mean = None if sigma.is_meta else sigma.mean().item()
    for parameter in (layer.U, layer.S, layer.Vt):
        if parameter is not None:
            parameter.requires_grad_(dense.weight.requires_grad)
    if layer.bias is not None and dense.bias is not None:
        with torch.no_grad():
            layer.bias.copy_(dense.bias)
        layer.bias.requires_grad_(dense.bias.requires_grad)
    layer.train(dense.training)
