"""The program `condlr`: `condlr train ...` is `python scripts/train.py ...`, also without a checkout."""

import ast
import runpy
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from condlr.suite.folders import folder

PROGRAMS = folder("programs", "scripts")


def programs() -> dict[str, Path]:
    """The programs by name: the files of one folder."""
    return {path.stem: path for path in sorted(PROGRAMS.glob("*.py"))}


def main() -> NoReturn:
    """Run the program that the first argument names, with the others; list all where it names none."""
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
        if (error.name or "condlr").partition(".")[0] == "condlr":
            raise
        sys.exit(f"error: condlr {name} needs {error.name}: pip install 'condlr[suite]'")
    sys.exit(0)


def _line(path: Path) -> str:
    """What a program says it does: the first line of its docstring."""
    return (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").partition("\n")[0]
