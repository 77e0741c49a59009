"""Convolutions of low rank, in one to three dimensions, and transposed ones."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from condlr.layers import LowRank, options
from condlr.product import Product

Size = int | tuple[int, ...]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class _Convolution(LowRank):
    """What plain and transposed convolutions share; `dense` is the layer of PyTorch that they replace."""

    dense: ClassVar[type[nn.Module]]

    @property
    def filters(self) -> Tensor:
        """V^T as r filters: (r, in_channels, *kernel_size), or of a transposed one (r, out_channels, ...)."""
        return self._as_kernel(self.Vt)

    @property
    def weight(self) -> Tensor:
        """The kernel in the shape of PyTorch's layer; see `Product`."""
        return Product.of(self._as_kernel(self.matrix))

    def _as_kernel(self, matrix: Tensor) -> Tensor:
        raise NotImplementedError

    def _mixed(self, z: Tensor, M: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution with a kernel of one pixel."""
        raise NotImplementedError

    @override
    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        return f"{text}, rank={self.rank}, stride={self.stride}" + options(self)


class _In1d(_Convolution):
    @override
    def _mixed(self, z: Tensor, M: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv1d(z, M[:, :, None], bias)


class _In2d(_Convolution):
    @override
    def _mixed(self, z: Tensor, M: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(z, M[:, :, None, None], bias)


class _In3d(_Convolution):
    @override
    def _mixed(self, z: Tensor, M: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv3d(z, M[:, :, None, None, None], bias)


class _Conv(_Convolution):
    """A convolution whose kernel, viewed as out x (in * area), is U S V^T (see `LowRank` for other cores).

    It is computed as a convolution with the r filters V^T, then one of a single pixel with U S, or as one
    convolution with the product (see `LowRank.form`). It takes the arguments of PyTorch's layer except
    `groups`.

    Shapes:
        input: (N, in_channels, ...) or (in_channels, ...); the result as in PyTorch.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        rank: int,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        core: str = "full",
        device=None,
        dtype=None,
    ):
        # A dense layer on the meta device checks and normalises the arguments as PyTorch does.
        twin: Any = self.dense(
            in_channels, out_channels, kernel_size, stride, padding, dilation,
            padding_mode=padding_mode, device="meta",
        )  # fmt: skip
        n, m = out_channels, twin.weight[0].numel()
        super().__init__(n, m, rank, n if bias else 0, core, device, dtype)
        # Set here, so that the copies of layers know them as a layer's own
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.dilation = twin.kernel_size, twin.stride, twin.dilation
        self.padding, self.padding_mode = twin.padding, twin.padding_mode
        self._pad = list(twin._reversed_padding_repeated_twice)
        zeros = tuple(0 for _ in twin.kernel_size)
        self._padding = twin.padding if padding_mode == "zeros" else zeros

    @classmethod
    @override
    def shaped_like(cls, dense: Any, rank: int, core: str = "full") -> "_Conv":
        if dense.groups != 1:
            raise ValueError(f"a grouped convolution (groups={dense.groups}) stays dense")
        layer = cls(
            dense.in_channels, dense.out_channels, dense.kernel_size, rank, dense.stride, dense.padding,
            dense.dilation, dense.bias is not None, dense.padding_mode, core,
            device="meta", dtype=dense.weight.dtype,
        )  # fmt: skip
        layer.take_over(dense)
        return layer

    def _convolved(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    @override
    def forward(self, input: Tensor) -> Tensor:
        if self.padding_mode != "zeros":
            input = F.pad(input, self._pad, mode=self.padding_mode)
        if self.form == "multiplied":
            return self._convolved(input, self._as_kernel(self.matrix), self.bias)
        z, S = self._convolved(input, self.filters, None), self.S
        if self.form == "factored" or S is None:
            return self._mixed(z, self.left, self.bias)
        core = S if self.core == "full" else torch.diag(S)
        return self._mixed(self._mixed(z, core, None), self.U, self.bias)


class LowRankConv1d(_In1d, _Conv):
    """A replacement of `nn.Conv1d`; see `_Conv`."""

    dense = nn.Conv1d

    @override
    def _as_kernel(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1, self.in_channels, self.kernel_size[0])

    @override
    def _convolved(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv1d(x, kernel, bias, self.stride, self._padding, self.dilation)


class LowRankConv2d(_In2d, _Conv):
    """A replacement of `nn.Conv2d`; see `_Conv`."""

    dense = nn.Conv2d

    @override
    def _as_kernel(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1, self.in_channels, self.kernel_size[0], self.kernel_size[1])

    @override
    def _convolved(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, kernel, bias, self.stride, self._padding, self.dilation)


class LowRankConv3d(_In3d, _Conv):
    """A replacement of `nn.Conv3d`; see `_Conv`."""

    dense = nn.Conv3d

    @override
    def _as_kernel(self, matrix: Tensor) -> Tensor:
        size = self.kernel_size
        return matrix.reshape(-1, self.in_channels, size[0], size[1], size[2])

    @override
    def _convolved(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv3d(x, kernel, bias, self.stride, self._padding, self.dilation)


class _ConvTranspose(_Convolution):
    """A transposed convolution whose kernel, viewed as in x (out * area), is U S V^T.

    It is computed as a convolution of a single pixel with (U S)^T, then a transposed one with the r filters
    V^T, or as one with the product. It takes the arguments of PyTorch's layer except `groups`.

    Shapes:
        input: (N, in_channels, ...) or (in_channels, ...); the result as in PyTorch.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        rank: int,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        dilation: Size = 1,
        bias: bool = True,
        core: str = "full",
        device=None,
        dtype=None,
    ):
        twin: Any = self.dense(
            in_channels, out_channels, kernel_size, stride, padding, output_padding,
            dilation=dilation, device="meta",
        )  # fmt: skip
        m = twin.weight[0].numel()
        super().__init__(in_channels, m, rank, out_channels if bias else 0, core, device, dtype)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.dilation = twin.kernel_size, twin.stride, twin.dilation
        self.padding, self.padding_mode = twin.padding, twin.padding_mode
        self.output_padding = twin.output_padding

    @classmethod
    @override
    def shaped_like(cls, dense: Any, rank: int, core: str = "full") -> "_ConvTranspose":
        if dense.groups != 1:
            raise ValueError(f"a grouped convolution (groups={dense.groups}) stays dense")
        layer = cls(
            dense.in_channels, dense.out_channels, dense.kernel_size, rank, dense.stride, dense.padding,
            dense.output_padding, dense.dilation, dense.bias is not None, core,
            device="meta", dtype=dense.weight.dtype,
        )  # fmt: skip
        layer.take_over(dense)
        return layer

    def _spread(self, z: Tensor, kernel: Tensor, bias: Tensor | None, missing: list[int]) -> Tensor:
        raise NotImplementedError

    @override
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Compute y; `output_size` chooses among the sizes that give x, as in PyTorch."""
        missing = list(self.output_padding)
        if output_size is not None:
            known = list(self.stride), list(self.padding), list(self.dilation), list(self.kernel_size)
            missing = _missing(list(input.shape), output_size, *known)
        if self.form == "multiplied":
            return self._spread(input, self._as_kernel(self.matrix), self.bias, missing)
        S = self.S
        if self.form == "factored" or S is None:
            z = self._mixed(input, self.left.mT, None)
        else:
            core = S.mT if self.core == "full" else torch.diag(S)
            z = self._mixed(self._mixed(input, self.U.mT, None), core, None)
        return self._spread(z, self.filters, self.bias, missing)


def _missing(
    given: list[int],
    wanted: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    kernel_size: list[int],
) -> list[int]:
    """The output padding that gives outputs of the size `wanted`, for inputs of the shape `given`."""
    dims = len(kernel_size)
    if len(wanted) == len(given):
        wanted = wanted[len(given) - dims :]
    if len(wanted) != dims:
        raise ValueError(f"output_size has {dims} or {len(given)} numbers; got {wanted}")
    least = [
        (given[d - dims] - 1) * stride[d] - 2 * padding[d] + dilation[d] * (kernel_size[d] - 1) + 1
        for d in range(dims)
    ]
    missing = [wanted[d] - least[d] for d in range(dims)]
    if not all([0 <= missing[d] < stride[d] for d in range(dims)]):  # noqa: C419 (TorchScript has no generators)
        most = [least[d] + stride[d] - 1 for d in range(dims)]
        raise ValueError(f"output_size is from {least} to {most} here; got {wanted}")
    return missing


class LowRankConvTranspose1d(_In1d, _ConvTranspose):
    """A replacement of `nn.ConvTranspose1d`; see `_ConvTranspose`."""

    dense = nn.ConvTranspose1d

    @override
    def _as_kernel(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1, self.out_channels, self.kernel_size[0])

    @override
    def _spread(self, z: Tensor, kernel: Tensor, bias: Tensor | None, missing: list[int]) -> Tensor:
        return F.conv_transpose1d(z, kernel, bias, self.stride, self.padding, missing, 1, self.dilation)


class LowRankConvTranspose2d(_In2d, _ConvTranspose):
    """A replacement of `nn.ConvTranspose2d`; see `_ConvTranspose`."""

    dense = nn.ConvTranspose2d

    @override
    def _as_kernel(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1, self.out_channels, self.kernel_size[0], self.kernel_size[1])

    @override
    def _spread(self, z: Tensor, kernel: Tensor, bias: Tensor | None, missing: list[int]) -> Tensor:
        return F.conv_transpose2d(z, kernel, bias, self.stride, self.padding, missing, 1, self.dilation)


class LowRankConvTranspose3d(_In3d, _ConvTranspose):
    """A replacement of `nn.ConvTranspose3d`; see `_ConvTranspose`."""

    dense = nn.ConvTranspose3d

    @override
    def _as_kernel(self, matrix: Tensor) -> Tensor:
        size = self.kernel_size
        return matrix.reshape(-1, self.out_channels, size[0], size[1], size[2])

    @override
    def _spread(self, z: Tensor, kernel: Tensor, bias: Tensor | None, missing: list[int]) -> Tensor:
        return F.conv_transpose3d(z, kernel, bias, self.stride, self.padding, missing, 1, self.dilation)


CONVOLUTIONS: tuple[type[_Conv], ...] = (LowRankConv1d, LowRankConv2d, LowRankConv3d)
TRANSPOSED: tuple[type[_ConvTranspose], ...] = (
    LowRankConvTranspose1d, LowRankConvTranspose2d, LowRankConvTranspose3d
)  # fmt: skip
