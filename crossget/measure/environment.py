"""Where a measurement comes from: versions, device, threads."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

_LIBRARIES = ("crossget", "timm", "open_clip_torch", "transformers", "fvcore")
# Instruction sets of x86, then of ARM, by Linux's names.
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
_CPUINFO = Path("/proc/cpuinfo")


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions, device and threads of this process, for the file that holds a measurement.

    Args:
        device: the device that was used.

    Returns:
        Name -> what JSON can hold. On a CPU, "instructions" lists those instruction sets that matrix products gain
        from, where the system tells them: processors of one name differ in them, and so do virtual machines.
    """
    device = torch.device(device)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version for name in _LIBRARIES if (version := _version(name)) is not None},
        "platform": platform.platform(),
        "device": _device_name(device),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        **({"instructions": found} if device.type == "cpu" and (found := _instructions()) else {}),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor() if device.type == "cpu" else device.type


def _processor() -> str:
    """The processor's model, or its architecture where the system does not tell the model."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _instructions() -> list[str]:
    """Those of `_INSTRUCTIONS` that the system lists."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()  # the names on x86 and on ARM
    return [name for name in _INSTRUCTIONS if name in flags]


def _cpuinfo(key: str) -> str:
    """The first value of `key` in Linux's list of processors; empty where there is none."""
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key and value.strip():
                return value.strip()
    return ""
