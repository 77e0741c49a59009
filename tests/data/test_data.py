"""Reading the files, splitting, and batches."""

import gzip
import hashlib
import io
import logging
import os
import pickle
import shutil
import socket
import tarfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from condlr._support.errors import UserError
from condlr._support.locks import Lock
from condlr.data import _idx, _plain_pickle, cifar10
from condlr.data._augmentation import AUGMENTATIONS, crop, crop_flip
from condlr.data._fetch import _SCRATCH
from condlr.data.base import Data, Images
from condlr.data.cifar10 import Cifar10
from condlr.data.digits import Digits
from condlr.data.fashion_mnist import FashionMnist
from condlr.data.mnist import Mnist
from condlr.suite.protocol import AUGMENTATIONS as NAMES


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


@pytest.mark.parametrize("kept", [0, 7, 15, 16, -1])
@pytest.mark.parametrize("index", [0, 3])
def test_a_cut_file_beside_a_whole_packed_one_is_read_from_that(idx, tmp_path, caplog, index, kept):
    """As a program leaves it that unpacks in place, and was killed, or is still at it."""
    whole = Mnist().load(tmp_path)
    path = idx / _idx.FILES[index]
    content = path.read_bytes()
    packed = path.with_name(f"{path.name}.gz")
    packed.write_bytes(gzip.compress(content))
    path.write_bytes(content[:kept])
    caplog.clear()
    assert Mnist().load(tmp_path).digest == whole.digest
    assert f"is truncated: {len(content[:kept])} bytes" in caplog.text
    assert f"reading {packed.name} instead" in caplog.text
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(
        UserError, match=rf"{path.name} is truncated: .*{packed.name} is damaged .*; remove it, and"
    ):
        Mnist().load(tmp_path)


def test_files_that_are_not_official_are_said(idx, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        Mnist().load(tmp_path)
    assert caplog.text.count("is not the official file") == 4


def test_an_official_file_in_anothers_place_is_named(idx, tmp_path, monkeypatch):
    """The digests of the files are what tells train from test, and MNIST from Fashion-MNIST."""
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


@pytest.fixture
def official(tmp_path, idx, cifar, monkeypatch):
    """Torchvision has small data sets of ours to give, slowly; what it is asked for is listed."""
    import torchvision.datasets

    store, asked, root = tmp_path / "store", [], tmp_path / "data"
    store.mkdir()
    for folder in ("MNIST", "cifar-10-batches-py"):
        (tmp_path / folder).rename(store / folder)
    shutil.copytree(store / "MNIST", store / "FashionMNIST")

    def give(dataset, folder):
        def kind(root, download):
            asked.append(root)
            for path in sorted((store / folder).rglob("*")):
                if path.is_file():
                    target = root / path.relative_to(store)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    content = path.read_bytes()
                    for part in (content[: len(content) // 2], content):
                        target.write_bytes(part)
                        time.sleep(0.15)

        monkeypatch.setattr(torchvision.datasets, dataset, kind)

    give("MNIST", "MNIST")
    give("FashionMNIST", "FashionMNIST")
    give("CIFAR10", "cifar-10-batches-py")
    return SimpleNamespace(store=store, root=root, asked=asked)


KINDS = [(Mnist, "MNIST/raw"), (FashionMnist, "FashionMNIST/raw"), (Cifar10, "cifar-10-batches-py")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "folder"), KINDS)
def test_of_many_that_want_a_dataset_one_fetches_it(official, caplog, kind, folder):
    caplog.set_level(logging.INFO)
    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(kind().load, official.root) for _ in range(4)]
        while not all(load.done() for load in loads):  # at no moment is half a file in its place
            for path in (official.root / folder).glob("*"):
                if path.is_file() and not path.name.startswith("fetching-") and ".partial-" not in path.name:
                    assert path.read_bytes() == (official.store / folder / path.name).read_bytes()
            time.sleep(0.01)
    assert len({load.result().digest for load in loads}) == 1
    assert len(official.asked) == 1
    waiting = [r for r in caplog.messages if "waiting for process" in r and "fetching-" in r]
    assert len(waiting) == 3, "each says so once"
    left = {path.name for path in (official.root / folder).iterdir()}
    assert left == {path.name for path in (official.store / folder).iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "folder"), KINDS)
def test_what_a_killed_process_left_is_in_nobodys_way(official, kind, folder):
    scratch = official.root / folder / f"{_SCRATCH}abc"
    scratch.mkdir(parents=True)
    (scratch / "half").write_bytes(b"1")
    with Lock(official.root / folder, f"fetching-{folder.split('/')[0]}") as lock:
        held = lock._path.read_bytes()
    name = lock._path.name.replace(f"-{os.getpid()}-", "-99999999-")  # no such process
    (lock._path.parent / name).write_bytes(held)
    kind().load(official.root)
    assert not scratch.exists()
    assert len(official.asked) == 1


@pytest.mark.slow
def test_files_of_ones_own_stay_when_others_are_fetched(official):
    own = official.root / "MNIST" / "raw" / _idx.FILES[1]
    own.parent.mkdir(parents=True)
    own.write_bytes((2049).to_bytes(4, "big") + (30).to_bytes(4, "big") + bytes([7] * 30))
    assert set(Mnist().load(official.root).train.labels.tolist()) == {7}


def test_the_archive_of_cifar10_put_there_by_hand_is_taken(tmp_path, monkeypatch):
    """By torchvision, from where it looks for it; ours stays as it is."""
    import torchvision.datasets

    class Kind:
        filename = "cifar-10-python.tar.gz"

        def __init__(self, root, download):
            (root / self.filename).write_bytes((root / self.filename).read_bytes() + b"!")
            raise RuntimeError(f"found {(root / self.filename).read_text()}")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Kind)
    (tmp_path / Kind.filename).write_text("archive")
    with pytest.raises(UserError, match="could not be fetched .found archive!.: put data_batch_1"):
        Cifar10().load(tmp_path)
    assert (tmp_path / Kind.filename).read_text() == "archive"


@pytest.mark.parametrize(("kind", "folder"), KINDS)
@pytest.mark.parametrize("there", [False, True])
def test_a_data_root_that_cannot_be_written_is_one_line(official, monkeypatch, kind, folder, there):
    if there:
        (official.root / folder).mkdir(parents=True)

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(
        UserError, match=r"could not be fetched \(Permission denied: .*\): put .*, or set data_root$"
    ):
        kind().load(official.root)
    assert not official.asked


def test_a_data_root_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(
        UserError, match=r"could not be fetched \(Not a directory: .*\): put .*, or set data_root$"
    ):
        Mnist().load(tmp_path / "data")


@pytest.fixture
def network(monkeypatch):
    """What answers in place of the servers that have the data sets, with one answer for all."""
    import torchvision.datasets

    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [url])
        monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [url])
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"{url}cifar-10-python.tar.gz")
        answer = {"": b""}

        def serve():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer[""].replace(b"SELF", url.encode()))

        threading.Thread(target=serve, daemon=True).start()
        yield answer
        server.shutdown(socket.SHUT_RDWR)


def fails_to_fetch(kind, root, why=""):
    """In one line that says where to put the files, with nothing left behind."""
    with pytest.raises(
        UserError, match=rf"could not be fetched \(.*{why}.*\): put .*, or set data_root$"
    ) as said:
        kind().load(root)
    assert str(said.value).isprintable()
    assert len(str(said.value)) < 900
    assert [path for path in root.rglob("*") if path.is_file() or path.name.startswith(_SCRATCH)] == []


OK = b"HTTP/1.1 200 OK\r\n"
MOVED = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: "


@pytest.mark.parametrize("kind", [Mnist, FashionMnist, Cifar10])
@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (OK + b"Content-Length: 5\r\n\r\n<p>hi", "a log-in page, or only a part of it"),
        (OK + b"Content-Length: 0\r\n\r\n", "a log-in page, or only a part of it"),
        (OK + b"Content-Length: 999999\r\n\r\n\x1f\x8b" + bytes(3000), "a log-in page, or only a part of it"),
        (OK + b"Content-Length: many\r\n\r\nx", "a log-in page"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", "IncompleteRead"),
        (OK + b"".join(b"A%d: b\r\n" % n for n in range(200)) + b"\r\n", "HTTPException: got more than 100"),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", "403"),
        (b"HTTP/1.1 abc\r\n\r\n", "BadStatusLine: HTTP/1.1 abc"),
        (b"SSH-2.0-OpenSSH_9\r\n", "BadStatusLine: SSH-2.0"),
        (b"\x00\x1b[2J\x85\xff" * 5000 + b"\r\n", ""),
        (b"", "Remote end closed connection"),
        (MOVED + b"file:///etc/hostname\r\n\r\n", "not allowed"),
        (MOVED + b"ssh://host/x\r\n\r\n", "not allowed"),
        (MOVED + b"SELFagain\r\n\r\n", "infinite loop. .*Found"),
        (MOVED + b"http://[::1\r\n\r\n", "ValueError"),
        (MOVED + b"http://127.0.0.1:port/\r\n\r\n", "InvalidURL"),
    ],
)
def test_a_network_that_answers_nonsense_is_one_line(network, tmp_path, kind, answer, why):
    network[""] = answer
    fails_to_fetch(kind, tmp_path, why)


@pytest.mark.parametrize("kind", [Mnist, Cifar10])
@pytest.mark.parametrize(
    "content",
    [
        b"<html>",
        gzip.compress(bytes(range(256)) * 99, mtime=0)[:200],
        gzip.compress(b"x" * 999, mtime=0)[:12] + b"\xff" * 30,
        gzip.compress(b"no IDX, and no tar", mtime=0),
        gzip.compress(b"", mtime=0),
        b"",
    ],
)
def test_archives_that_cannot_be_unpacked_are_one_line(network, tmp_path, monkeypatch, kind, content):
    """Though they are what torchvision expects."""
    import torchvision.datasets

    digest = hashlib.md5(content).hexdigest()
    files = [(f"{name}.gz", digest) for name in _idx.FILES]
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", files)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", digest)
    network[""] = OK + b"Content-Length: %d\r\n\r\n" % len(content) + content
    fails_to_fetch(kind, tmp_path)


def test_an_archive_without_the_batches_is_one_line(network, tmp_path, monkeypatch):
    import torchvision.datasets

    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("cifar-10-batches-py/data_batch_1"))
    content = packed.getvalue()
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", hashlib.md5(content).hexdigest())
    network[""] = OK + b"Content-Length: %d\r\n\r\n" % len(content) + content
    fails_to_fetch(Cifar10, tmp_path, "Dataset not found or corrupted")


@pytest.mark.parametrize("kind", [Mnist, Cifar10])
@pytest.mark.parametrize(
    ("proxy", "why"),
    [
        ("nonsense://127.0.0.1:1", "unknown url type"),
        ("http://127.0.0.1:port", "InvalidURL"),
        ("http:127.0.0.1", ""),
        ("http://[::1", ""),
        ("http://127.0.0.1:1", "refused"),
        ("127.0.0.1:1", "refused"),
        ("http://a\nb:1", ""),
        ("http://" + "a" * 70 + ":1", ""),
    ],
)
def test_a_proxy_that_is_none_is_one_line(network, tmp_path, monkeypatch, kind, proxy, why):
    monkeypatch.setenv("http_proxy", proxy)
    fails_to_fetch(kind, tmp_path, why)


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


@pytest.fixture
def cifar(tmp_path):
    """Small batches in the layout of both versions, with the same images: (root, records by name)."""
    generator = np.random.default_rng(0)
    records = {}
    for name in (*cifar10.TRAIN, cifar10.TEST):
        pixels = generator.integers(0, 256, (12, 3072), dtype=np.uint8)
        labels = generator.integers(0, 10, 12, dtype=np.uint8)
        records[name] = np.concatenate([labels[:, None], pixels], axis=1)
        for version, suffix, content in (
            ("bin", ".bin", records[name].tobytes()),
            ("py", "", pickle.dumps({b"data": pixels, b"labels": labels.tolist()}, protocol=2)),
        ):
            path = tmp_path / f"cifar-10-batches-{version}" / (name + suffix)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
    return tmp_path, records


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_both_versions_of_cifar10_are_the_same_images(cifar, protocol):
    root, records = cifar
    binary = Cifar10().load(root)
    shutil.rmtree(root / "cifar-10-batches-bin")
    for name, record in records.items():
        batch = {
            "data": record[:, 1:].copy(order="F" if protocol == 3 else "C"),
            "labels": record[:, 0].tolist(),
        }
        (root / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(batch, protocol=protocol))
    python = Cifar10().load(root)
    assert python.digest == binary.digest
    assert binary.shape == (3, 32, 32)
    assert (len(binary.train), len(binary.test)) == (60, 12)
    first = records["data_batch_1"][0]
    assert binary.train.labels[0] == first[0]
    assert torch.equal(binary.train.pixels[0, 1, 2, :3], torch.from_numpy(first[1 + 1024 + 64 :][:3].copy()))
    assert binary.standard == (cifar10.MEAN, cifar10.DEVIATION)
    assert Cifar10(standardize=False).load(root).standard is None


def test_the_pickle_that_python_2_wrote_is_read():
    """As in the official files: protocol 2, text as byte strings, an array of `numpy.core.multiarray`."""
    raw = bytes(range(6))
    written = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00"
        b"\x85U\x01b\x87Rq\x05(K\x01K\x02K\x03\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x06"
        + raw
        + b"tbU\x06labelsq\x08]q\x09(K\x06K\x09eu."
    )
    batch = _plain_pickle.load(written)
    assert batch["data"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert batch["labels"] == [6, 9]


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_no_code_of_a_pickle_runs(cifar, monkeypatch):
    root, _ = cifar
    shutil.rmtree(root / "cifar-10-batches-bin")
    monkeypatch.chdir(root)
    for protocol in range(6):
        (root / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps({"data": Trap()}, protocol))
        with pytest.raises(
            UserError, match="data_batch_3 is damaged, or not a batch.*mkdir, which no data needs"
        ):
            Cifar10().load(root)
    assert not (root / "trapped").exists()
    with pytest.raises(ValueError, match="an array that is not of integers"):
        _plain_pickle.load(pickle.dumps({"data": np.array([1.5])}))


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda batch: batch.pop("data"), "not a batch of CIFAR-10 .'data'.*expected data of"),
        (lambda batch: batch.pop("labels"), "not a batch of CIFAR-10"),
        (lambda batch: batch["labels"].pop(), r"its data are \(12, 3072\) uint8, its labels 11"),
        (lambda batch: batch["labels"].__setitem__(0, 10), "has a label 10; expected 0 to 9"),
        (lambda batch: batch["labels"].__setitem__(0, -1), "labels are not classes"),
        (lambda batch: batch["labels"].__setitem__(0, "cat"), "not a batch of CIFAR-10"),
        (lambda batch: batch.update(data=batch["data"].astype("i4")), "its data are"),
        (lambda batch: batch.update(data=[1, 2]), "its data are"),
        (lambda batch: batch.update(labels=[[1, 2]] * 12), r"its labels are \(12, 2\)"),
        (lambda batch: batch["labels"].append(batch["labels"]), "is damaged, or not a batch.*recursion"),
    ],
)
def test_python_batches_that_are_wrong_are_named(cifar, change, pattern):
    root, records = cifar
    shutil.rmtree(root / "cifar-10-batches-bin")
    record = records["data_batch_2"]
    batch = {"data": record[:, 1:].copy(), "labels": record[:, 0].tolist()}
    change(batch)
    (root / "cifar-10-batches-py" / "data_batch_2").write_bytes(pickle.dumps(batch))
    with pytest.raises(UserError, match=pattern):
        Cifar10().load(root)


def test_truncated_batches_are_named(cifar):
    root, _ = cifar
    path = root / "cifar-10-batches-bin" / "data_batch_4.bin"
    whole = path.read_bytes()
    for content in (whole[:-1], b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"data_batch_4.bin is damaged or truncated: \d+ bytes"):
            Cifar10().load(root)
    shutil.rmtree(root / "cifar-10-batches-bin")
    path = root / "cifar-10-batches-py" / "test_batch"
    whole = path.read_bytes()
    for end in range(0, len(whole), 997):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match="test_batch is damaged, or not a batch of CIFAR-10"):
            Cifar10().load(root)


@pytest.mark.parametrize("kept", [0, 3072, -5])
def test_the_line_on_a_cut_batch_says_what_to_remove(cifar, kept):
    root, _ = cifar
    path = root / "cifar-10-batches-bin" / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"truncated: .*; remove it, and .*cifar-10-batches-py is read$"):
        Cifar10().load(root)
    path.unlink()
    assert len(Cifar10().load(root).train) == 60
    other = root / "cifar-10-batches-py" / "test_batch"
    other.write_bytes(other.read_bytes()[:kept])
    with pytest.raises(UserError, match="damaged, or not a batch .*; remove it, and it is fetched again$"):
        Cifar10().load(root)


def test_swapped_official_batches_are_named(cifar, monkeypatch, caplog):
    root, records = cifar
    for name, record in records.items():
        monkeypatch.setitem(cifar10.OFFICIAL, name, hashlib.sha256(record.tobytes()).hexdigest())
    with caplog.at_level(logging.WARNING):
        assert Cifar10().load(root).official
    assert not caplog.text
    folder = root / "cifar-10-batches-bin"
    shutil.copy(folder / "data_batch_1.bin", folder / "test_batch.bin")
    with pytest.raises(UserError, match="test_batch.bin is CIFAR-10's data_batch_1; expected CIFAR-10's t"):
        Cifar10().load(root)


def test_missing_batches_are_named(cifar):
    root, _ = cifar
    (root / "cifar-10-batches-bin" / "data_batch_1.bin").unlink()
    assert len(Cifar10().load(root).train) == 60, "the other version is whole"
    (root / "cifar-10-batches-py" / "data_batch_5").unlink()
    with pytest.raises(
        UserError, match=r"dataset.download=false: put data_batch_5 into .*cifar-10-batches-py"
    ):
        Cifar10(download=False).load(root)


def test_a_part_of_a_dataset_is_its_first_images_and_not_official():
    data = Data(images(100), images(7), 10)
    part = data.shortened(20, None)
    assert (len(part.train), len(part.test), part.official) == (20, 7, False)
    assert torch.equal(part.train.labels, torch.arange(20))
    assert data.shortened(None, None).official
    with pytest.raises(ValueError, match=r"train_images must be in \[1, inf\)"):
        Cifar10(train_images=0)


def test_crops_and_flips_are_those_of_padded_images():
    """Each result is one of the 81 crops of the padded image or of their mirror images, and all occur."""
    pixels = torch.randint(0, 256, (1, 2, 6, 7), dtype=torch.uint8).expand(4000, -1, -1, -1)
    changed = crop_flip(pixels, torch.Generator().manual_seed(0))
    assert changed.dtype == torch.uint8
    padded = torch.nn.functional.pad(pixels[0], [4] * 4)
    crops = [padded[:, y : y + 6, x : x + 7] for y in range(9) for x in range(9)]
    known = torch.stack([*crops, *(crop.flip(-1) for crop in crops)]).flatten(1)
    matches = (changed.flatten(1)[:, None] == known[None]).all(-1)
    assert matches.any(1).all()
    counts = matches.float().sum(0)
    assert (counts > 0).all()
    assert counts[:81].sum().item() == pytest.approx(2000, abs=150)
    again = crop_flip(pixels, torch.Generator().manual_seed(0))
    assert torch.equal(changed, again)
    upright = crop(pixels, torch.Generator().manual_seed(0))
    unmirrored = matches[:, :81].any(1)
    assert torch.equal(upright[unmirrored], changed[unmirrored]), "it draws the same offsets"
    assert torch.equal(upright[~unmirrored], changed[~unmirrored].flip(-1))


def test_augmentations_have_the_names_that_configs_know():
    assert tuple(AUGMENTATIONS) == NAMES
