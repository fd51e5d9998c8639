"""The kernels of every instruction set against the plain path, for this processor and, emulated, for 64-bit ARM."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from castlm.packed import native

pytestmark = pytest.mark.slow  # each compiles all kernels, and an emulator runs them

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "runtime" / "src" / "castlm_runtime" / "kernels").glob("*.cpp"))
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=fast", "-pthread", "-static"]
ARM_COMPILER, ARM_EMULATOR, X86_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64", "qemu-x86_64"


def build(compiler: str, program: Path, *flags: str) -> Path:
    driver = ROOT / "tests" / "kernel_levels.cpp"
    subprocess.run([compiler, *FLAGS, *flags, str(driver), *map(str, SOURCES), "-o", str(program)], check=True)
    return program


def levels_that_agree(*command: str | Path) -> list[str]:
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert run.returncode == 0, run.stdout
    return run.stdout.split()


@pytest.mark.skipif(
    not (shutil.which(ARM_COMPILER) and shutil.which(ARM_EMULATOR)),
    reason=f"needs {ARM_COMPILER} and {ARM_EMULATOR} (Debian: g++-aarch64-linux-gnu, qemu-user)",
)
def test_neon_kernels_agree_with_the_plain_path_under_emulation(tmp_path):
    program = build(ARM_COMPILER, tmp_path / "levels")
    for processor in ("max", "cortex-a72"):  # with and without products of four bytes
        assert levels_that_agree(ARM_EMULATOR, "-cpu", processor, program) == ["plain", "neon"]


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not (shutil.which("g++") and shutil.which(X86_EMULATOR)),
    reason=f"needs x86-64, g++ and {X86_EMULATOR} (Debian: qemu-user)",
)
def test_one_build_takes_what_each_x86_processor_has(tmp_path):
    program = build("g++", tmp_path / "levels")
    if native.kernels() is not None:
        assert levels_that_agree(program) == list(native.levels())
    assert levels_that_agree(X86_EMULATOR, "-cpu", "Haswell", program) == ["plain", "avx2"]
    assert levels_that_agree(X86_EMULATOR, "-cpu", "Nehalem-v1", program) == ["plain"]


@pytest.mark.skipif("avx512" not in native.levels(), reason="needs AVX-512 with VNNI and VBMI2")
def test_amx_kernels_agree_with_the_plain_path_where_their_instructions_are_emulated(tmp_path):
    program = build("g++", tmp_path / "levels", "-include", str(ROOT / "tests" / "emulated_amx.h"))
    assert levels_that_agree(program)[-1] == "amx"
