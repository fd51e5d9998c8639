"""C++ kernels built with AddressSanitizer and UndefinedBehaviorSanitizer, for `fuzz_kernels` and `fuzz_inference`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1", "UBSAN_OPTIONS": "print_stacktrace=1"}


def build(sources: Iterable[Path], folder: Path) -> Path:
    """Compiles `sources` to a library in `folder`."""
    library = folder / "sanitized.so"
    flags = ["-std=c++17", *SANITIZERS, "-pthread", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, *map(str, sources), "-o", str(library)], check=True)
    return library


def start(module: str, library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `module` with `--library library` in a process whose allocations the sanitizer watches."""
    runtime = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": ":".join(runtime), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, "--library", str(library), *arguments]
    stderr = subprocess.PIPE if "--overrun" in arguments else None
    return subprocess.run(command, env=environment, text=True, stderr=stderr)
