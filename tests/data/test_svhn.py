"""SVHN in small files of the official format."""

import hashlib
import shutil
import sys

import numpy as np
import pytest
import torch
from scipy.io import savemat

from condlr._support.errors import UserError
from condlr.data import svhn
from condlr.data.svhn import Svhn
from tests.helpers import configured

SIZES = {"train": 30, "test": 12, "extra": 20}


@pytest.fixture
def root(tmp_path):
    """Small files, compressed as the official ones are."""
    generator = np.random.default_rng(0)
    (tmp_path / "svhn").mkdir()
    for name, n in SIZES.items():
        pixels = generator.integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
        labels = np.arange(n, dtype=np.uint8)[:, None] % 10 + 1
        savemat(path_of(tmp_path, name), {"X": pixels, "y": labels}, do_compression=True)
    return tmp_path


def path_of(root, name):
    return root / "svhn" / f"{name}_32x32.mat"


@pytest.fixture
def official(root, monkeypatch):
    """Our small files are taken for the official ones."""
    for name in SIZES:
        digest = hashlib.md5(path_of(root, name).read_bytes()).hexdigest()
        monkeypatch.setitem(svhn.OFFICIAL, f"{name}_32x32.mat", digest)


def test_images_are_upright_and_the_digit_0_is_class_0(root):
    from scipy.io import loadmat

    data = Svhn().load(root)
    assert (data.shape, data.classes, len(data.train), len(data.test)) == ((3, 32, 32), 10, 30, 12)
    assert data.test.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    pixels = loadmat(path_of(root, "test"))["X"]
    assert data.test.pixels[7, 2, 5, 20] == pixels[5, 20, 2, 7]
    assert torch.equal(data.test.pixels[3, 0], torch.from_numpy(pixels[:, :, 0, 3]))
    assert data.standard == (svhn.MEAN, svhn.DEVIATION)
    assert Svhn(standardize=False).load(root).standard is None


@pytest.mark.parametrize("kind", ["uint16", "uint32", "uint64", "int16", "float32"])
def test_labels_of_any_number_type_of_matlab_are_read(root, kind):
    from scipy.io import loadmat, savemat

    plain, content = Svhn().load(root), loadmat(path_of(root, "test"))
    savemat(path_of(root, "test"), {"X": content["X"], "y": content["y"].astype(kind)})
    assert torch.equal(Svhn().load(root).test.labels, plain.test.labels)
    savemat(path_of(root, "test"), {"X": content["X"], "y": content["y"].astype("complex64")})
    with pytest.raises(UserError, match="is not a file of SVHN"):
        Svhn().load(root)


def test_the_extra_images_are_added_to_the_training_images(root):
    plain, more = Svhn().load(root), Svhn(extra=True).load(root)
    assert len(more.train) == 50
    assert torch.equal(more.train.pixels[:30], plain.train.pixels)
    assert torch.equal(more.train.labels[:30], plain.train.labels)
    assert torch.equal(more.test.pixels, plain.test.pixels)


def test_official_files_are_known_and_swapped_ones_are_named(root, official, caplog):
    assert Svhn(extra=True).load(root).official
    assert not caplog.text
    shutil.copy(path_of(root, "test"), path_of(root, "train"))
    with pytest.raises(UserError, match=r"train_32x32.mat is SVHN's test_32x32.mat; expected SVHN's train"):
        Svhn().load(root)
    savemat(path_of(root, "train"), {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[1], [10]])})
    assert not Svhn().load(root).official
    assert "train_32x32.mat is not the official file (MD5 " in caplog.text


def test_damaged_files_are_named(root):
    path = path_of(root, "train")
    whole = path.read_bytes()
    for end in (0, 3, 127, 128, 140, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"train_32x32.mat is .*; remove it, and it is fetched again$"):
            Svhn().load(root)
    for place in range(124, 400, 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :])
        try:
            Svhn().load(root)
        except UserError as error:
            assert str(error).isprintable()
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + whole)
    with pytest.raises(UserError, match="is damaged, or not a MATLAB file of version 5"):
        Svhn().load(root)


@pytest.mark.parametrize(
    ("arrays", "pattern"),
    [
        ({"X": np.zeros((32, 32, 3, 4), np.uint8)}, "not a file of SVHN .'y'"),
        ({"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.ones(3)}, r"X is \(32, 32, 3, 4\) uint8, with 3"),
        ({"X": np.zeros((4, 32, 32, 3), np.uint8), "y": np.ones(4)}, r"X is \(4, 32, 32, 3\) uint8"),
        ({"X": np.zeros((32, 32, 3, 4)), "y": np.ones(4)}, r"X is \(32, 32, 3, 4\) float64"),
        ({"X": np.zeros((32, 32, 3, 0), np.uint8), "y": np.ones(0)}, r"X is \(32, 32, 3, 0\)"),
        ({"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.array([0, 1, 2, 3])}, "its labels are 0 to 3"),
        ({"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.array([1, 2, 3, 11])}, "its labels are 1 to 11"),
        ({"X": "digits", "y": "labels"}, "expected X of"),
    ],
)
def test_files_with_something_else_are_named(root, arrays, pattern):
    savemat(path_of(root, "test"), arrays)
    with pytest.raises(UserError, match=f"{pattern}.*remove it"):
        Svhn().load(root)


def test_only_the_missing_splits_are_fetched(root, tmp_path, monkeypatch):
    import torchvision.datasets

    asked, empty = [], tmp_path / "empty"

    class Kind:
        split_list = torchvision.datasets.SVHN.split_list

        def __init__(self, scratch, split, download):
            asked.append(split)
            shutil.copy(path_of(root, split), scratch)

    monkeypatch.setattr(torchvision.datasets, "SVHN", Kind)
    with pytest.raises(UserError, match=r"download=false: put train_32x32.mat, test_32x32.mat into .*svhn"):
        Svhn(download=False).load(empty)
    assert Svhn().load(empty).digest == Svhn().load(root).digest
    assert Svhn(extra=True).load(empty).digest == Svhn(extra=True).load(root).digest
    assert asked == ["train", "test", "extra"]


def test_without_scipy_it_says_what_to_install(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    monkeypatch.delitem(sys.modules, "scipy", raising=False)
    with pytest.raises(UserError, match=r"dataset=svhn needs scipy.*pip install 'condlr\[suite\]'"):
        Svhn().load(root)


def test_the_frame_protocol_mirrors_no_digit():
    arguments = ["protocol=frame", "model=resnet18", "method=baseline"]
    checked = {name: configured(*arguments, f"dataset={name}") for name in ("svhn", "cifar10")}
    assert {name: config.protocol.augmentation for name, config in checked.items()} == {
        "svhn": "crop", "cifar10": "crop_flip"
    }  # fmt: skip
