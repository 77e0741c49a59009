"""Reading the files, splitting, and batches."""

import gzip
import logging
import shutil

import numpy as np
import pytest
import torch

from condlr.data import _idx
from condlr.data.base import Data, Images
from condlr.data.digits import Digits
from condlr.data.fashion_mnist import FashionMnist
from condlr.data.mnist import Mnist
from condlr.errors import UserError


def images(n):
    return Images(torch.arange(n * 6, dtype=torch.uint8).view(n, 1, 2, 3), torch.arange(n))


def test_digits_are_real_and_the_same_for_every_seed(tmp_path):
    first, second = Digits().load(tmp_path), Digits().load(tmp_path)
    assert first.shape == (1, 28, 28)
    assert (len(first.train), len(first.test)) == (1437, 360)
    assert first.train.pixels.dtype == torch.uint8
    assert first.train.pixels.max() > 230
    assert torch.equal(first.test.pixels, second.test.pixels)
    assert set(first.test.labels.tolist()) == set(range(10))


@pytest.fixture
def idx(tmp_path):
    generator = np.random.default_rng(0)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, n in zip(_idx.FILES, (30, 30, 12, 12), strict=True):
        shape = (n, 28, 28) if "images" in name else (n,)
        array = generator.integers(0, 10, shape, dtype=np.uint8)
        header = b"".join(size.to_bytes(4, "big") for size in (0x800 + len(shape), *shape))
        (raw / name).write_bytes(header + array.tobytes())
    return raw


def test_idx_files_plain_and_packed_are_the_same(idx, tmp_path):
    plain = Mnist().load(tmp_path)
    for name in _idx.FILES[:3]:
        with open(idx / name, "rb") as source, gzip.open(idx / f"{name}.gz", "wb") as target:
            shutil.copyfileobj(source, target)
        (idx / name).unlink()
    packed = Mnist().load(tmp_path)
    assert torch.equal(plain.train.pixels, packed.train.pixels)
    assert torch.equal(plain.test.labels, packed.test.labels)
    first = (idx / _idx.FILES[3]).read_bytes()[8]
    assert packed.test.labels[0] == first
    assert packed.train.pixels.shape == (30, 1, 28, 28)


def test_files_that_are_not_official_are_said(idx, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        Mnist().load(tmp_path)
    assert caplog.text.count("is not the official file") == 4


def test_an_official_file_in_anothers_place_is_named(idx, tmp_path, monkeypatch):
    """The digests of the files are what tells train from test, and MNIST from Fashion-MNIST."""
    import hashlib

    digests = tuple(hashlib.sha256((idx / name).read_bytes()).hexdigest() for name in _idx.FILES)
    monkeypatch.setitem(_idx.OFFICIAL, "MNIST", digests)
    Mnist().load(tmp_path)
    shutil.copytree(idx, tmp_path / "FashionMNIST" / "raw")
    with pytest.raises(UserError, match="is MNIST's train-images-idx3-ubyte; expected FashionMNIST's"):
        FashionMnist().load(tmp_path)
    test = idx / _idx.FILES[2]
    (idx / _idx.FILES[0]).write_bytes(test.read_bytes())
    with pytest.raises(UserError, match="is MNIST's t10k-images.*; expected MNIST's train-images"):
        Mnist().load(tmp_path)


def test_a_failed_fetch_says_what_to_put_where(tmp_path, monkeypatch):
    import torchvision.datasets

    def refuse(root, download):
        raise RuntimeError("Error downloading train-images:\nno route to host")

    monkeypatch.setattr(torchvision.datasets, "MNIST", refuse)
    with pytest.raises(UserError, match="no route to host.*put train-images-idx3-ubyte.*MNIST/raw"):
        Mnist().load(tmp_path)


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.25, 25), (0.1, 10)])
def test_holding_out(fraction, count):
    data = Data(images(100), images(7), 10)
    split = data.hold_out(fraction, seed=3)
    assert len(split.train) == 100 - count
    assert (len(split.held_out) if split.held_out else 0) == count
    if split.held_out:
        assert sorted([*split.train.labels.tolist(), *split.held_out.labels.tolist()]) == list(range(100))
        again, other = data.hold_out(fraction, seed=3), data.hold_out(fraction, seed=4)
        assert again.held_out and torch.equal(again.held_out.labels, split.held_out.labels)
        assert other.held_out and not torch.equal(other.held_out.labels, split.held_out.labels)


def test_batches_are_the_images_in_order_from_any_batch_on():
    data = images(10)
    order = torch.randperm(10)
    batches = list(data.batches(4, order))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([labels for _, labels in batches]), order)
    torch.testing.assert_close(torch.cat([x for x, _ in batches]), data.pixels[order].float() / 255)
    for later, batch in zip(data.batches(4, order, start=1), batches[1:], strict=True):
        assert torch.equal(later[1], batch[1])


@pytest.mark.parametrize("channels", [1, 3])
def test_batches_are_channels_last(channels):
    pixels = torch.randint(0, 256, (5, channels, 4, 6), dtype=torch.uint8)
    ((batch, _),) = Images(pixels, torch.arange(5)).batches(5)
    assert batch.stride() == (24 * channels, 1, 6 * channels, channels)
    torch.testing.assert_close(batch, pixels / 255)
    convolved = torch.nn.Conv2d(channels, 8, 3)(batch)
    assert convolved.is_contiguous(memory_format=torch.channels_last)
