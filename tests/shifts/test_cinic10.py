"""CINIC-10 in small files of the official layout."""

import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import write_png

from condlr._support.errors import UserError
from condlr.data.base import Data, Images
from condlr.shifts import cinic10
from condlr.shifts.cinic10 import CLASSES, Cinic10

pytestmark = pytest.mark.filterwarnings("ignore:.*TorchVision are deprecated:DeprecationWarning")
DATA = Data(*[Images(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1).long())] * 2, 10)
IMAGENET = 3  # of each class; one more is of CIFAR-10


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Images of one colour: red is 20 times the class, green the number, blue 255 if it is CIFAR-10's."""
    for index, name in enumerate(CLASSES):
        folder = tmp_path / "CINIC-10" / "test" / name
        folder.mkdir(parents=True)
        for number in range(IMAGENET):
            write_png(image(20 * index, number, 0), str(folder / f"n0{index}_{number}.png"))
        write_png(image(20 * index, 9, 255), str(folder / f"cifar-10-test-{index}.png"))
    monkeypatch.setattr(cinic10, "OFFICIAL", {"imagenet": 30, "whole": 40})
    return tmp_path


def image(*colour):
    return torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, 32, 32).contiguous()


def made(root, **keys):
    shift = Cinic10(**keys)
    return {which.name: shift.make(which, DATA, root) for which in shift.sets(10_000, root)}


def test_imagenet_comes_first_and_the_whole_contains_cifar10(root):
    assert [*Cinic10().sets(10_000, root)] == [("imagenet", None, 30), ("whole", None, 40)]
    sets = made(root)
    for images in sets.values():
        assert torch.equal(images.labels * 20, images.pixels[:, 0, 0, 0].long())
        assert (images.pixels == images.pixels[:, :, :1, :1]).all()
    assert sets["imagenet"].labels.bincount().tolist() == [3] * 10
    assert not sets["imagenet"].pixels[:, 2].any()
    assert sets["whole"].labels.bincount().tolist() == [4] * 10
    assert (sets["whole"].pixels[:, 2, 0, 0] == 255).sum() == 10


def test_the_official_images_are_packed_once(root, caplog):
    few = made(root, images=5)
    assert not (root / "CINIC-10" / "test.npy").exists(), "few images are read from their own files"
    sets = made(root)
    shutil.rmtree(root / "CINIC-10" / "test")
    for name, images in made(root).items():
        assert torch.equal(images.pixels, sets[name].pixels) and torch.equal(images.labels, sets[name].labels)
    for name, images in made(root, images=5).items():
        assert torch.equal(images.pixels, few[name].pixels)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_images_that_are_not_all_are_drawn_by_the_seed(root):
    sets, again, other = made(root, images=12), made(root, images=12), made(root, images=12, seed=1)
    for name, images in sets.items():
        assert len(images) == 12
        assert len({*images.labels.tolist()}) > 5
        assert torch.equal(images.pixels, again[name].pixels)
        assert not torch.equal(images.pixels, other[name].pixels)
    with pytest.raises(ValueError, match="images=31, but there are only 30"):
        Cinic10(images=31).sets(10_000, root)


def test_a_part_is_said_and_not_packed(root, caplog):
    (root / "CINIC-10" / "test" / "frog" / "n06_1.png").unlink()
    assert len(made(root)["imagenet"]) == 29
    assert "has 29 images of ImageNet and 39 in all, expected 30 and 40" in caplog.text
    assert not (root / "CINIC-10" / "test.npy").exists()


def test_a_folder_that_cannot_be_written_is_read(root, monkeypatch, caplog):
    def refuse(path, content):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(cinic10, "write", refuse)
    assert len(made(root)["whole"]) == 40
    assert "test.npy cannot be written (Permission denied)" in caplog.text


def test_missing_and_damaged_files_are_named(root):
    path = root / "CINIC-10" / "test" / "cat" / "n03_0.png"
    whole = path.read_bytes()
    for content in (b"", b"no image", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"n03_0.png is damaged, or not a PNG image: put the official"):
            made(root)
    write_png(image(1, 2, 3)[:, :16].contiguous(), str(path))
    with pytest.raises(UserError, match=r"n03_0.png is \(3, 16, 32\) uint8; expected \(3, 32, 32\) uint8"):
        made(root)
    deep = np.full((32, 32), 0x8001, np.uint16)
    Image.fromarray(deep).save(path)
    with pytest.raises(UserError, match=r"n03_0.png is \(3, 32, 32\) uint16; expected \(3, 32, 32\) uint8"):
        made(root)
    shutil.rmtree(path.parent)
    shutil.rmtree(root / "CINIC-10" / "test" / "ship")
    with pytest.raises(UserError, match=r"lacks the images of cat, ship: put .* into .*CINIC-10/test"):
        made(root)


@pytest.mark.parametrize(
    "content", [lambda whole: whole[:-1], lambda whole: b"", lambda whole: b"PK\x03\x04" + whole, None]
)
def test_a_damaged_pack_is_named(root, content):
    made(root)
    path = root / "CINIC-10" / "test.npy"
    if content:
        path.write_bytes(content(path.read_bytes()))
    else:
        np.save(path, np.zeros((40, 3072), np.uint8))
    with pytest.raises(UserError, match=r"test.npy (is damaged|holds uint8) .*; remove it, and it is made"):
        made(root)
