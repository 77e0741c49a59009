"""The analyses, in the order of the report."""

from typing import TYPE_CHECKING

from condlr._support.rooms import available, find

if TYPE_CHECKING:
    from condlr.analysis.base import Analysis


def analyses() -> "dict[str, type[Analysis]]":
    """Every analysis by name, in the order of the report."""
    from condlr.analysis.base import Analysis

    found = {name: find("analysis", name, Analysis) for name in available("analysis")}
    return dict(sorted(found.items(), key=lambda item: (item[1].order, item[0])))
