"""A network meets the test images of another dataset."""

import csv

import numpy as np
import pytest
import torch

from condlr._support.errors import UserError
from condlr.data.base import Data, Images
from condlr.data.digits import Digits
from condlr.shifts.dataset import OtherDataset
from tests.helpers import SMALL, complains, write_idx


@pytest.fixture
def root(tmp_path):
    """A root with a small MNIST."""
    generator = np.random.default_rng(0)
    for part, n in (("train", 40), ("t10k", 25)):
        raw = tmp_path / "MNIST" / "raw"
        write_idx(raw / f"{part}-images-idx3-ubyte", generator.integers(0, 256, (n, 28, 28)))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(n) % 10)
    return tmp_path


@pytest.mark.parametrize("images", [None, 7])
def test_it_is_the_other_test_images(root, images):
    digits, shift = Digits().load(root), OtherDataset(other="mnist", images=images)
    (which,) = shift.sets(len(digits.test), root)
    assert which == ("mnist", None, images or 25)
    made = shift.make(which, digits, root)
    assert made.labels.tolist() == [k % 10 for k in range(images or 25)]
    assert made.pixels.shape[1:] == (1, 28, 28)
    assert not torch.equal(made.pixels[:7], digits.test.pixels[:7])


def test_images_or_classes_that_do_not_fit_are_named(root):
    digits, shift = Digits().load(root), OtherDataset(other="mnist")
    (which,) = shift.sets(360, root)
    coloured = Images(digits.test.pixels.expand(-1, 3, -1, -1), digits.test.labels)
    for data, ours in (
        (Data(digits.train, digits.test, 20), "20 classes and images of 1 x 28 x 28"),
        (Data(coloured, coloured, 10), "10 classes and images of 3 x 28 x 28"),
    ):
        with pytest.raises(UserError, match=f"mnist does not fit .* 10 classes and .* the network {ours}$"):
            shift.make(which, data, root)
    with pytest.raises(ValueError, match="other must be one of cifar10, .*; got 'imagenet'"):
        OtherDataset(other="imagenet")
    with pytest.raises(ValueError, match="images=26, but there are only 25"):
        OtherDataset(other="mnist", images=26).sets(360, root)
    with pytest.raises(UserError, match="SVHN"):
        OtherDataset(other="svhn").sets(360, root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte")


@pytest.mark.slow
def test_a_run_is_tried_on_another_dataset_from_the_command_line(script, root):
    assert script("train", *SMALL, "method=baseline", "study=s", f"data_root={root}")[0] == 0
    (run,) = (root / "runs" / "s").glob("lenet5-*")
    asked = ["evaluate", f"run={run}", "shift=dataset"]
    complains(script(*asked, "shift.other=faces"), "shift.other must be one of cifar10, .*; got 'faces'")
    asked.append("shift.other=mnist")
    complains(script(*asked, "shift.images=99"), "shift.images=99, but there are only 25")
    status, out, err = script(*asked)
    assert status == 0, out + err
    assert "mnist" in out
    with (run / "shift.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["shift"], row["name"], row["severity"], row["n"]) == ("dataset", "mnist", "", "25")
    assert float(row["accuracy"]) * 25 == round(float(row["accuracy"]) * 25)
    for name in ("collect", "tables", "report"):
        status, out, err = script(name, "study=s")
        assert status == 0, out + err
    report = (root / "results" / "s" / "report.md").read_text()
    assert "run='runs/s/*' shift=dataset shift.other=mnist shift.images=25\n" in report
    table = (root / "results" / "s" / "shift.md").read_text()
    assert table.startswith("**Another dataset: accuracy in %**\n\n| run | clean | mnist (n=25) |")
