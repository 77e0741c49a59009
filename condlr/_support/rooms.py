"""From the name in a config to the class in the file of that name."""

from importlib import import_module
from pkgutil import iter_modules
from typing import TypeVar

from condlr._support.errors import UserError


def available(room: str) -> list[str]:
    """The names in `condlr/<room>/`: its modules, without `base` and those that begin with `_`."""
    package = import_module(f"condlr.{room}")
    names = (module.name for module in iter_modules(package.__path__) if not module.ispkg)
    return sorted(name for name in names if name != "base" and not name.startswith("_"))


T = TypeVar("T")


def find(room: str, name: str, base: type[T]) -> type[T]:
    """The subclass of `base` in `condlr/<room>/<name>.py`."""
    if name not in available(room):
        raise UserError(f"{room}: there is no {name!r}; choose from {', '.join(available(room))}")
    module = import_module(f"condlr.{room}.{name}")
    (found,) = (
        thing
        for thing in vars(module).values()
        if isinstance(thing, type) and issubclass(thing, base) and thing.__module__ == module.__name__
    )
    return found
