"""Describes the machine of a measurement: every benchmark writes it beside its results."""

from __future__ import annotations

import datetime
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Processor, threads, library versions and the date."""
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "castlm": version("castlm"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "date": datetime.date.today().isoformat(),
    }


def proc_status(field: str) -> int:
    """Bytes that Linux tells of this process, as `VmHWM` (peak) or `VmRSS`."""
    return next(int(line.split()[1]) * 1024 for line in _lines("/proc/self/status") if line.startswith(field))


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.is_file() else []


def write_json(path: str | None, content: dict[str, Any]) -> None:
    if path:
        Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
