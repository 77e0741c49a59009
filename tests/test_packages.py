"""What pyproject.toml puts into a wheel, held against the folders; and the program `condlr`."""

import re
import runpy
import sys
import tomllib
from fnmatch import fnmatch

import pytest

from condlr.suite import cli, console
from tests.helpers import ROOT, complains

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
MAPPED = SETUPTOOLS["package-dir"]
EXTRAS = PROJECT["project"]["optional-dependencies"]


def folder(package):
    """The folder of a package, which may be mapped."""
    return ROOT / MAPPED.get(package, package.replace(".", "/"))


def test_no_room_is_left_out_of_the_wheel():
    rooms = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "condlr").rglob("__init__.py")}
    assert set(SETUPTOOLS["packages"]) == rooms | set(MAPPED)
    # A folder of modules that is no package yet would be left out as well
    files = {path for path in (ROOT / "condlr").rglob("*.py") if "__pycache__" not in path.parts}
    assert {".".join(path.parent.relative_to(ROOT).parts) for path in files} == rooms


def test_no_file_is_left_out_of_the_wheel():
    for package in SETUPTOOLS["packages"]:
        patterns = ["*.py", *SETUPTOOLS["package-data"].get(package, [])]
        deep = any(pattern.startswith("**/") for pattern in patterns)
        found = [path for path in folder(package).glob("**/*" if deep else "*") if path.is_file()]
        assert found, package
        for path in found:
            name = path.name if deep else str(path.relative_to(folder(package)))
            assert any(fnmatch(name, pattern.removeprefix("**/")) for pattern in patterns), path


def test_every_extra_that_is_named_exists():
    assert PROJECT["project"]["dependencies"] == ["torch>=2.9"]
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "Makefile"]
    for top in ("condlr", "conf", "scripts"):
        pages += [path for path in (ROOT / top).rglob("*") if path.suffix in (".py", ".yaml")]
    named = {
        extra
        for page in pages
        for names in re.findall(r"install .*?'(?:condlr|\.)\[([\w,]+)\]'", page.read_text())
        for extra in names.split(",")
    }
    assert {"suite", "digits", "several", "slurm", "ray", "attacks"} <= named <= EXTRAS.keys()


@pytest.fixture
def condlr(tmp_path, monkeypatch, capfd):
    """Call the program in an empty folder: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["condlr", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            console.main()
        out, err = capfd.readouterr()
        code = stop.value.code
        # What sys.exit does with a text, outside of a test
        return (1, out, f"{err}{code}\n") if isinstance(code, str) else (code, out, err)

    return call


def test_the_programs_are_the_scripts_each_with_its_line(condlr):
    status, listed, _ = condlr()
    assert (status, listed) == condlr("--help")[:2]
    assert status == 0
    for path in (ROOT / "scripts").glob("*.py"):
        assert re.search(rf"^  {path.stem} +[A-Z].*\w", listed, re.M), path
    assert all(len(line) <= 120 for line in listed.splitlines())


def test_an_unknown_program_is_one_line_with_the_nearest_names(condlr):
    complains(condlr("figure"), "no program 'figure'; did you mean figures")
    complains(condlr("xyz"), "did you mean .*train")


def test_a_program_is_called_with_its_arguments_where_one_is(condlr, tmp_path):
    (tmp_path / "results").mkdir()
    complains(condlr("collect", "study=first"), "there is no run in runs/first")
    status, out, _ = condlr("figures", "study=first", "--cfg", "job", "--resolve")
    assert status == 0
    assert f"paper: {ROOT / 'results' / 'paper'}\n" in out
    (tmp_path / "results" / "paper").mkdir()
    assert "paper: results/paper\n" in condlr("figures", "study=first", "--cfg", "job", "--resolve")[1]


@pytest.mark.parametrize("lacking", ["omegaconf", "pandas"])
def test_what_is_not_installed_is_one_line_with_its_extra(condlr, monkeypatch, lacking):
    def broken(*_, **__):
        raise ModuleNotFoundError(f"No module named {lacking!r}", name=lacking)

    monkeypatch.setattr(runpy, "run_path", broken)
    complains(condlr("train"), rf"condlr train needs {lacking}: pip install 'condlr\[suite\]'")


def test_what_a_program_finds_missing_later_is_one_line_too():
    error = ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
    assert cli.explain(error) == "this needs matplotlib: pip install 'condlr[suite]'"
    assert cli.explain(ModuleNotFoundError("No module named 'condlr.x'", name="condlr.x")) is None


def test_a_module_of_ours_that_is_missing_is_a_bug(monkeypatch):
    def broken(*_, **__):
        raise ModuleNotFoundError("No module named 'condlr.nothing'", name="condlr.nothing")

    monkeypatch.setattr(runpy, "run_path", broken)
    monkeypatch.setattr(sys, "argv", ["condlr", "train"])
    with pytest.raises(ModuleNotFoundError):
        console.main()
