"""The name and the load of the machine."""

import os
import platform
import re
from functools import cache
from pathlib import Path

import torch


def name(device: torch.device) -> str:
    """The GPU, or the processor and the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def busy() -> bool:
    """Whether processes have waited for a core in the last minute; False if unknown."""
    try:
        return os.getloadavg()[0] > (os.cpu_count() or 1) + 1
    except (OSError, AttributeError):
        return False


@cache
def _processor() -> str:
    """The processor's name; a name without digits, as on virtual machines, gets its family and model."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        text = ""
    known = {key: value.strip() for key, value in re.findall(r"^([\w ]+?)\s*:(.*)$", text, re.MULTILINE)}
    found = known.get("model name") or platform.processor() or platform.machine()
    if not re.search(r"\d", found) and "cpu family" in known:
        found += f" family {known['cpu family']} model {known.get('model')}"
    return found
