"""Read parts of large .npy files."""

from pathlib import Path
from tokenize import TokenError
from typing import Any

from condlr._support.errors import UserError


def mapped(path: Path, advice: str) -> Any:
    """The array of an .npy file, mapped into memory, so that only what is used is read. No pickle is read.

    Raises:
        UserError: the file is damaged; the message ends in `advice`.
    """
    import numpy as np

    try:
        return np.lib.format.open_memmap(path, mode="r")
    # A damaged header is parsed as Python
    except (OSError, ValueError, EOFError, TypeError, SyntaxError, TokenError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged or truncated ({reason}); {advice}") from error
