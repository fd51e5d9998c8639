"""Builds the inference kernels with AddressSanitizer and UndefinedBehaviorSanitizer, and feeds them random input.

Run `python -m tests.fuzz_inference --minutes 10`. Products are compared with those in float64, as in
`packed_weights`; buffers with random bytes in their header must be refused or multiplied within their bounds.
Before the search, one call that claims a buffer longer than it is shows that the sanitizer would have stopped it. Not
collected by pytest.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.sanitized import ROOT, build, start

MODULE = "tests.fuzz_inference"

SOURCES = sorted((ROOT / "src" / "castlm" / "inference").glob("*.cpp"))


def overrun() -> None:
    """Claims that a buffer is as long as its header says when it is cut: the sanitizer has to end the process."""
    import torch

    from castlm.inference import native
    from tests.packed_weights import buffer_of, random_packed

    whole = buffer_of(random_packed("bf16", 2, 4, 64, 512))
    cut = (ctypes.c_uint8 * 4096).from_buffer_copy(bytes(whole[:4096].tolist()))
    x, y = torch.randn(1, 512), torch.empty(1, 64)
    native.kernels().castlm_multiply(ctypes.addressof(cut), whole.numel(), x.data_ptr(), 0, 1, 512, y.data_ptr(), 64, 1)


def search(seconds: float) -> int:
    """Random weights, shapes, batches and damaged headers until the time is over; how many."""
    import torch

    from castlm.core.errors import InputError
    from castlm.inference import native
    from tests.packed_weights import PATTERNS, buffer_of, check_product, random_packed

    count, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        n, m = random.choice(PATTERNS)
        groups = random.randint(1, 40) if random.randrange(5) else random.randint(500, 900)  # wide ones too
        rows, columns = random.randint(1, 40), groups * (m or 5)
        packed = random_packed(random.choice([*native.VALUES]), n, m, rows, columns, seed=count)
        buffer = buffer_of(packed, random.choice(["best", "rows"]) if m else "best").clone()  # without room after it
        x = torch.randn(random.choice([1, random.randint(1, 40)]), columns)
        check_product(packed, buffer, x)
        out = torch.empty(rows, columns)
        native.unpack(buffer, 0, rows, out)
        damaged = buffer.clone()
        for _ in range(random.randint(1, 3)):
            damaged[random.randrange(64)] = random.randrange(256)
        with contextlib.suppress(InputError):
            native.multiply(x, damaged, rows)
        with contextlib.suppress(InputError):
            native.unpack(damaged, 0, rows, out)
        count += 1
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--library", help=argparse.SUPPRESS)
    parser.add_argument("--overrun", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.library:
        from castlm.inference import native

        loaded = native.load_kernels(options.library)
        native.kernels = lambda: loaded  # type: ignore[assignment]
        if options.overrun:
            overrun()
            return 0
        print(f"{search(60 * options.minutes):,} random weights, no complaint", flush=True)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        library = build(SOURCES, Path(scratch))
        if "AddressSanitizer" not in (start(MODULE, library, "--overrun").stderr or ""):
            print("the sanitizer does not see a read past a buffer: these checks prove nothing", file=sys.stderr)
            return 1
        return start(MODULE, library, "--minutes", str(options.minutes)).returncode


if __name__ == "__main__":
    sys.exit(main())
