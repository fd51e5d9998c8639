"""Builds the inference kernels with AddressSanitizer and UndefinedBehaviorSanitizer, and feeds them random input.

Run `python -m tests.fuzz_inference --minutes 10`. Products are compared with those in float64, as in
`packed_weights`; buffers with random bytes in their header must be refused or multiplied within their bounds.
Before the search, one call that claims a buffer longer than it is shows that the sanitizer would have stopped it. Not
collected by pytest.
"""

import contextlib
import ctypes
import random
import sys
import time
from pathlib import Path

from tests.sanitized import ROOT, main


def load(library: Path) -> None:
    """Lets castlm call this library."""
    from castlm.inference import native

    loaded = native.load_kernels(str(library))
    native.kernels = lambda: loaded  # type: ignore[assignment]


def overrun(library: Path) -> None:
    """Claims that a buffer is as long as its header says when it is cut: the sanitizer has to end the process."""
    import torch

    from castlm.inference import native
    from tests.packed_weights import buffer_of, random_packed

    load(library)
    whole = buffer_of(random_packed("bf16", 2, 4, 64, 512))
    cut = (ctypes.c_uint8 * 4096).from_buffer_copy(bytes(whole[:4096].tolist()))
    x, y = torch.randn(1, 512), torch.empty(1, 64)
    native.kernels().castlm_multiply(ctypes.addressof(cut), whole.numel(), x.data_ptr(), 0, 1, 512, y.data_ptr(), 64, 1)


def search(library: Path, seconds: float) -> None:
    """Tries random weights, shapes, batches and damaged headers until the time is over, and prints how many."""
    import torch

    from castlm.core.errors import InputError
    from castlm.inference import native
    from tests.packed_weights import PATTERNS, buffer_of, check_product, random_packed

    load(library)
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
        with contextlib.suppress(AssertionError):
            native.unpack(damaged, 0, rows, out)
        count += 1
    print(f"{count:,} random weights", flush=True)


if __name__ == "__main__":
    sources = sorted((ROOT / "src" / "castlm" / "inference").glob("*.cpp"))
    sys.exit(main("tests.fuzz_inference", sources, overrun, search))
