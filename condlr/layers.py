"""Layers whose weight is a product of thin factors: U S V^T, U diag(s) V^T, or U V^T."""

import sys
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from condlr._support.errors import one_of
from condlr.manifolds.nearest import Truncation, nearest
from condlr.product import Product

CORES = ("full", "diagonal", "none")
FORMS = ("factored", "chained", "multiplied")
# Where torch.func.functional_call sets what it swaps
_SWAPPING = "torch.nn.utils._named_member_accessor"


class LowRank(nn.Module):
    """The base of all low-rank layers: the factors of an n x m matrix W.

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
            from (`like`); None without one, or where they were too many to compute.
        dense_error: ||W - W_dense||_F / ||W_dense||_F when it was made; None without a dense weight, or once
            another rank was loaded.

    n is the number of outputs; m is the number of inputs times the area of the kernel (in a transposed
    convolution: n of inputs, and m of outputs times the area). The factors are
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

    def __init__(self, n: int, m: int, rank: int, biases: int, core: str, device=None, dtype=None):
        super().__init__()
        one_of("core", core, CORES)
        if not 1 <= rank <= min(n, m):
            raise ValueError(f"the rank of a {n} x {m} matrix is 1 to {min(n, m)}; got {rank}")
        kind = {"device": device, "dtype": dtype}
        self.U = nn.Parameter(torch.empty(n, rank, **kind))
        self.Vt = nn.Parameter(torch.empty(rank, m, **kind))
        shape = {"full": (rank, rank), "diagonal": (rank,)}.get(core)
        self.register_parameter("S", nn.Parameter(torch.empty(shape, **kind)) if shape else None)
        self.register_parameter("bias", nn.Parameter(torch.empty(biases, **kind)) if biases else None)
        self.core, self.form = core, "factored"
        self.dense_mean: float | None = None
        self.dense_error: float | None = None
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

    @classmethod
    def like(cls, dense: nn.Module, rank: int, core: str = "full", tolerance: float = 1e-5) -> Self:
        """The layer of this rank nearest to `dense` in the Frobenius norm of the matrix, with its bias."""
        layer = cls.shaped_like(dense, rank, core)
        layer.follow(nearest(cls.matrix_of(dense).detach(), rank, tolerance))
        return layer

    @classmethod
    def shaped_like(cls, dense: Any, rank: int, core: str = "full") -> Self:
        """A layer with the settings, bias, device and dtype of `dense`, whose factors are not set yet."""
        raise NotImplementedError

    @staticmethod
    def matrix_of(dense: Any) -> Tensor:
        """The (n, m) matrix of a dense layer."""
        return dense.weight.flatten(1)

    @torch.no_grad()
    def take_over(self, dense: Any) -> None:
        """Take the bias and the state of `dense`, and go from the meta device to its device."""
        self.to_empty(device=dense.weight.device)
        for parameter in (self.U, self.S, self.Vt):
            if parameter is not None:
                parameter.requires_grad_(dense.weight.requires_grad)
        if self.bias is not None and dense.bias is not None:
            self.bias.copy_(dense.bias)
            self.bias.requires_grad_(dense.bias.requires_grad)
        self.train(dense.training)

    def follow(self, found: Truncation) -> None:
        """Set the factors to an approximation of a dense layer's matrix, and remember how near it is."""
        self.set_svd(found.P, found.sigma, found.Q)
        self.dense_mean, self.dense_error = found.mean, found.error

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
                new = value.to(parameter).clone(memory_format=torch.contiguous_format)
                # Of another dtype first: else gradients keep the old shape while anything holds an old graph
                other = torch.float64 if parameter.dtype == torch.float32 else torch.float32
                parameter.data = parameter.data.new_empty(0, dtype=other)
                parameter.data = new

    @torch.no_grad()
    def set_matrix(self, W: Tensor, tolerance: float = 1e-5) -> Truncation:
        """Set the factors to the truncated SVD of W, (n, m), in float64: the nearest matrix of rank r.

        With a core, U and V are orthonormal and S = diag(sigma), descending. Without, the factors are
        U sqrt(Sigma) and V sqrt(Sigma) (spectral initialisation, Khodak et al., ICLR 2021).

        Args:
            W: finite.
            tolerance: how much larger than the smallest possible one the error may be, relative to it; see
                `condlr.manifolds.nearest`.
        """
        found = nearest(W, self.rank, tolerance)
        self.set_svd(found.P, found.sigma, found.Q)
        return found

    @torch.no_grad()
    def set_svd(self, P: Tensor, sigma: Tensor, Q: Tensor) -> None:
        """Set the factors to W = P diag(sigma) Q^T, of (n, r), (r,), (m, r); see `set_matrix`."""
        if self.S is None:
            # Of a singular value that is 0 only P is 0, so that its gradient is not
            P, Q = P * sigma.sqrt(), Q * sigma.sqrt().where(sigma > 0, 1.0)
        else:
            self.S.copy_(torch.diag(sigma) if self.S.ndim == 2 else sigma)
        self.U.copy_(P)
        self.Vt.copy_(Q.mT)
        self.dense_mean = self.dense_error = None

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
            if sys._getframe(1).f_globals.get("__name__") == _SWAPPING:
                raise TypeError(
                    "functional_call cannot replace the weight of a low-rank layer, which is a product: give "
                    "it U, S and Vt"
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
        factors = [state_dict.get(prefix + name) for name in ("U", "S", "Vt")]
        self._take_rank([X.shape if isinstance(X, Tensor) else None for X in factors])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _take_rank(self, shapes: list[torch.Size | None]) -> None:
        """Resize the factors to these shapes of U, S and V^T, if all of them fit W's shape."""
        (n, m), left = self.shape, shapes[0]
        rank = left[-1] if left else 0
        core = None if self.S is None else (rank,) * self.S.ndim
        if rank != self.rank and 1 <= rank <= min(n, m) and shapes == [(n, rank), core, (rank, m)]:
            S = None if core is None or self.S is None else self.S.new_empty(core)
            self.set_factors(self.U.new_empty(n, rank), S, self.Vt.new_empty(m, rank))
            self.dense_error = None  # of the rank before


class LowRankLinear(LowRank):
    """A replacement of `nn.Linear`: y = W x + b with W = U S V^T.

    Args:
        in_features, out_features: m and n.
        rank: r <= min(n, m).
        bias: add b.
        core: `full`, `diagonal` or `none`: the kind of S, see `LowRank`.

    Shapes:
        input: (..., in_features); the result: (..., out_features).

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
        super().__init__(out_features, in_features, rank, out_features if bias else 0, core, device, dtype)
        self.in_features, self.out_features = in_features, out_features
        self.form = "chained" if core == "full" else "factored"

    @classmethod
    @override
    def shaped_like(cls, dense: Any, rank: int, core: str = "full") -> "LowRankLinear":
        n, m = cls.matrix_of(dense).shape
        layer = cls(m, n, rank, dense.bias is not None, core, device="meta", dtype=dense.weight.dtype)
        layer.take_over(dense)
        return layer

    @staticmethod
    @override
    def matrix_of(dense: Any) -> Tensor:
        # The Conv1D of transformers is a linear layer whose weight is (in, out)
        return dense.weight if isinstance(dense, nn.Linear) else dense.weight.mT

    @property
    def weight(self) -> Tensor:
        """W, (out_features, in_features); see `Product`."""
        return Product.of(self.matrix)

    @override
    def forward(self, input: Tensor) -> Tensor:
        if self.form == "multiplied":
            return F.linear(input, self.matrix, self.bias)
        z, S = F.linear(input, self.Vt), self.S
        if self.form == "factored" or S is None:
            return F.linear(z, self.left, self.bias)
        z = F.linear(z, S) if self.core == "full" else z * S
        return F.linear(z, self.U, self.bias)

    @override
    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}" + options(self)


def options(layer: LowRank) -> str:
    """The end of a layer's representation."""
    core = "" if layer.core == "full" else f", core={layer.core}"
    return f", bias={layer.bias is not None}{core}"
