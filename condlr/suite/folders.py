"""Data folders of the code: at the top of a checkout, inside the package of an installed wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def folder(installed: str, checkout: str) -> Path:
    """`condlr/<installed>`, where a wheel puts it (see pyproject.toml), else the checkout's folder."""
    inside = _PACKAGE / installed
    return inside if inside.is_dir() else _PACKAGE.parent / checkout
