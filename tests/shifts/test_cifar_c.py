"""CIFAR-10-C and CIFAR-100-C in small files of the official layout."""

import pickle

import numpy as np
import pytest
import torch

from condlr._support.errors import UserError
from condlr.data.base import Data, Images
from condlr.shifts._cifar_c import EXTRA, STANDARD
from condlr.shifts.cifar10_c import Cifar10C
from condlr.shifts.cifar100_c import Cifar100C

KINDS = ["fog", "jpeg_compression"]
N = 6


@pytest.fixture
def data():
    """What a network was trained on: the labels count."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (N, 3, 32, 32), dtype=torch.uint8, generator=generator)
    images = Images(pixels, torch.randint(10, (N,), generator=generator))
    return Data(images, images, 10)


@pytest.fixture(params=[Cifar10C, Cifar100C])
def kind(request):
    return request.param


@pytest.fixture
def folder(tmp_path, kind, data):
    """Two corruptions: the test images, darker by the severity, and by 10 more in the second."""
    folder = tmp_path / kind.folder
    folder.mkdir()
    rows = data.test.pixels.permute(0, 2, 3, 1).numpy()
    for more, name in zip((0, 10), KINDS, strict=True):
        np.save(folder / f"{name}.npy", np.concatenate([rows - np.uint8(s + more) for s in range(1, 6)]))
    np.save(folder / "labels.npy", np.tile(data.test.labels.numpy().astype(np.uint8), 5))
    return folder


def test_a_severity_is_its_part_of_the_file(folder, kind, data):
    shift = kind(kinds=KINDS)
    sets = shift.sets(N, folder.parent)
    assert [*sets] == [(name, severity, N) for name in KINDS for severity in (1, 2, 3, 4, 5)]
    for which in sets:
        images = shift.make(which, data, folder.parent)
        darker = which.severity + (10 if which.name == KINDS[1] else 0)
        assert torch.equal(images.pixels, data.test.pixels - darker)
        assert torch.equal(images.labels, data.test.labels)


@pytest.mark.parametrize("kind_of_labels", [">i8", ">u2", "<i4"])
def test_labels_of_any_byte_order(folder, kind, data, kind_of_labels):
    np.save(folder / "labels.npy", np.load(folder / "labels.npy").astype(kind_of_labels))
    shift = kind(kinds=["fog"], severities=[2])
    (which,) = shift.sets(N, folder.parent)
    assert torch.equal(shift.make(which, data, folder.parent).labels, data.test.labels)


def test_only_the_first_images_of_a_severity(folder, kind, data):
    shift = kind(kinds=["fog"], severities=[3], images=4)
    ((which, images),) = [(s, shift.make(s, data, folder.parent)) for s in shift.sets(N, folder.parent)]
    assert which == ("fog", 3, 4)
    assert torch.equal(images.pixels, data.test.pixels[:4] - 3)


def test_the_usual_corruptions_are_fifteen_and_four_more_are_known():
    assert Cifar10C().kinds == [*STANDARD] and len({*STANDARD}) == 15 and len({*STANDARD, *EXTRA}) == 19
    assert Cifar10C(kinds=["saturate"]).kinds == ["saturate"]
    with pytest.raises(ValueError, match="kinds must be one of gaussian_noise, .*saturate; got 'rain'"):
        Cifar100C(kinds=["rain"])


def test_missing_files_are_named(folder, kind):
    with pytest.raises(UserError, match=rf"lacks files: put snow.npy, frost.npy into .*{kind.folder}"):
        kind(kinds=["fog", "snow", "frost"]).sets(N, folder.parent)


def test_labels_of_other_images_are_refused(folder, kind, data):
    shift = kind(kinds=["fog"])
    other = Data(data.train, Images(data.test.pixels, (data.test.labels + 1) % 10), 10)
    with pytest.raises(UserError, match="labels.npy differs from the labels of the network's test images"):
        shift.make(shift.sets(N, folder.parent)[0], other, folder.parent)
    with pytest.raises(UserError, match="has 6 images at each severity; the network has 7 test images"):
        shift.sets(7, folder.parent)


@pytest.mark.parametrize(
    "content",
    [
        lambda whole: b"",
        lambda whole: whole[:50],
        lambda whole: whole[:-1],
        lambda whole: b"PK\x03\x04" + whole,
        lambda whole: pickle.dumps([1, 2]),
        lambda whole: whole[:10] + b"{{{" + whole[13:],
    ],
)
def test_damaged_files_are_named(folder, kind, content):
    path = folder / "fog.npy"
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(UserError, match=r"fog.npy is damaged or truncated \(.*\); put the offi"):
        kind(kinds=["fog"]).sets(N, folder.parent)


@pytest.mark.parametrize(
    ("array", "pattern"),
    [
        (np.zeros((30, 3, 32, 32), np.uint8), r"fog.npy holds uint8 of \(30, 3, 32, 32\); expected uint8 of"),
        (np.zeros((30, 32, 32, 3), np.int32), r"fog.npy holds int32"),
        (np.zeros((30, 32, 32, 3), np.float32), r"fog.npy holds float32"),
        (np.zeros((29, 32, 32, 3), np.uint8), r"fog.npy holds uint8 of \(29, 32, 32, 3\)"),
        (np.zeros((25, 32, 32, 3), np.uint8), "has 25 images; expected 30, as labels.npy has"),
        (np.zeros((), np.uint8), r"fog.npy holds uint8 of \(\)"),
        (np.array([None] * 30), "damaged or truncated .*Python objects"),
    ],
)
def test_files_with_something_else_are_named(folder, kind, array, pattern):
    np.save(folder / "fog.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=pattern):
        kind(kinds=["fog"]).sets(N, folder.parent)
