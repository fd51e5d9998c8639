"""Builds the library of kernels when castlm-runtime is installed.

ctypes loads the library, so that its file and the wheel name no version of Python: one wheel a processor is enough.
"""

from __future__ import annotations

from pathlib import Path

from setuptools.build_meta import *  # noqa: F403  # this module is the build backend
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDER = Path("src", "castlm_runtime", "kernels")


class BuildKernels(build_ext):
    """Compiles the files of `kernels/` into `castlm_runtime/_kernels.so`."""

    def finalize_options(self) -> None:
        super().finalize_options()
        for extension in self.extensions:
            extension.sources = sorted(map(str, FOLDER.glob("*.cpp")))
            extension.depends = sorted(map(str, FOLDER.glob("*.h")))  # a changed header compiles all files again

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"


class PlainWheel(bdist_wheel):
    """A wheel for every version of Python 3 on one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]
