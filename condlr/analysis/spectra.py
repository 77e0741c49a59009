"""The singular values of each layer before and after training, as an analysis."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import override

from condlr.analysis.base import Analysis, Layout, Trained
from condlr.analysis.conditioning import spectra


@dataclass
class Spectra(Analysis):
    """All singular values of all layers, at the start and at the end of training; for a figure."""

    title: ClassVar[str] = "Singular values"
    keys: ClassVar[tuple[str, ...]] = ("when", "layer", "index")
    columns: ClassVar[Mapping[str, str]] = {}
    layout: ClassVar[Layout] = "none"
    always: ClassVar[bool] = True
    long: ClassVar[bool] = True

    @override
    def rows(self, trained: Trained) -> Iterator[Mapping[str, Any]]:
        start = trained.start.build()
        # Making the optimiser may change the weights, and training starts after that
        trained.start.optimizer(start)
        for when, network in (("start", start), ("end", trained.model)):
            for name, values in spectra(network).items():
                for index, value in enumerate(values.tolist(), start=1):
                    found = f"{value:.7g}"
                    yield {"when": when, "layer": name, "index": index, "singular_value": found}
