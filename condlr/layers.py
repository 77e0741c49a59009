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
    """Makes every tensor an instance of a class: `torch.testing` compares only tensors of related ones."""

    @override
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Tensor)


class Product(Tensor, metaclass=_Related):
    """The `weight` of a low-rank layer: made anew at each call, and nothing can be written into it.

    What is written into a product would be lost without a word, for the factors do not hear of it: in-place
    operations raise, on views and on `.data` too. Any other result is a plain tensor.
    """

    @staticmethod
    def of(W: Tensor) -> Tensor:
        """W as a `Product`; as it is where a program is traced, which knows plain tensors only."""
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
        first = next(iter((*args, *kwargs.values())), None)  # `nn.init` gives its tensor by name
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

    # What is saved or copied is a plain tensor.
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
    """What `LowRankLinear` and `LowRankConv2d` share: the factors of an n x m matrix W.

    Parameters:
        U: (n, r).
        Vt: V^T, (r, m), contiguous: as it lies in memory it is the weight of a layer.
        S: (r, r) for the core `full`; (r,) for `diagonal`, W = U diag(S) V^T; None for `none`, W = U V^T.
        bias: (n,), or None.

    Attributes:
        form: how y = W x is computed: `factored`, V^T x and then U S at once; `chained`, V^T, S and U one
            after the other; `multiplied`, W first and then W x. The same but for rounding; which is faster
            depends on the layer, the batch and the machine, see `condlr.choose_forms`. As long as nobody
            chose, a linear layer is chained, which is never much slower, and a convolution factored.
        dense_mean: the mean of all min(n, m) singular values of the dense weight that the layer was made
            from (`like`), of which it keeps r; None where there was none.

    n is the number of outputs; m the number of inputs times the area of the kernel. The factors
    are ordinary parameters: whether U and V have orthonormal columns is the affair of the method
    that trains them (`condlr.constrain`). A layer takes the rank of the factors that `load_state_dict`
    brings: methods may change it while they train.
    """

    U: nn.Parameter
    Vt: nn.Parameter
    S: nn.Parameter | None
    bias: nn.Parameter | None
    form: str
    # Compiled by TorchScript, which has no need of them, these would have to be written in its dialect.
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
        """W becomes the best rank-r approximation of a matrix with PyTorch's default init."""
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
        """N and m."""
        return self.U.shape[0], self.Vt.shape[1]

    @property
    def V(self) -> Tensor:
        """The transpose of the parameter `Vt`: (m, r)."""
        return self.Vt.mT

    @property
    def left(self) -> Tensor:
        """U S, or U for the pair: (n, r)."""
        S = self.S  # a name of its own, of which TorchScript believes that it is no None
        if S is None:
            return self.U
        return self.U @ S if self.core == "full" else self.U * S

    @property
    def matrix(self) -> Tensor:
        """W, (n, m), differentiable."""
        return self.left @ self.Vt

    @torch.no_grad()
    def set_factors(self, U: Tensor, S: Tensor | None, V: Tensor) -> None:
        """Copy the factors, of another rank if need be; gradients of another shape are dropped."""
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
        """Set the factors to the truncated SVD of W, (n, m): the nearest matrix of rank r.

        The triple gets orthonormal U, V and S = diag(sigma), descending; the pair shares the singular
        values between its factors, U sqrt(Sigma) and V sqrt(Sigma) (spectral initialisation,
        Khodak et al., ICLR 2021). Computed in float64. Returns all min(n, m) singular values of W.
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

        With the QR factorisations U = Q_U R_U and V = Q_V R_V they are those of R_U S R_V^T; nothing
        is assumed of U and V.
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
                "the weight of a low-rank layer is a product, and no parameter: layer.weight = tensor sets "
                "its factors to the nearest matrix of their rank; condlr.export makes plain layers"
            )
        else:
            if value.flatten(1).shape != self.shape:
                raise ValueError(
                    f"the weight is seen as a matrix of {self.shape}; got a tensor of {tuple(value.shape)}"
                )
            self.set_matrix(value.detach().flatten(1))

    @override
    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        V = state_dict.get(prefix + "V")
        if isinstance(V, Tensor) and V.ndim == 2 and prefix + "Vt" not in state_dict:
            # As condlr saved a layer when V, by columns, was its parameter
            state_dict[prefix + "Vt"] = state_dict.pop(prefix + "V").mT.contiguous()
        U, Vt = state_dict.get(prefix + "U"), state_dict.get(prefix + "Vt")
        if isinstance(U, Tensor) and isinstance(Vt, Tensor) and U.ndim == Vt.ndim == 2:
            self._take_rank(U.shape, Vt.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _take_rank(self, left: torch.Size, right: torch.Size) -> None:
        """Make room for factors U and V^T of these shapes, if they are of a matrix like W at all."""
        (n, m), rank = self.shape, left[-1]
        if rank != self.rank and (*left, *right) == (n, rank, rank, m) and 1 <= rank <= min(n, m):
            S = None if self.S is None else self.S.new_empty([rank] * self.S.ndim)
            self.set_factors(self.U.new_empty(n, rank), S, self.Vt.new_empty(m, rank))


class LowRankLinear(LowRank):
    """y = W x + b with W = U S V^T. In place of `nn.Linear`.

    Args:
        in_features, out_features: m and n.
        rank: r <= min(n, m).
        bias: add b.
        core: `full`, `diagonal` or `none`: which S stands between U and V^T, see `LowRank`.

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
        """W, as `nn.Linear` has it: (out_features, in_features); see `Product`."""
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
    """Convolution whose kernel, viewed as out x (in kh kw), is U S V^T (see `LowRank` for other cores).

    Computed as a kh x kw convolution with the r filters V^T, then a 1 x 1 convolution with U S, or as one
    convolution with the product (see `LowRank.form`): never by unfolding the images. Takes the arguments
    of `nn.Conv2d` but `groups`.

    Shapes:
        x: (N, in_channels, H, W) or (in_channels, H, W); y as `nn.Conv2d`.
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
        # A dense twin on no device checks and normalises the arguments as PyTorch does.
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
    def like(cls, dense: nn.Conv2d, rank: int, core: str = "full") -> "LowRankConv2d":
        """The layer of this rank nearest to `dense` (Frobenius norm of the kernel), with its bias."""
        if dense.groups != 1:
            raise ValueError(f"a grouped convolution (groups={dense.groups}) stays dense")
        layer = cls(
            dense.in_channels, dense.out_channels, dense.kernel_size, rank,  # type: ignore[arg-type]
            dense.stride, dense.padding, dense.dilation,  # type: ignore[arg-type]
            bias=dense.bias is not None, padding_mode=dense.padding_mode, core=core,
            device="meta", dtype=dense.weight.dtype,
        )  # fmt: skip
        _take_over(layer, dense)
        return layer

    @property
    def filters(self) -> Tensor:
        """V^T as r filters: (r, in_channels, kh, kw)."""
        return self._as_kernel(self.Vt)

    @property
    def weight(self) -> Tensor:
        """The kernel, as `nn.Conv2d` has it: (out_channels, in_channels, kh, kw); see `Product`."""
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


def _take_over(layer: LowRank, dense: nn.Linear | nn.Conv2d) -> None:
    """Give `layer`, which was made on the meta device, the weights and the state of `dense`."""
    layer.to_empty(device=dense.weight.device)
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
