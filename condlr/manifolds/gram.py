"""Gram matrices of convolutions as operators, from the kernel alone.

A convolution y[o, p] = sum_{c, a} K[o, c, a] x[c, S p + d a - P] (positions, taps a, stride S, dilation d and
padding P in two dimensions) is a block-Toeplitz matrix W. Away from the image's edges an entry of W^T W or
W W^T depends on the difference of two positions alone, and on where the first lies between two steps of the
stride. Those entries are all that is computed here; W is never formed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import gcd
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

Side = Literal["columns", "rows"]
Pair = tuple[int, int]


class Entry(NamedTuple):
    """Which entries of a Gram matrix one n x n block holds.

    Attributes:
        residue: class of the first position, modulo the stride.
        lag: how far the second position lies from the first, in units of `Gram.unit`.
    """

    residue: Pair
    lag: Pair


@dataclass(frozen=True)
class Gram:
    """W^T W (columns) or W W^T (rows) of a convolution, one of each two entries that are equal.

    Attributes:
        blocks: (L, n, n), n the channels of a position: [(i, q), (j, q + lag unit)] for each of `entries`.
            A lag that is negative, in the order of rows and then columns, is left out: a Gram matrix is
            symmetric, and its block is the transpose of one that is there.
        entries: what each block holds.
        residues: (h, w): how many classes of positions there are in each direction.
        unit: positions that one lag goes, in each direction.
    """

    blocks: Tensor
    entries: Sequence[Entry]
    residues: Pair
    unit: Pair

    @property
    def n(self) -> int:
        """Channels of a position."""
        return self.blocks.shape[-1]

    def diagonal(self) -> Tensor:
        """(residues, n): the squared norm of each column, or row, of W."""
        here = [i for i, entry in enumerate(self.entries) if entry.lag == (0, 0)]
        values = self._zeros()
        return values.index_put(
            (self._classes([self.entries[i].residue for i in here]),),
            self.blocks[here].diagonal(dim1=1, dim2=2),
        )

    def off_diagonal_sums(self) -> Tensor:
        """(residues, n): for each row of the Gram matrix, the sum of |entry| off its diagonal."""
        absolute = self.blocks.abs()
        first = self._classes([entry.residue for entry in self.entries])
        sums = self._zeros().index_add(0, first, absolute.sum(2))
        mirrored = [i for i, entry in enumerate(self.entries) if entry.lag != (0, 0)]
        second = self._classes([self._mirrored(self.entries[i]) for i in mirrored])
        return sums.index_add(0, second, absolute[mirrored].sum(1)) - self.diagonal().abs()

    def squared_distance(self) -> Tensor:
        """||Gram - I||_F^2 for the positions of all residues: the sum over their rows of the Gram matrix."""
        twice = [1.0 if entry.lag == (0, 0) else 2.0 for entry in self.entries]
        squares = self.blocks.square().sum((1, 2)) * self.blocks.new_tensor(twice)
        diagonal = self.diagonal()
        return squares.sum() - 2 * diagonal.sum() + diagonal.numel()

    def block(self, residue: Pair, lag: Pair) -> Tensor:
        """(n, n): the entries [(i, q), (j, q + lag unit)], q of this class; zeros where taps never meet."""
        known = {entry: i for i, entry in enumerate(self.entries)}
        if (found := known.get(Entry(residue, lag))) is not None:
            return self.blocks[found]
        mirror = Entry(self._mirrored(Entry(residue, lag)), (-lag[0], -lag[1]))
        if (found := known.get(mirror)) is not None:
            return self.blocks[found].mT
        return self.blocks.new_zeros(self.n, self.n)

    def _mirrored(self, entry: Entry) -> Pair:
        """The class of the second position."""
        at = [(r + lag * u) % s for r, lag, u, s in zip(*entry, self.unit, self.residues, strict=True)]
        return at[0], at[1]

    def _classes(self, residues: Sequence[Pair]) -> Tensor:
        places = [row * self.residues[1] + column for row, column in residues]
        return torch.tensor(places, dtype=torch.long, device=self.blocks.device)

    def _zeros(self) -> Tensor:
        return self.blocks.new_zeros(self.residues[0] * self.residues[1], self.n)


def smaller_side(kernel: Tensor, stride: Pair) -> Side:
    """Which Gram matrix of a convolution is the smaller one: columns where out >= in * stride^2."""
    return "columns" if kernel.shape[0] >= kernel.shape[1] * stride[0] * stride[1] else "rows"


def gram(kernel: Tensor, stride: Pair = (1, 1), dilation: Pair = (1, 1), side: Side = "columns") -> Gram:
    r"""The Gram matrix of a convolution away from the edges, differentiable in the kernel.

    Columns, for an input position q with (q + P) mod S = rho:

        (W^T W)[(c, q), (c', q + d l)] = sum_o sum_{a: d a = rho mod S} K[o, c, a] K[o, c', a + l].

    There are S^2 classes rho, and all lags l with |l| <= k - 1. Rows, for any output position p, with
    t = S / gcd(S, d) taps and u = d / gcd(S, d) positions:

        (W W^T)[(o, p), (o', p + u l)] = sum_{c, a} K[o, c, a + t l] K[o', c, a],  |l| <= (k - 1) / t.

    Cost: one product of n x m by m x n for each pair of taps that meet, m the channels of the other side, so
    about half of k^4 n^2 m multiplications for columns, and twice that for the gradient.

    Args:
        kernel: (out, in, kh, kw), of any floating dtype, in which the result is.
        stride, dilation: in rows and columns.
        side: of which n, the channels of a position, are `in` for columns and `out` for rows.
    """
    if kernel.ndim != 4 or 0 in kernel.shape:
        raise ValueError(f"a kernel is (out, in, kh, kw); this one is {tuple(kernel.shape)}")
    size = tuple(kernel.shape[2:])
    shared = [gcd(s, d) for s, d in zip(stride, dilation, strict=True)]
    if side == "columns":
        taps, step, residues, unit = kernel.permute(2, 3, 0, 1), (1, 1), stride, dilation
    else:
        taps, residues = kernel.permute(2, 3, 1, 0), (1, 1)
        step = tuple(s // g for s, g in zip(stride, shared, strict=True))
        unit = tuple(d // g for d, g in zip(dilation, shared, strict=True))
    reach = [(k - 1) // t for k, t in zip(size, step, strict=True)]
    entries, meeting = [], []
    for lag in product(range(reach[0] + 1), range(-reach[1], reach[1] + 1)):
        if lag < (0, 0):
            continue
        for residue in product(range(residues[0]), range(residues[1])):
            axes = zip(size, residue, residues, dilation, lag, step, strict=True)
            pairs = [_pairs(k, [a for a in range(k) if d * a % s == r], n * t) for k, r, s, d, n, t in axes]
            if all(pairs):
                entries.append(Entry(residue, lag))
                meeting.append(pairs)
    if side == "rows":  # [(o, p), (o', p + u l)] has the larger tap at the first position
        meeting = [[(second, first) for first, second in pairs] for pairs in meeting]
    blocks = _TapProducts.apply(taps.contiguous(), meeting)
    return Gram(blocks, entries, (residues[0], residues[1]), (unit[0], unit[1]))


def _pairs(k: int, taps: Sequence[int], lag: int) -> tuple[slice, slice] | None:
    """The taps a and a + lag of one axis, both within k, as slices; None where there are none."""
    some = [a for a in taps if 0 <= a + lag < k]
    if not some:
        return None
    stride = some[1] - some[0] if len(some) > 1 else 1
    first = slice(some[0], some[-1] + 1, stride)
    return first, slice(some[0] + lag, some[-1] + lag + 1, stride)


Meeting = Sequence[Sequence[tuple[slice, slice]]]


class _TapProducts(torch.autograd.Function):
    """(kh, kw, m, n) -> (L, n, n): for each lag the sum of X_a^T X_b over the pairs of taps that meet.

    Its gradient is written into one tensor. Autograd's own would make a tensor as large as the kernel for
    each slice.
    """

    @staticmethod
    @override
    def forward(ctx: Any, taps: Tensor, meeting: Meeting) -> Tensor:
        ctx.save_for_backward(taps)
        ctx.meeting = meeting
        return torch.stack([first.mT @ second for first, second in _operands(taps, meeting)])

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (taps,), (grad,) = ctx.saved_tensors, grads
        total = torch.zeros_like(taps)
        for g, pairs, (first, second) in zip(grad, ctx.meeting, _operands(taps, ctx.meeting), strict=True):
            (rows, others), (columns, also) = pairs
            here, there = total[rows][:, columns], total[others][:, also]
            if (rows, columns) == (others, also):
                here += (first @ (g + g.mT)).view(here.shape)
            else:
                here += (second @ g.mT).view(here.shape)
                there += (first @ g).view(there.shape)
        return total, None


def _operands(taps: Tensor, meeting: Meeting) -> Iterator[tuple[Tensor, Tensor]]:
    """The taps at the first positions of each lag, and those at the second, one below the other."""
    for (rows, others), (columns, also) in meeting:
        first = taps[rows][:, columns].flatten(0, 2)
        same = (rows, columns) == (others, also)
        yield first, first if same else taps[others][:, also].flatten(0, 2)
