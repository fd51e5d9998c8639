"""Builds the C++ kernels with AddressSanitizer and UndefinedBehaviorSanitizer, and feeds them random input.

Run `python -m tests.fuzz_kernels --minutes 10`, as `make fuzz` does. The kernels are called as the optimizer calls
them, through `castlm.core.native` and ctypes, and their results are compared with torch's. Before the search, one call
that reads past a buffer shows that the sanitizer would have stopped it. Not collected by pytest.
"""

import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.sanitized import ROOT, main


def overrun(library: Path) -> None:
    """Passes a weight whose width is too large, past the checks of `native`: the sanitizer has to end the process."""
    import torch

    from castlm.core import native

    weight, mask = torch.randn(4, 8), torch.zeros(4, 1, dtype=torch.uint8)
    parameters = native._parameters([weight], [mask])
    parameters[0].width = 4096
    native.load_kernels(str(library)).castlm_refresh(parameters, ctypes.c_int64(1), 2, 4, 1)


def search(library: Path, seconds: float) -> None:
    """Runs every check on random input until the time is over, and prints how many inputs each has seen."""
    import torch
    from hypothesis import HealthCheck, given, settings

    from castlm.core import native
    from tests import kernel_cases as cases

    loaded = native.load_kernels(str(library))
    native.kernels = lambda: loaded  # type: ignore[assignment]
    checks = {
        "refresh": (cases.refreshes(), cases.check_refresh),
        "update": (cases.updates(), cases.check_update),
        "broken update": (cases.broken_updates(), cases.check_broken_update),
    }
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


if __name__ == "__main__":
    sources = [ROOT / "src" / "castlm" / "core" / "kernels.cpp"]
    sys.exit(main("tests.fuzz_kernels", sources, overrun, search))
