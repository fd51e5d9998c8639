"""Builds the C++ kernels with AddressSanitizer and UndefinedBehaviorSanitizer, and feeds them random input.

    python -m tests.fuzz_kernels [--minutes 10]

The kernels of training, of the start and of inference have so many minutes each. They are called as castlm calls them,
through the `native` modules and ctypes, and their results are compared with torch's. Before each search, one call that
reads past a buffer shows that the sanitizer would have stopped it. Not collected by pytest.
"""

import argparse
import contextlib
import ctypes
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "castlm"
FLAGS = ["-std=c++17", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1", "UBSAN_OPTIONS": "print_stacktrace=1"}


# Training


def overrun_training(library: Path) -> None:
    """Passes a weight whose width is too large, past the checks of `native`: the sanitizer has to end the process."""
    import torch

    from castlm.core import native

    weight, mask = torch.randn(4, 8), torch.zeros(4, 1, dtype=torch.uint8)
    parameters = native._parameters([weight], [mask])
    parameters[0].width = 4096
    native.load_kernels(str(library)).castlm_refresh(parameters, ctypes.c_int64(1), 2, 4, 1)


def search_training(library: Path, seconds: float) -> None:
    """Runs every check of AdamS's kernels on random input until the time is over."""
    from castlm.core import native
    from tests import kernel_cases as cases

    loaded = native.load_kernels(str(library))
    native.kernels = lambda: loaded  # type: ignore[assignment]
    run_checks(
        {
            "refresh": (cases.refreshes(), cases.check_refresh),
            "update": (cases.updates(), cases.check_update),
            "broken update": (cases.broken_updates(), cases.check_broken_update),
        },
        seconds,
    )


def run_checks(checks: dict[str, tuple[Any, Callable[[Any], None]]], seconds: float) -> None:
    """Runs every check on random input, on 1 to 4 threads in turn, and prints how many inputs each has seen."""
    import torch
    from hypothesis import HealthCheck, given, settings

    counts = dict.fromkeys(checks, 0)

    def batch_of(name: str) -> Callable[[], None]:
        strategy, check = checks[name]

        @settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(strategy)
        def batch(case):
            counts[name] += 1
            check(case)

        return batch

    until, threads = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        threads = threads % 4 + 1
        torch.set_num_threads(threads)
        for name in checks:
            batch_of(name)()
        print(", ".join(f"{count:,} inputs of {name}" for name, count in counts.items()), flush=True)


# The start


def overrun_start(library: Path) -> None:
    """Passes a weight with fewer rows than the call says: the sanitizer has to end the process."""
    import torch

    from castlm.oneshot import sweep

    weight = torch.randn(8, 8)
    address = weight.data_ptr()
    call = sweep._Call(*[address] * 5, rows=512, columns=8)
    sweep.load_kernels(str(library)).castlm_sweep(call, 0, 8, 2, 4, 1)


def search_start(library: Path, seconds: float) -> None:
    """Runs the check of SparseGPT's sweep on random input until the time is over."""
    from castlm.oneshot import sweep
    from tests import kernel_cases as cases

    loaded = sweep.load_kernels(str(library))
    sweep.kernels = lambda: loaded  # type: ignore[assignment]
    run_checks({"sweep": (cases.sweeps(), cases.check_sweep)}, seconds)


# Inference


def overrun_inference(library: Path) -> None:
    """Claims that a buffer is as long as its header says when it is cut: the sanitizer has to end the process."""
    import torch

    from castlm.packed import native
    from tests.packed_weights import buffer_of, random_packed

    loaded = native.load_kernels(str(library))
    native.kernels = lambda: loaded  # type: ignore[assignment]
    whole = buffer_of(random_packed("bf16", 2, 4, 64, 512))
    cut = (ctypes.c_uint8 * 4096).from_buffer_copy(bytes(whole[:4096].tolist()))
    x, y = torch.randn(1, 512), torch.empty(1, 64)
    loaded.castlm_multiply(ctypes.addressof(cut), whole.numel(), x.data_ptr(), 0, 1, 512, y.data_ptr(), 64, 1)


def search_inference(library: Path, seconds: float) -> None:
    """Tries random levels, weights, shapes, batches and damaged headers until the time is over, and prints how many.

    A buffer with random bytes in its header must be refused or multiplied within its bounds.
    """
    import torch

    from castlm.core.errors import InputError
    from castlm.packed import native
    from tests.packed_weights import DENSE_ONLY, PATTERNS, buffer_of, check_product, random_packed

    loaded = native.load_kernels(str(library))
    native.kernels = lambda: loaded  # type: ignore[assignment]
    count, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        native.use_level(random.choice(native.levels()))
        values = random.choice([*native.VALUES])
        n, m = (0, 0) if values in DENSE_ONLY else random.choice(PATTERNS)
        groups = random.randint(1, 40) if random.randrange(5) else random.randint(500, 900)  # wide ones too
        rows, columns = random.randint(1, 40), groups * (m or 5)
        packed = random_packed(values, n, m, rows, columns, seed=count)
        layouts = ["best", *(["rows"] if m else []), *(["lanes"] if m == 0 or 64 % m == 0 else [])]
        buffer = buffer_of(packed, random.choice(layouts)).clone()  # without room after it
        x = torch.randn(random.choice([1, random.randint(1, 40), random.randint(41, 100)]), columns)  # prompts too
        check_product(packed, buffer, x)
        out = torch.empty(rows, columns)
        native.unpack(buffer, 0, rows, out)
        numbers = torch.randint(rows, (random.randint(1, 20),))
        assert torch.equal(native.gather(buffer, numbers, columns), out[numbers])
        damaged = buffer.clone()
        for _ in range(random.randint(1, 3)):
            damaged[random.randrange(64)] = random.randrange(256)
        with contextlib.suppress(InputError):
            native.multiply(x, damaged, rows)
        with contextlib.suppress(AssertionError):
            native.unpack(damaged, 0, rows, out)
        with contextlib.suppress(IndexError):
            native.gather(damaged, numbers, columns)
        count += 1
    print(f"{count:,} random weights", flush=True)


# The program. A search runs in a process of its own, whose allocations the sanitizer watches

KERNELS = {
    "training": (PACKAGE / "core", overrun_training, search_training),
    "start": (PACKAGE / "oneshot", overrun_start, search_start),
    "inference": (ROOT / "runtime" / "src" / "castlm_runtime" / "kernels", overrun_inference, search_inference),
}


def start(kernels: str, library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    runtime = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": ":".join(runtime), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.fuzz_kernels", "--kernels", kernels, "--library", str(library), *arguments]
    stderr = subprocess.PIPE if "--overrun" in arguments else None
    return subprocess.run(command, env=environment, text=True, stderr=stderr)


def build_and_search(kernels: str, minutes: float) -> int:
    """The exit code of a search, which is 1 as well where the sanitizer does not notice a read past a buffer."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "sanitized.so"
        sources = map(str, sorted(KERNELS[kernels][0].glob("*.cpp")))
        subprocess.run(["g++", *FLAGS, "-O1", "-pthread", "-shared", "-fPIC", *sources, "-o", library], check=True)
        proof = start(kernels, library, "--overrun")
        if proof.returncode == 0 or "AddressSanitizer" not in proof.stderr:
            print(f"the sanitizer did not notice a read past a buffer:\n{proof.stderr}", file=sys.stderr)
            return 1
        return start(kernels, library, "--minutes", str(minutes)).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_kernels")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--kernels", choices=KERNELS, help=argparse.SUPPRESS)
    parser.add_argument("--library", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--overrun", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.library is None:
        return int(any(build_and_search(kernels, options.minutes) for kernels in KERNELS))
    _, overrun, search = KERNELS[options.kernels]
    if options.overrun:
        overrun(options.library)
    else:
        search(options.library, 60 * options.minutes)
        print("no finding")
    return 0


if __name__ == "__main__":
    sys.exit(main())
