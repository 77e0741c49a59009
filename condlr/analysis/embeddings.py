"""How well a few dimensions of a network's activations classify."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from condlr._support.errors import in_range
from condlr.analysis._activations import activations, chosen
from condlr.analysis.base import Analysis, Trained
from condlr.data.base import Images
from condlr.evaluation import first

# The classifiers, and their titles
CLASSIFIERS = {"svm": "support vectors", "logistic": "logistic regression"}
# The compression of embeddings whose accuracy arXiv 1804.07090 tells.
COMPRESSION = 400


@dataclass
class Embeddings(Analysis):
    """The test accuracy of a linear classifier on the first r principal components of the activations.

    The components are those of the training images. The classifier is trained on these, too: scikit-learn's
    `LinearSVC`, of the largest margin, and its logistic regression, both with C = 1, on components divided by
    the standard deviation of the first, since C depends on the scale.

    Attributes:
        layers: names of modules, for their outputs, or `name.input`; empty for the input of the last linear
            layer.
        dimensions: r; those beyond the number of activations are left out. One in 400 of the activations, and
            all if they are at most 2048, are added.
        train_images: the first so many training images; all test images are used.
    """

    title: ClassVar[str] = "Low-dimensional embeddings"
    caption: ClassVar[str] = "Accuracy of linear classifiers on the first principal components"
    legend: ClassVar[str] = (
        "Components of the activations of {train_images} training images; r: their number; of: that of the "
        "activations; compression: the latter by the former. Accuracy on all test images, in percent."
    )
    keys: ClassVar[tuple[str, ...]] = ("layer", "train_images", "dimensions", "classifier")
    columns: ClassVar[Mapping[str, str]] = {
        "layer": "{layer}", "r": "{dimensions}", "of": "{activations}", "compression": "{reduction}",
        "classifier": "{classifier}", "accuracy": "{percent:.2f}",
    }  # fmt: skip
    order: ClassVar[int] = 43
    packages: ClassVar[tuple[str, ...]] = ("sklearn",)

    layers: list[str] = field(default_factory=list)
    dimensions: list[int] = field(default_factory=lambda: [1, 2, 5, 10, 20, 50, 100])
    train_images: int = 5000

    def __post_init__(self) -> None:
        in_range("train_images", self.train_images, 2, math.inf)
        for number in self.dimensions:
            in_range("dimensions", number, 1, math.inf)

    @override
    def lacks(self, there: Sequence[Mapping[str, Any]], trained: Trained) -> bool:
        sizes = {row["layer"]: int(float(row["activations"])) for row in there}
        for layer in self.layers or sizes or [""]:
            most = min(sizes.get(layer, 0), self.train_images)
            few = [number for number in self.dimensions if number <= most]
            one = replace(self, layers=[layer], dimensions=few)
            if super(Embeddings, one).lacks(there, trained):
                return True
        return False

    @override
    def rows(self, trained: Trained) -> Iterator[Mapping[str, Any]]:
        return self.scores(trained, lambda images: images.labels)

    def scores(self, trained: Trained, of: Callable[[Images], Tensor]) -> Iterator[dict[str, Any]]:
        """The rows where the classifiers learn the labels that `of` takes from the images."""
        data, model = trained.data, trained.model
        names = chosen(model, self.layers, data.shape)
        images = first(data.train, min(self.train_images, len(data.train)))
        labels, truth = (of(part).cpu() for part in (images, data.test))
        for name in names:  # one at a time: some have many dimensions
            A, B = (activations(model, part, [name])[name].double() for part in (images, data.test))
            m = A.shape[1]
            dimensions = self._dimensions(m, len(A))
            learned, tested = components(A, B, dimensions)
            for r in dimensions:
                for classifier in CLASSIFIERS:
                    share = accuracy(classifier, learned[:, :r], labels, tested[:, :r], truth)
                    yield {
                        "layer": name, "train_images": len(images), "dimensions": r, "classifier": classifier,
                        "activations": m, "reduction": m / r, "percent": 100 * share,
                    }  # fmt: skip

    def _dimensions(self, m: int, n: int) -> list[int]:
        whole = {m} if m <= 2048 else set()
        wanted = {*self.dimensions, max(1, round(m / COMPRESSION)), *whole}
        return sorted(r for r in wanted if r <= min(m, n))


def components(A: Tensor, B: Tensor, dimensions: list[int]) -> tuple[Tensor, Tensor]:
    """The leading principal components of A (n, m) and of B, in units of the first's standard deviation."""
    mean, most = A.mean(0), max(dimensions)
    if len(A) >= A.shape[1]:
        centred = A - mean
        V = torch.linalg.eigh(centred.mT @ centred).eigenvectors.flip(1)[:, :most]
    else:
        V = torch.linalg.svd(A - mean, full_matrices=False).Vh[:most].mT
    learned, tested = (A - mean) @ V, (B - mean) @ V
    scale = learned[:, 0].std().clamp_min(1e-30)
    return learned / scale, tested / scale


def accuracy(classifier: str, learned: Tensor, labels: Tensor, tested: Tensor, truth: Tensor) -> float:
    """Train a linear classifier on one set of points, and score it on another."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import LinearSVC

    made = LinearSVC(random_state=0) if classifier == "svm" else LogisticRegression(max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the last digits do not matter here
        made.fit(learned.numpy(), labels.numpy())
    return float(made.score(tested.numpy(), truth.numpy()))
