"""Fetch missing official files through torchvision, which knows their addresses."""

import logging
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from condlr._support.errors import UserError, not_installed
from condlr._support.files import forget_partial, write
from condlr._support.locks import Lock

log = logging.getLogger(__name__)

AGAIN = "remove it, and it is fetched again"  # advice on a damaged file

_SCRATCH = ".fetching-"
# General messages of torchvision, and their meaning.
_MEANING = {
    "File not found or corrupted.": "the download is not the archive: a log-in page, or only a part of it"
}


def fetch(dataset: str, root: Path, missing: Callable[[], list[Path]], allowed: bool, advice: str) -> None:
    """Fetch the missing files of `dataset` through torchvision, and put them below `root`.

    Of several processes one fetches, and the others wait. Each file is checked, then put in place atomically.

    Args:
        dataset: torchvision's name, for example `MNIST`.
        root: the data root.
        missing: returns the missing files, in torchvision's layout below `root`.
        allowed: dataset.download.
        advice: where to put the files by hand.

    Raises:
        UserError: fetching is not allowed, or failed; the message ends in `advice`.
    """
    if not allowed:
        raise UserError(f"{dataset} is missing and dataset.download=false: {advice}")
    if not (wanted := missing()):  # another process has just fetched it
        return
    folder = wanted[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with Lock(folder, f"fetching-{dataset}", wait=True):
            if wanted := missing():  # else another process fetched it while we waited
                log.info("fetching %s into %s", dataset, root)
                _fetch(dataset, root, folder, wanted)
    except ModuleNotFoundError as error:
        raise UserError(f"fetching {dataset} needs {not_installed(error)}; or {advice}") from error
    except Exception as error:  # urllib, http, ssl, tarfile and zlib raise their own errors
        raise UserError(f"{dataset} could not be fetched ({_reason(error)}): {advice}") from error


def _fetch(dataset: str, root: Path, folder: Path, wanted: list[Path]) -> None:
    import torchvision.datasets

    kind = getattr(torchvision.datasets, dataset)
    forget_partial(folder)
    for leftover in folder.glob(f"{_SCRATCH}*"):  # left by a process that died
        shutil.rmtree(leftover, ignore_errors=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        with TemporaryDirectory(prefix=_SCRATCH, dir=folder, ignore_cleanup_errors=True) as scratch:
            archive = root / getattr(kind, "filename", "")
            if archive.is_file():  # put there by hand; torchvision uses it if its checksum is right
                shutil.copy(archive, scratch)
            for split in _splits(kind, wanted):
                kind(Path(scratch), download=True, **split)
            for path in wanted:
                write(path, (Path(scratch) / path.relative_to(root)).read_bytes())
    finally:
        socket.setdefaulttimeout(before)


def _splits(kind: type, wanted: list[Path]) -> list[dict[str, str]]:
    """The arguments of each call: most datasets come whole, and SVHN in a file for each split."""
    names = {path.name for path in wanted}
    files = {split: name for split, (_, name, *_) in getattr(kind, "split_list", {}).items()}
    return [{"split": split} for split, name in files.items() if name in names] or [{}]


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    last = str(error).rpartition("got:\n")[2].strip()  # the answer of the last server tried
    said = "".join(c if c.isprintable() else " " for c in last)
    said = _MEANING.get(said, " ".join(said.split())[:200])
    return said if said and isinstance(error, OSError | RuntimeError) else f"{type(error).__name__}: {said}"
