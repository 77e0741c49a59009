"""The dense network."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from typing_extensions import override

from condlr.factorization import Scheme
from condlr.methods.base import Method


@dataclass
class Baseline(Method):
    """Dense weights and plain SGD: the row that other rows are compared with.

    With `classifier=full_rank` its last layer is a product of three unconstrained factors, as in the
    authors' code.
    """

    title: ClassVar[str] = "Baseline"
    order: ClassVar[int] = 0
    colours: ClassVar[Mapping[str, str]] = {"baseline": "#000000"}

    @property
    @override
    def compresses(self) -> bool:
        return False

    @property
    @override
    def capturable(self) -> bool:
        return True

    @override
    def apply(self, model: nn.Module, scheme: Scheme) -> nn.Module:
        assert scheme.compression is None, "this method does not compress"
        return self.factored(model, scheme)
