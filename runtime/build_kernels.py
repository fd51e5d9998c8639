"""Builds the library of kernels when castlm-runtime is installed.

ctypes loads the library, so that its file and the wheel name no version of Python: one wheel a processor is enough.
`wheels.py` sets the two environment variables: a library that is compiled already, and the platform of the wheel.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from setuptools import Extension
from setuptools.build_meta import *  # noqa: F403  # this module is the build backend
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

FOLDER = Path("src", "castlm_runtime", "kernels")


class BuildKernels(build_ext):
    """Compiles the files of `kernels/` into `castlm_runtime/_kernels.so`."""

    def finalize_options(self) -> None:
        super().finalize_options()
        for extension in self.extensions:
            extension.sources = sorted(map(str, FOLDER.glob("*.cpp")))
            extension.depends = sorted(map(str, FOLDER.glob("*.h")))  # a changed header compiles all files again

    def build_extension(self, ext: Extension) -> None:
        built = os.environ.get("CASTLM_KERNELS")
        if built:
            to = Path(self.get_ext_fullpath(ext.name))
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(built, to)
            return
        try:
            super().build_extension(ext)
        except (CompileError, LinkError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise SystemExit(
                f"the kernels of castlm-runtime were not compiled ({reason}): install a C++17 compiler, such as g++ 12"
            ) from None

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"


class PlainWheel(bdist_wheel):
    """A wheel for every version of Python 3 on one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", os.environ.get("CASTLM_PLATFORM") or super().get_tag()[2]
