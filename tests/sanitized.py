"""C++ kernels built with AddressSanitizer and UndefinedBehaviorSanitizer, for `fuzz_kernels` and `fuzz_inference`."""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1", "UBSAN_OPTIONS": "print_stacktrace=1"}


def _build(sources: Iterable[Path], folder: Path) -> Path:
    """Compiles `sources` to a library in `folder`."""
    library = folder / "sanitized.so"
    flags = ["-std=c++17", *SANITIZERS, "-pthread", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, *map(str, sources), "-o", str(library)], check=True)
    return library


def _start(module: str, library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `module` with `--library library` in a process whose allocations the sanitizer watches."""
    runtime = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": ":".join(runtime), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, "--library", str(library), *arguments]
    stderr = subprocess.PIPE if "--overrun" in arguments else None
    return subprocess.run(command, env=environment, text=True, stderr=stderr)


def main(
    module: str, sources: Iterable[Path], overrun: Callable[[Path], None], search: Callable[[Path, float], None]
) -> int:
    """The command of a fuzzer: builds the library, shows that the sanitizer stops `overrun`, and calls `search`.

    Both are called in processes of their own, with the path of the library.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--library", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--overrun", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.overrun:
        overrun(options.library)
    elif options.library:
        search(options.library, 60 * options.minutes)
        print("no finding")
    else:
        with tempfile.TemporaryDirectory() as folder:
            library = _build(sources, Path(folder))
            proof = _start(module, library, "--overrun")
            if proof.returncode == 0 or "AddressSanitizer" not in proof.stderr:
                print(f"the sanitizer did not notice a read past a buffer:\n{proof.stderr}", file=sys.stderr)
                return 1
            return _start(module, library, "--minutes", str(options.minutes)).returncode
    return 0
