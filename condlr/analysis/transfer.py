"""What the activations of a network know of labels that it has not learned."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import override

from condlr.analysis.base import Trained
from condlr.analysis.embeddings import Embeddings


@dataclass
class Transfer(Embeddings):
    """The accuracy of linear classifiers of other labels: of CIFAR-100's classes for its superclasses.

    As in `condlr.analysis.embeddings.Embeddings`, but the classifiers learn each other kind of label that the
    dataset has (arXiv 1804.07090, table 2). All dimensions of the activations are the transfer of the network
    as it is.
    """

    title: ClassVar[str] = "Transfer to other labels"
    caption: ClassVar[str] = "Accuracy of linear classifiers of labels that the network has not learned"
    keys: ClassVar[tuple[str, ...]] = ("labels", *Embeddings.keys)
    columns: ClassVar[Mapping[str, str]] = {"labels": "{labels}", **Embeddings.columns}
    order: ClassVar[int] = 44

    train_images: int = 10_000

    @override
    def require(self, trained: Trained) -> None:
        if not trained.data.train.others:
            raise ValueError("the dataset has only the labels that were learned; CIFAR-100 has two kinds")

    @override
    def rows(self, trained: Trained) -> Iterator[Mapping[str, Any]]:
        for name in trained.data.train.others:
            for row in self.scores(trained, lambda images, name=name: images.others[name]):
                yield {"labels": name, **row}
