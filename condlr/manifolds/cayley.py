"""The skew-symmetric matrix of a direction on the Stiefel manifold, and the Cayley transform that it gives.

After Li, Fuxin and Todorovic (ICLR 2020, arXiv 2002.01113, Algorithm 1). Their n x n matrix has rank 2 r at
most: a tall X needs r x r matrices alone, and an X that is nearly square needs less work with W itself.
"""

from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import override

from condlr._support.errors import one_of
from condlr.manifolds import _fast

NORMS = ("frobenius", "one")
FIRSTS = ("tangent", "momentum")


def skew(X: Tensor, M: Tensor) -> "Skew":
    """W = What - What^T with What = M X^T - X (X^T M X^T) / 2 (Li et al., Algorithm 1), (..., n, n).

    Args:
        X: (..., n, r), floating, n >= r.
        M: (..., n, r), a Euclidean gradient or momentum.
    """
    n, r = X.shape[-2:]
    return Formed(X, M) if n < 2 * r else Factored(X, M)


class Skew(ABC):
    """The matrix W = A X^T - X A^T of a point X and a direction M, see `skew`.

    By definition A = M - X (X^T M) / 2. A symmetric B in A - X B cancels in W; B = sym(X^T M) / 2 is
    subtracted here, so that no large terms cancel in rounding.

    Attributes:
        X, M, A: (..., n, r).
        XM: X^T M, (..., r, r).
        T: (..., r, r), with M = A + X T.
    """

    def __init__(self, X: Tensor, M: Tensor):
        self.X, self.M = X, M
        self.XM = X.mT @ M
        self.T = (3 * self.XM + self.XM.mT) / 4
        self.A = _fast.minus_times(M, X, self.T)

    @cached_property
    def tangent(self) -> Tensor:
        """W X, (..., n, r); for orthonormal X the projection of M on the tangent space, M - X sym(X^T M).

        If M is the gradient, this is the Riemannian gradient of the embedded metric (Absil and Malick, 2012).
        """
        return self._tangent()

    @abstractmethod
    def _tangent(self) -> Tensor: ...

    @abstractmethod
    def norm(self, kind: str) -> Tensor:
        """A norm of W, which bounds its spectral norm; shape (...).

        Args:
            kind: `frobenius`, or `one`, the largest column sum of |W|, as in the code of Li et al.
        """

    @abstractmethod
    def transform(self, step: Tensor | float) -> Tensor:
        """The Cayley transform (I + step/2 W)^{-1} (I - step/2 W) X: a descent from X along W X.

        It is an orthogonal matrix times X, so X^T X does not change, up to rounding that grows with step |W|.

        Args:
            step: >= 0, a number or a tensor of shape (...).
        """

    @abstractmethod
    def iterate(self, step: Tensor | float, iterations: int, first: str = "tangent") -> Tensor:
        """The fixed-point iteration Y <- X - step/2 W (X + Y) of Li et al. for `transform`.

        With z = step |W| in the spectral norm, the error of s iterations from the tangent is at most
        2 (z/2)^{s+2} / (1 - z/2); the squared norms of columns shrink by z^4 / 4 + O(z^6) for s = 2.

        Args:
            step: see `transform`. The iteration contracts for z < 2.
            iterations: s >= 0.
            first: Y = X - step W X (`tangent`), or X - step M (`momentum`), which is not tangent.
        """


class Formed(Skew):
    """W as an n x n matrix: 2 n^2 r operations for each product with a matrix of r columns."""

    @cached_property
    def W(self) -> Tensor:
        """W, (..., n, n)."""
        half = self.A @ self.X.mT
        return half - half.mT

    @override
    def _tangent(self) -> Tensor:
        return (self.X.mT @ self.W.mT).mT  # stored by columns, as X is

    @override
    def norm(self, kind: str) -> Tensor:
        one_of("norm", kind, NORMS)
        if kind == "frobenius":
            return torch.linalg.vector_norm(self.W, dim=(-2, -1))
        return self.W.abs().sum(-2).amax(-1)

    @override
    def transform(self, step: Tensor | float) -> Tensor:
        # (I + Z)^{-1} (I - Z) = 2 (I + Z)^{-1} - I, a difference of large terms that needs no product
        Z = _column(step, self.X) / 2 * self.W
        identity = torch.eye(Z.shape[-1], dtype=Z.dtype, device=Z.device)
        solved, _ = torch.linalg.solve_ex(identity + Z, self.X)
        return solved - (self.X - solved)

    @override
    def iterate(self, step: Tensor | float, iterations: int, first: str = "tangent") -> Tensor:
        one_of("first", first, FIRSTS)
        step = _column(step, self.X)
        Y = self.X - step * (self.tangent if first == "tangent" else self.M)
        Z = step / 2 * self.W
        for _ in range(iterations):
            Y = _minus_product(self.X, Z, self.X + Y)
        return Y


class Factored(Skew):
    """W by its factors: of order n r^2 operations, and r x r matrices.

    Attributes:
        XX, XA: the r x r products X^T X and X^T A.
    """

    def __init__(self, X: Tensor, M: Tensor):
        super().__init__(X, M)
        self.XX = X.mT @ X
        self.XA = self.XM - self.XX @ self.T

    @cached_property
    def AA(self) -> Tensor:
        """A^T A, (..., r, r)."""
        return self.A.mT @ self.A

    @override
    def _tangent(self) -> Tensor:
        return self.A @ self.XX - self.X @ self.XA.mT

    @override
    def norm(self, kind: str) -> Tensor:
        """`one` from n x n entries, of which r columns of the lower triangle are formed at a time."""
        one_of("norm", kind, NORMS)
        X, A = self.X, self.A
        if kind == "frobenius":
            square = 2 * (self.AA * self.XX - self.XA * self.XA.mT).sum((-2, -1))
            return square.clamp_min(0).sqrt()
        n, r = X.shape[-2:]
        sums = X.new_zeros(X.shape[:-1])
        for i in range(0, n, r):
            rows = slice(i, i + r)
            part = (A[..., i:, :] @ X[..., rows, :].mT - X[..., i:, :] @ A[..., rows, :].mT).abs()
            sums[..., rows] += part.sum(-2)
            sums[..., i + r :] += part[..., r:, :].sum(-1)  # the upper triangle, by |W| = |W|^T
        return sums.amax(-1)

    @override
    def transform(self, step: Tensor | float) -> Tensor:
        # step W = P Q^T with P = [step A, X] and Q = [X, -step A]: by the Woodbury identity the result is
        # X - P (I + Q^T P / 2)^{-1} Q^T X, a system of 2 r equations (Wen and Yin, Math. Program. 2013)
        step = _column(step, self.X)
        XA, AA = step * self.XA, step * (step * self.AA)
        small = torch.cat([torch.cat([XA, self.XX], -1), torch.cat([-AA, -XA.mT], -1)], -2)
        identity = torch.eye(small.shape[-1], dtype=small.dtype, device=small.device)
        moved, _ = torch.linalg.solve_ex(identity + small / 2, torch.cat([self.XX, -XA.mT], -2))
        r = self.X.shape[-1]
        return self.X - (step * self.A @ moved[..., :r, :] + self.X @ moved[..., r:, :])

    @override
    def iterate(self, step: Tensor | float, iterations: int, first: str = "tangent") -> Tensor:
        """Every iterate is X + X C + A D, so only the r x r matrices C and D are iterated."""
        one_of("first", first, FIRSTS)
        step = _column(step, self.X)
        identity = torch.eye(self.X.shape[-1], dtype=self.X.dtype, device=self.X.device)
        if first == "tangent":
            C, D = step * self.XA.mT, -step * self.XX
        else:
            C, D = -step * self.T, -step * identity
        for _ in range(iterations):
            C = 2 * identity + C  # W is applied to X + Y
            C, D = step / 2 * (self.XA.mT @ C + self.AA @ D), -step / 2 * (self.XX @ C + self.XA @ D)
        return self.X + (self.X @ C + self.A @ D)


def _minus_product(X: Tensor, Z: Tensor, Y: Tensor) -> Tensor:
    """X - Z Y with a skew-symmetric Z; a matrix stored by columns stays so, and is passed over once."""
    if Y.ndim == 2 and Y.stride(-2) == 1:
        return torch.addmm(X.mT, Y.mT, Z).mT
    return X - Z @ Y


def _column(step: Tensor | float, X: Tensor) -> Tensor | float:
    """The step of each matrix of a batch, in a shape that multiplies with the matrices."""
    if not isinstance(step, Tensor):
        return step  # a CUDA graph can record a number, but not copy it from the host
    return step.to(X)[..., None, None]
