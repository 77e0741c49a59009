"""The name and the load of the machine."""

import os
import platform
import re
from functools import cache
from pathlib import Path

import torch

# Of x86 and of ARM processors
_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}


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


def emulates_bfloat16(device: torch.device) -> bool:
    """Whether `device` is a processor that says what it has, and has no instructions for bfloat16."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", _cpuinfo(), re.MULTILINE)
    return device.type == "cpu" and found is not None and _BFLOAT16.isdisjoint(found[1].split())


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return ""


@cache
def _processor() -> str:
    """The processor's name; a name without digits, as on virtual machines, gets its family and model."""
    text = _cpuinfo()
    known = {key: value.strip() for key, value in re.findall(r"^([\w ]+?)\s*:(.*)$", text, re.MULTILINE)}
    found = known.get("model name") or platform.processor() or platform.machine()
    if not re.search(r"\d", found) and "cpu family" in known:
        found += f" family {known['cpu family']} model {known.get('model')}"
    return found
