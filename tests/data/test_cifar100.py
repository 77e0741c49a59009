"""CIFAR-100 in small files of the official formats."""

import hashlib
import pickle
import shutil

import numpy as np
import pytest
import torch

from condlr._support.errors import UserError
from condlr.data import cifar100
from condlr.data.cifar100 import Cifar100
from tests.helpers import complains

SIZES = {"train": 30, "test": 12}


def write_python(root, name, pixels, coarse, fine, protocol=2):
    """A pickle with the keys of the official one."""
    path = root / "cifar-100-python" / name
    path.parent.mkdir(exist_ok=True)
    batch = {
        b"filenames": [b"image.png"] * len(pixels), b"batch_label": b"training batch 1 of 1",
        b"fine_labels": fine.tolist(), b"coarse_labels": coarse.tolist(), b"data": pixels,
    }  # fmt: skip
    path.write_bytes(pickle.dumps(batch, protocol=protocol))


@pytest.fixture
def cifar(tmp_path):
    """The same images in both versions: (root, (pixels, coarse, fine) by name)."""
    generator, batches = np.random.default_rng(0), {}
    (tmp_path / "cifar-100-binary").mkdir()
    for name, n in SIZES.items():
        pixels = generator.integers(0, 256, (n, 3072), dtype=np.uint8)
        fine = generator.integers(0, 100, n, dtype=np.uint8)
        batches[name] = pixels, fine // 5, fine
        write_python(tmp_path, name, *batches[name])
        records = np.column_stack([fine // 5, fine, pixels])
        (tmp_path / "cifar-100-binary" / f"{name}.bin").write_bytes(records.tobytes())
    return tmp_path, batches


@pytest.fixture
def official(cifar, monkeypatch):
    """Our small pickles are taken for the official ones."""
    for name in SIZES:
        content = (cifar[0] / "cifar-100-python" / name).read_bytes()
        monkeypatch.setitem(cifar100.OFFICIAL, name, hashlib.md5(content).hexdigest())


@pytest.mark.parametrize(("labels", "classes", "column"), [("fine", 100, 2), ("coarse", 20, 1)])
def test_both_versions_are_the_same_images(cifar, labels, classes, column):
    root, batches = cifar
    python = Cifar100(labels=labels).load(root)
    shutil.rmtree(root / "cifar-100-python")
    binary = Cifar100(labels=labels).load(root)
    assert python.digest == binary.digest
    assert (python.shape, python.classes) == ((3, 32, 32), classes)
    assert (len(python.train), len(python.test)) == (30, 12)
    assert python.test.labels.tolist() == batches["test"][column].tolist()
    pixels = torch.from_numpy(batches["train"][0]).view(-1, 3, 32, 32)  # the planes red, green, blue
    assert torch.equal(python.train.pixels, pixels)
    assert python.standard == (cifar100.MEAN, cifar100.DEVIATION)
    assert Cifar100(standardize=False).load(root).standard is None
    other = "coarse" if labels == "fine" else "fine"
    held_out = python.hold_out(0.2, 0).shortened(20, 10)
    assert held_out.test.others[other].tolist() == batches["test"][3 - column][:10].tolist()
    for images in (held_out.train, held_out.held_out):
        fine, coarse = (images.labels, images.others[other])[:: 1 if labels == "fine" else -1]
        assert torch.equal(fine // 5, coarse), "labels of the same images"


def test_official_pickles_are_known_and_others_are_said(cifar, official, caplog):
    root, batches = cifar
    assert Cifar100().load(root).official
    assert not caplog.text
    write_python(root, "test", *batches["test"], protocol=3)
    assert not Cifar100().load(root).official
    assert "test is not the official file (MD5 " in caplog.text
    caplog.clear()
    shutil.rmtree(root / "cifar-100-python")
    assert not Cifar100().load(root).official
    assert caplog.text.count(".bin may be the official file, but only the Python version") == 2


def test_swapped_files_are_named(cifar, official):
    root, _ = cifar
    for folder, suffix in (("cifar-100-python", ""), ("cifar-100-binary", ".bin")):
        train, test, aside = (root / folder / f"{name}{suffix}" for name in ("train", "test", "aside"))
        train.rename(aside)
        test.rename(train)
        aside.rename(test)
    with pytest.raises(UserError, match="train is CIFAR-100's test; expected CIFAR-100's train"):
        Cifar100().load(root)
    shutil.rmtree(root / "cifar-100-python")
    with pytest.raises(UserError, match="12 training and 30 test images; .*: are the files swapped"):
        Cifar100().load(root)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda batch: batch.pop("fine_labels"), "not a batch of CIFAR-100 .'fine_labels'.*and n coarse_lab"),
        (lambda batch: batch["coarse_labels"].pop(), r"its data are \(12, 3072\) uint8, its labels 11"),
        (lambda batch: batch["coarse_labels"].__setitem__(0, 20), "has a label 20; expected 0 to 19"),
        (lambda batch: batch["fine_labels"].__setitem__(0, 100), "has a label 100; expected 0 to 99"),
        (lambda batch: batch.update(data=batch["data"][:, :3071]), r"its data are \(12, 3071\)"),
    ],
)
def test_wrong_pickles_are_named(cifar, change, pattern):
    root, batches = cifar
    shutil.rmtree(root / "cifar-100-binary")
    batch = dict(zip(("data", "coarse_labels", "fine_labels"), batches["test"], strict=True))
    batch |= {kind: batch[kind].tolist() for kind in ("coarse_labels", "fine_labels")}
    change(batch)
    (root / "cifar-100-python" / "test").write_bytes(pickle.dumps(batch))
    with pytest.raises(UserError, match=f"{pattern}.*; remove it, and it is fetched again$"):
        Cifar100().load(root)


def test_cut_files_are_named(cifar):
    root, _ = cifar
    path = root / "cifar-100-python" / "train"
    whole = path.read_bytes()
    for end in range(0, len(whole), len(whole) // 9):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"train is damaged, or .*CIFAR-100.*cifar-100-binary is read$"):
            Cifar100().load(root)
    path.unlink()
    assert len(Cifar100().load(root).train) == 30, "the other version is whole"
    path = root / "cifar-100-binary" / "test.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"test.bin is damaged or truncated: .* a multiple of 3074; remove"):
        Cifar100().load(root)


def test_missing_files_are_fetched_or_named(cifar, tmp_path, monkeypatch):
    import torchvision.datasets

    root, _ = cifar
    empty = tmp_path / "empty"
    with pytest.raises(UserError, match=r"download=false: put train, test into .*cifar-100-python, or the"):
        Cifar100(download=False).load(empty)

    def give(scratch, download):
        shutil.copytree(root / "cifar-100-python", scratch / "cifar-100-python")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", give)
    assert Cifar100().load(empty).digest == Cifar100().load(root).digest


def test_its_keys_are_those_of_the_config(script, cifar):
    small = ["dataset=cifar100", f"data_root={cifar[0]}", "model=resnet18", "model.width=16"]
    complains(
        script("train", *small, "dataset.labels=animals"),
        "dataset.labels must be one of fine, coarse; got 'animals'",
    )
