"""What this process may use of the machine: cores and memory."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

from castlm_runtime.errors import InputError

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def processors() -> set[int]:
    """The numbers of the processors that this process may use by its affinity, hyper-threads among them."""
    try:
        return os.sched_getaffinity(0)
    except AttributeError:  # on macOS
        return set(range(os.cpu_count() or 1))


def check_threads(number: int) -> None:
    """Raises `InputError` for more threads than processors, or less than none."""
    most = len(processors())
    if not 0 <= number <= most:
        raise InputError(f"--threads {number} is not from 0 to {most}, the number of processors here")


def physical_cores() -> int:
    """The physical cores that this process may use: by its affinity and its cgroup, hyper-threads counted once."""
    cores = set()
    for number in processors():
        topology = Path(f"/sys/devices/system/cpu/cpu{number}/topology")
        try:
            cores.add(((topology / "physical_package_id").read_text(), (topology / "core_id").read_text()))
        except OSError:
            cores.add((str(number), ""))
    count = len(cores)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return max(1, count)


def address_space() -> int:
    """Bytes of addresses that this process has; 0 where the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def available_memory() -> float:
    """Bytes of memory that are free, or can be made free, within the limits of the process and of its cgroup."""
    bounds = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        bounds += [1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        bounds.append(float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / 2)
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        bounds.append(max(0.0, float(most - address_space())))
    for limit, used in _CGROUPS:
        try:
            bounds.append(max(0.0, float(Path(limit).read_text()) - float(Path(used).read_text())))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(bounds)
