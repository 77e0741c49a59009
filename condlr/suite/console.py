"""The program `condlr`: `condlr train ...` runs scripts/train.py, also from an installed wheel."""

import ast
import runpy
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from condlr._support.errors import not_installed
from condlr.suite.folders import folder

PROGRAMS = folder("programs", "scripts")


def programs() -> dict[str, Path]:
    """The scripts, by name."""
    return {path.stem: path for path in sorted(PROGRAMS.glob("*.py"))}


def main() -> NoReturn:
    """Run the program that the first argument names, with the other arguments; without any, list all."""
    name, *arguments = sys.argv[1:] or ["--help"]
    known = programs()
    if name in ("-h", "--help"):
        print("condlr: low-rank neural networks that stay robust\n")
        print("condlr PROGRAM KEY=VALUE ...; condlr PROGRAM --help shows its keys.\n")
        for each, path in known.items():
            print(f"  {each:<12}{_line(path)}")
        sys.exit(0)
    if name not in known:
        near = get_close_matches(name, known) or list(known)
        sys.exit(f"error: condlr has no program {name!r}; did you mean {' or '.join(near)}?")
    sys.argv = [f"condlr {name}", *arguments]
    try:
        runpy.run_path(str(known[name]), run_name="__main__")
    except ModuleNotFoundError as error:
        if (missing := not_installed(error)) is None:
            raise
        sys.exit(f"error: condlr {name} needs {missing}")
    sys.exit(0)


def _line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").partition("\n")[0]
