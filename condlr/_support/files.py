"""Atomic writes, and tables as CSV."""

import csv
import errno
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from condlr._support.errors import UserError

_PARTIAL = ".partial-"
# Errors of network file systems that cannot sync a directory; the file is complete without it.
_NO_SYNC = {
    errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EISDIR,
    errno.EACCES, errno.EPERM,
}  # fmt: skip


def write(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically: a crash or a full disk leaves the old file or the new one, never a part."""
    partial = path.with_name(f"{path.name}{_PARTIAL}{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    try:
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise OSError(error.errno, error.strerror, str(path.parent)) from error


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8; file names in it that are not valid UTF-8 are escaped."""
    write(path, text.encode(errors="backslashreplace"))


def forget_partial(directory: Path) -> None:
    """Remove partly written files of processes that died; call this only under the directory's lock."""
    for leftover in directory.glob(f"*{_PARTIAL}*"):
        leftover.unlink(missing_ok=True)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV. The columns are all their keys, in order of appearance; None is an empty field."""
    write(path, as_csv(rows))


def as_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The content that `write_csv` writes."""
    shapes = dict.fromkeys(map(tuple, rows))
    columns = list(dict.fromkeys(key for shape in shapes for key in shape))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    if len(shapes) == 1:  # the usual case, and much faster
        writer.writerows(row.values() for row in rows)
    else:
        writer.writerows([row.get(column) for column in columns] for row in rows)
    return buffer.getvalue().encode(errors="backslashreplace")  # file names may not be valid UTF-8


def read_csv(path: Path, advice: str = "") -> list[dict[str, str]]:
    """The rows of a CSV file as text; empty if there is no file."""
    try:
        return csv_rows(path.read_bytes(), path, advice)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error


def csv_rows(content: bytes, path: Path, advice: str = "") -> list[dict[str, str]]:
    """The rows of a CSV file with this content, as text; `path` is for messages."""
    try:
        text = content.decode("utf-8-sig")  # spreadsheets put a mark of the encoding first
        lines = [line for line in csv.reader(io.StringIO(text, newline="")) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}){advice}") from error
    if len(set(map(len, lines))) > 1:
        raise UserError(f"{path} is damaged (a line has more or fewer fields than the header){advice}")
    return [dict(zip(lines[0], row, strict=False)) for row in lines[1:]]
