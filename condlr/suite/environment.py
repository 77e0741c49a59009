"""Versions, machine and commit of a run."""

import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Versions and commit, for run.json."""
    import condlr

    versions = {"python": platform.python_version(), "condlr": condlr.__version__}
    for name in ("torch", "torchvision", "numpy", "hydra-core"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "versions": versions,
        "commit": commit(),
        "host": {"machine": platform.machine(), "cores": os.cpu_count()},
    }


def commit() -> str | None:
    """The commit of the source tree, with + if the tree was changed since; None outside its own repository.

    Source that was unpacked or installed inside another repository is not part of that one's commits.
    """
    source = Path(__file__).resolve()
    # A git hook that starts us sets these variables, and would send our git calls to its repository.
    of_hooks = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    variables = {name: value for name, value in os.environ.items() if name not in of_hooks}

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=source.parents[2], env=variables,
            capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    try:
        if git("rev-parse", "--show-prefix"):  # the repository's top is further up
            return None
        git("ls-files", "--error-unmatch", str(source))
        changed = git("status", "--porcelain", "--", "condlr", "conf", "scripts")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
