"""Singular values of convolutions as operators on images, not of their reshaped kernels.

A reshaped kernel W, out x (in kh kw), with condition number 1 can belong to an operator with a condition
number in the thousands: the singular values of W do not show how the taps of a filter add up over an image.
Everything is computed in float64.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from condlr.manifolds.lanczos import lanczos, largest_singular_values

Pair = int | Sequence[int]
Padding = int | Sequence[int] | str
Map = Callable[[Tensor], Tensor]

# The longest smaller side of a dense matrix of an operator: some seconds on one core, up to 500 MB.
DENSE_LIMIT = 3500

# Unit vectors to which a map is applied at once, and the numbers that these make at most.
_BATCH, _NUMBERS = 64, 2**24


@dataclass(frozen=True)
class Convolution:
    """The linear map x -> y of a zero-padded convolution, (B, in, H, W) -> (B, out, H', W').

    Attributes:
        kernel: (out, in, kh, kw), float64.
        size: (H, W).
        stride, dilation: of rows and columns.
        padding: ((above, below), (left, right)).
    """

    kernel: Tensor
    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]

    @property
    def domain(self) -> tuple[int, int, int]:
        """The shape of an input: (in, H, W)."""
        return (self.kernel.shape[1], *self.size)

    @property
    def range(self) -> tuple[int, int, int]:
        """The shape of an output: (out, H', W')."""
        height, width = (slack // s + 1 for slack, s in zip(self._slack(), self.stride, strict=True))
        return (self.kernel.shape[0], height, width)

    def apply(self, x: Tensor) -> Tensor:
        """A x."""
        rows, columns = self.padding
        return F.conv2d(F.pad(x, [*columns, *rows]), self.kernel, None, self.stride, 0, self.dilation)

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y."""
        # Rows and columns at the lower and right edge that no output reads, because of the stride.
        left_over = [slack % s for slack, s in zip(self._slack(), self.stride, strict=True)]
        padded = F.conv_transpose2d(y, self.kernel, None, self.stride, 0, left_over, 1, self.dilation)
        (above, _), (left, _) = self.padding
        height, width = self.size
        return padded[..., above : above + height, left : left + width]

    def gram(self) -> tuple[Callable[[Tensor], Tensor], tuple[int, int, int]]:
        """The map z -> A^T A z or A A^T z, whichever is smaller, and the shape of z."""
        if math.prod(self.domain) <= math.prod(self.range):
            return lambda z: self.adjoint(self.apply(z)), self.domain
        return lambda z: self.apply(self.adjoint(z)), self.range

    def _slack(self) -> list[int]:
        """The number of positions by which the kernel can move, down and to the right."""
        extents = (d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel.shape[2:], strict=True))
        return [n + sum(p) - e for n, p, e in zip(self.size, self.padding, extents, strict=True)]


def circular_singular_values(kernel: Tensor, size: Pair, stride: Pair = 1, dilation: Pair = 1) -> Tensor:
    """All singular values of the convolution of a periodic image (Sedghi, Gupta, Long, ICLR 2019).

    The unitary DFT turns it into one out x in matrix for each frequency f, K^(f) = sum_k K_k
    e^(-2 pi i f d k / H). A stride s keeps every s-th output. The DFT of the m = H/s kept outputs at f < m is
    the sum over the s frequencies f + a m, which coincide on them. With unitary transforms its factor is
    (1/s) sqrt(H/m) = 1/sqrt(s). So in two dimensions the matrix of f is 1/s (K^(f + a m))_a, out x (in s^2).
    A kernel larger than the image wraps around.

    Args:
        kernel: (out, in, kh, kw).
        size: (H, W) of the image, or one number for both.
        stride: s, which divides H and W.
        dilation: d.

    Returns:
        (H/s, W/s, min(out, in s^2)): for each frequency, descending.

    Raises:
        ValueError: a bad shape, or a stride that does not divide the size.
    """
    values = torch.linalg.svdvals(transfer_matrices(_kernel(kernel), _pair("size", size), stride, dilation))
    # A real kernel has equal values at f and -f, so only the columns up to W/2 were computed.
    rows, columns = len(values), _pair("size", size)[1] // _pair("stride", stride)[1]
    opposite = -torch.arange(rows, device=values.device) % rows
    mirrored = values[opposite][:, 1 : (columns + 1) // 2].flip(1)
    return torch.cat([values, mirrored], 1)


def frame_bounds(kernel: Tensor, size: Pair, stride: Pair = 1, dilation: Pair = 1) -> tuple[float, float]:
    """The frame bounds A*, B* of the convolution of a periodic image, exactly.

    They are the smallest and the largest eigenvalue of W^T W, or of W W^T where that is the smaller matrix:
    the squares of the extreme singular values of the operator W.

    Args:
        kernel, size, stride, dilation: see `circular_singular_values`. Where the stride does not divide the
            size, the operator is made dense, or where that is too large its smaller Gram matrix; then an A*
            below about 1e-13 B* is lost in rounding, and 0.

    Raises:
        ValueError: a bad shape, or an operator whose smaller side is above `DENSE_LIMIT`.
    """
    height, width = _pair("size", size)
    rows, columns = _pair("stride", stride)
    if height % rows == 0 and width % columns == 0:
        values = circular_singular_values(kernel, size, stride, dilation)
        return values.min().item() ** 2, values.max().item() ** 2
    K, spread = _kernel(kernel), _pair("dilation", dilation)
    outputs = K.shape[0] * -(-height // rows) * -(-width // columns)
    smaller = min(outputs, K.shape[1] * height * width)
    if smaller > DENSE_LIMIT:
        raise ValueError(
            f"a stride of {(rows, columns)} does not divide a size of {(height, width)}, and the operator is "
            f"too large to be made dense: its smaller side is {smaller}, above {DENSE_LIMIT}"
        )
    down, right = (
        torch.arange(n + d * (k - 1), device=K.device) % n
        for n, d, k in zip((height, width), spread, K.shape[2:], strict=True)
    )
    domain, reach = (K.shape[1], height, width), (K.shape[0], -(-height // rows), -(-width // columns))

    def apply(x: Tensor) -> Tensor:
        return F.conv2d(x[:, :, down][..., right], K, None, (rows, columns), 0, spread)

    def adjoint(y: Tensor) -> Tensor:
        return torch.func.vjp(apply, y.new_zeros(len(y), *domain))[1](y)[0]

    values = _values(apply, adjoint, domain, reach, K, DENSE_LIMIT)
    return values[-1].item() ** 2, values[0].item() ** 2


def padded_frame_bounds(
    kernel: Tensor,
    size: Pair,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    restarts: int = 5,
) -> tuple[float, float, float]:
    """The frame bounds of a zero-padded convolution: A*, estimated, the residual of that, and B*, a bound.

    B* is the square of `padded_bound`. A* comes from Lanczos on B* I - G, G the smaller Gram matrix. It is
    never below the smallest eigenvalue of G but for rounding, and some eigenvalue of G lies within the
    residual of it, though perhaps not the smallest: it is no bound.

    Args:
        kernel, size, stride, padding, dilation: as for `padded_norm`.
        restarts: how many times Lanczos continues from its best vector, unless it has converged to 1e-9 B*.

    Raises:
        ValueError: a bad shape, or a kernel that is larger than the padded image.
    """
    operator = convolution(kernel, size, stride, padding, dilation)
    B = padded_bound(kernel, size, padding, stride, dilation) ** 2
    gram, shape = operator.gram()
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(1, math.prod(shape), generator=generator, device="cpu", dtype=torch.float64)
    vector = vector.to(operator.kernel.device)
    if not B:
        return 0.0, 0.0, 0.0

    def rest(z: Tensor) -> Tensor:
        return B * z - gram(z.view(-1, *shape)).flatten(1)

    value = residual = vector.new_zeros(1)
    for _ in range(restarts + 1):
        value, vector, residual = lanczos(rest, vector, 1e-9, 200)
        if residual.item() <= 1e-9 * B:
            break
    return max(B - value.item(), 0.0), residual.item(), B


def padded_bound(
    kernel: Tensor, size: Pair, padding: Padding = 0, stride: Pair = 1, dilation: Pair = 1
) -> float:
    """An upper bound on the spectral norm of a zero-padded convolution.

    Place the image on a torus of T = H + max(above, below) rows (columns likewise), behind `above` rows of
    zeros. An output u reads the rows u + d k of the padded image, all in [0, H + above + below). A padding
    row is, modulo T, again outside the image, so each output equals one of the circular convolution on the
    torus. At stride 1 there are H + above + below - d (kh - 1) outputs. That is at most T if one of the
    paddings is at most d (kh - 1). Otherwise only H + d (kh - 1) < T consecutive outputs read the image, and
    the others are 0. So the nonzero outputs are on different rows of the torus, and the operator is a
    submatrix of the circular one, whose norm is an upper bound. With a stride, T is rounded up to a multiple
    of it, so that the strided circular convolution has these outputs too.

    Returns:
        The norm of the circular convolution on that torus, with a margin for rounding.

    Raises:
        ValueError: a bad shape, or a kernel that is larger than the padded image.
    """
    operator = convolution(kernel, size, stride, padding, dilation)
    torus = [
        -(-(n + max(p)) // s) * s
        for n, p, s in zip(operator.size, operator.padding, operator.stride, strict=True)
    ]
    blocks = transfer_matrices(operator.kernel, (torus[0], torus[1]), operator.stride, operator.dilation)
    gram = blocks.mH @ blocks if blocks.shape[-1] < blocks.shape[-2] else blocks @ blocks.mH
    squared = torch.linalg.eigvalsh(gram)[..., -1].max().item()
    return math.sqrt(max(squared, 0)) * (1 + 1e-12)


def padded_norm(
    kernel: Tensor,
    size: Pair,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    tolerance: float = 1e-6,
) -> float:
    """The spectral norm of a zero-padded convolution on (in, H, W) images.

    By Lanczos on A^T A (or A A^T, if smaller), from a random start: see `largest_singular_values`.

    Args:
        kernel: (out, in, kh, kw).
        size: (H, W) of the image, or one number for both.
        stride, padding, dilation: as in `nn.Conv2d`, including `"same"` and `"valid"`.
        tolerance: of the residual, relative to ||A||^2.

    Raises:
        ValueError: a bad shape, or a kernel that is larger than the padded image.
        RuntimeError: no convergence.
    """
    operator = convolution(kernel, size, stride, padding, dilation)
    gram, shape = operator.gram()
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, math.prod(shape), generator=generator, device="cpu", dtype=torch.float64)
    values, _ = largest_singular_values(
        lambda z: gram(z.view(-1, *shape)).flatten(1), start.to(operator.kernel.device), tolerance
    )
    return values.item()


def padded_singular_values(
    kernel: Tensor,
    size: Pair,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    limit: int = DENSE_LIMIT,
) -> Tensor | None:
    """All singular values of a zero-padded convolution.

    They are computed from the dense matrix if no side exceeds 2 `limit`, otherwise from the Gram matrix of
    the smaller side. There values below about 1e-6 of the largest are lost in rounding, and returned as 0.

    Args:
        kernel, size, stride, padding, dilation: as for `padded_norm`.
        limit: the largest smaller side of a dense matrix.

    Returns:
        (k,), descending, where k is the smaller side; None if k > `limit`.

    Raises:
        ValueError: a bad shape, or a kernel that is larger than the padded image.
    """
    operator = convolution(kernel, size, stride, padding, dilation)
    inputs, outputs = math.prod(operator.domain), math.prod(operator.range)
    if min(inputs, outputs) > limit:
        return None
    return _values(operator.apply, operator.adjoint, operator.domain, operator.range, operator.kernel, limit)


def _values(
    apply: Map, adjoint: Map, domain: Sequence[int], reach: Sequence[int], like: Tensor, limit: int
) -> Tensor:
    """All singular values of a linear map from `domain` to `reach`, see `padded_singular_values`."""
    inputs, outputs = math.prod(domain), math.prod(reach)
    larger = max(inputs, outputs)
    if larger <= 2 * limit:
        return torch.linalg.svdvals(_matrix(apply, domain, like, larger))
    if inputs <= outputs:
        gram = _matrix(lambda x: adjoint(apply(x)), domain, like, larger)
    else:
        gram = _matrix(lambda y: apply(adjoint(y)), reach, like, larger)
    squares = torch.linalg.eigvalsh(gram).flip(0)
    noise = len(squares) * torch.finfo(torch.float64).eps * squares[0]
    return squares.where(squares > noise, 0.0).sqrt()


def convolution(kernel: Tensor, size: Pair, stride: Pair, padding: Padding, dilation: Pair) -> Convolution:
    """The operator with these arguments of `nn.Conv2d`.

    Raises:
        ValueError: a bad shape, or a kernel that is larger than the padded image.
    """
    kernel = _kernel(kernel)
    steps, spread = _pair("stride", stride), _pair("dilation", dilation)
    if padding == "same":
        if steps != (1, 1):
            raise ValueError("padding 'same' is for stride 1")
        total = [d * (k - 1) for d, k in zip(spread, kernel.shape[2:], strict=True)]
        edges = [(t // 2, t - t // 2) for t in total]
    elif isinstance(padding, str) and padding != "valid":
        raise ValueError(f"padding must be numbers, 'same' or 'valid'; got {padding!r}")
    else:
        amount = (0, 0) if isinstance(padding, str) else _pair("padding", padding, low=0)
        edges = [(p, p) for p in amount]
    operator = Convolution(kernel, _pair("size", size), steps, (edges[0], edges[1]), spread)
    if min(operator._slack()) < 0:
        raise ValueError(f"a kernel of {tuple(kernel.shape[2:])} is larger than the padded image")
    return operator


def _matrix(apply: Map, shape: Sequence[int], like: Tensor, larger: int = 1) -> Tensor:
    """The transpose of the matrix of a linear map: a row for each unit vector of `shape`.

    `larger` is the most numbers in an input, an output or what is between them; so many are in memory.
    """
    identity = torch.eye(math.prod(shape), dtype=like.dtype, device=like.device)
    parts = identity.split(min(max(_NUMBERS // larger, 1), _BATCH))
    return torch.cat([apply(part.view(-1, *shape)).flatten(1) for part in parts])


def transfer_matrices(kernel: Tensor, size: tuple[int, int], stride: Pair = 1, dilation: Pair = 1) -> Tensor:
    """One matrix for each frequency: what the unitary DFT makes of the convolution of a periodic image.

    See `circular_singular_values` for their formula; differentiable in the kernel, and of its precision.

    Args:
        kernel: (out, in, kh, kw).
        size: (H, W) of the image.
        stride: s, which divides H and W.
        dilation: d.

    Returns:
        (H/s, W/s // 2 + 1, out, in s^2), complex: those of the other frequencies are their conjugates.

    Raises:
        ValueError: a stride that does not divide the size.
    """
    steps, spread = _pair("stride", stride), _pair("dilation", dilation)
    if any(n % s for n, s in zip(size, steps, strict=True)):
        raise ValueError(f"a stride of {steps} does not divide a size of {size}")
    waves = []
    for axis, (n, s, d, k) in enumerate(zip(size, steps, spread, kernel.shape[2:], strict=True)):
        apart = n // s
        some = torch.arange(apart // 2 + 1 if axis else apart, device=kernel.device)
        alike = some + apart * torch.arange(s, device=kernel.device)[:, None]
        # Reduce modulo n in integers, which is exact.
        turns = alike[:, :, None] * (d * torch.arange(k, device=kernel.device)) % n
        wave = torch.polar(torch.full_like(turns, 1 / math.sqrt(s), dtype=torch.float64),
                           -2 * math.pi * turns.double() / n)  # fmt: skip
        waves.append(wave.to(torch.promote_types(kernel.dtype, torch.complex32)))
    return torch.einsum("afy,oiyx,bgx->fgoabi", waves[0], kernel.to(waves[0].dtype), waves[1]).flatten(3)


def _kernel(kernel: Tensor) -> Tensor:
    if kernel.ndim != 4 or 0 in kernel.shape:
        raise ValueError(f"a kernel is (out, in, kh, kw); this one is {tuple(kernel.shape)}")
    return kernel.detach().double()


def _pair(name: str, value: Pair, low: int = 1) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(isinstance(v, bool) or not isinstance(v, int) or v < low for v in pair):
        raise ValueError(f"{name} must be one or two whole numbers of at least {low}; got {value!r}")
    return pair[0], pair[1]
