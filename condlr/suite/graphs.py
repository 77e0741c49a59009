"""A training step as one CUDA graph: recorded once, then replayed without Python."""

import logging
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Step = Callable[[Tensor, Tensor], None]

# Steps before the recording. They allocate what lives longer than a step (momentum), let libraries choose
# their algorithms, and bring cold starts to where the fast maps hold.
_WARM_UP = 3


class GraphedStep:
    """`step(images, labels)`, replayed as a CUDA graph where possible.

    Each batch size gets a graph of its own. A step that cannot be recorded always runs without a graph, and
    the reason is logged.

    Attributes:
        reason: why the step cannot be recorded, or None.

    Args:
        step: changes tensors only in place, reads nothing back from the device, and does the same at each
            call with images of one shape, until `renew` is called.
    """

    def __init__(self, step: Step):
        self._step = step
        self._graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._taken: dict[torch.Size, int] = {}
        self._made_for: Hashable = None
        self.reason: str | None = None
        self._stream: torch.cuda.Stream | None = None

    def renew(self, made_for: Hashable) -> None:
        """Drop recorded graphs unless the settings are the same: graphs hold settings as constants."""
        if made_for != self._made_for:
            self._graphs.clear()
            self._taken.clear()
            self._made_for = made_for

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Take the step, by a graph if there is one."""
        shape = images.shape
        warm = self._taken.get(shape, 0) >= _WARM_UP
        if self.reason is None and shape not in self._graphs and warm:
            self._record(images, labels)
        if self.reason is not None:
            self._step(images, labels)
        elif shape in self._graphs:
            graph, static_images, static_labels = self._graphs[shape]
            static_images.copy_(images)
            static_labels.copy_(labels)
            graph.replay()
        else:
            self._taken[shape] = self._taken.get(shape, 0) + 1
            self._aside(images, labels)

    def _aside(self, images: Tensor, labels: Tensor) -> None:
        """Take the step on another stream, as PyTorch requires before a recording."""
        stream = self._stream = self._stream or torch.cuda.Stream(images.device)
        stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(stream):
            self._step(images, labels)
        torch.cuda.current_stream(images.device).wait_stream(stream)

    def _record(self, images: Tensor, labels: Tensor) -> None:
        graph, static = torch.cuda.CUDAGraph(), (images.clone(), labels.clone())
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._step(*static)
        except RuntimeError as error:
            self._graphs.clear()  # of other sizes: one memory pool less, and one way for all steps
            self.reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning("this step cannot be made a CUDA graph, so it runs without: %s", self.reason)
            return
        self._graphs[images.shape] = graph, *static
