"""Builds the wheels of castlm-runtime: python runtime/wheels.py [--output-dir dist] [--targets x86_64 aarch64].

The wheel of this processor is compiled by g++, another one by zig (`pip install ziglang`), which has the headers of
every glibc and of macOS. The C++ library is linked in. The tag of a wheel of Linux is the oldest glibc that its library
needs, read from the versions of the symbols in it. The target `macos`, for Apple's processors, was never run.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-pthread", "-fPIC"]
ZIG_TARGETS = {
    "x86_64": "x86_64-linux-gnu.2.17",
    "aarch64": "aarch64-linux-gnu.2.17",
    "macos": "aarch64-macos.11.0",
}


def compiler(target: str) -> list[str]:
    """The command that compiles C++ for a processor."""
    if target == platform.machine():
        return ["g++", "-static-libstdc++", "-static-libgcc"]
    return [sys.executable, "-m", "ziglang", "c++", "-target", ZIG_TARGETS[target]]


def build_library(target: str, folder: Path) -> Path:
    """Compiles the kernels for a processor; returns the library."""
    command = compiler(target)

    def compiled(source: Path) -> str:
        to = folder / f"{source.stem}.o"
        subprocess.run([*command, *FLAGS, "-c", str(source), "-o", str(to)], check=True)
        return str(to)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sorted((ROOT / "src" / "castlm_runtime" / "kernels").glob("*.cpp"))))
    library = folder / "_kernels.so"
    subprocess.run([*command, "-shared", "-pthread", "-s", *objects, "-o", str(library)], check=True)
    return library


def platform_tag(library: Path, target: str) -> str:
    """The tag of the wheel of a library, such as manylinux_2_34_x86_64."""
    if target == "macos":
        return "macosx_11_0_arm64"
    versions = {(int(a), int(b)) for a, b in re.findall(rb"GLIBC_(\d+)\.(\d+)", library.read_bytes())}
    major, minor = max({*versions, (2, 17)})
    return f"manylinux_{major}_{minor}_{target}"


def build_wheel(target: str, to: Path) -> None:
    """Builds in a copy of the sources, as setuptools leaves files beside them that another target would find."""
    with tempfile.TemporaryDirectory() as folder:
        library = build_library(target, Path(folder))
        environment = {**os.environ, "CASTLM_KERNELS": str(library), "CASTLM_PLATFORM": platform_tag(library, target)}
        copy = Path(folder, "runtime")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(to), str(copy)]
        subprocess.run(command, check=True, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python runtime/wheels.py")
    parser.add_argument("--output-dir", type=Path, default=Path("dist"))
    parser.add_argument("--targets", nargs="+", default=["x86_64", "aarch64"], choices=[*ZIG_TARGETS])
    options = parser.parse_args()
    for target in options.targets:
        build_wheel(target, options.output_dir)
    for wheel in sorted(options.output_dir.glob("castlm_runtime-*.whl")):
        print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
