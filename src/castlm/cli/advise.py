"""`castlm advise`: whether 2:4 pays off for a model on a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from castlm.cli.options import parse, result_folder, write_json
from castlm.core.errors import InputError


@dataclass
class AdviseCommand:
    """Say which layers of a model should be dense, 2:4 or something else on a device, before anything is trained."""

    model: Annotated[str, tyro.conf.Positional]
    """Local Hugging Face folder, run of `castlm train`, hub id, GGUF file, or "demo"; only its config is read."""

    tokens: int = 1
    """Rows that a layer sees at once: the batch size in decode, the tokens of all prompts in prefill."""

    dtype: Literal["bf16", "fp16", "fp32", "int8", "fp8"] = "bf16"
    """What the model is served in now; every format is compared with it."""

    device: str = "this"
    """a100, a100-pcie, h100, h100-pcie, h200, b200, rtx4090, or "this" for the one at hand."""

    measure: bool = False
    """Time the layers on the device at hand instead of estimating them."""

    json: str | None = None
    """Write the advice there; "-" prints it instead of the table."""

    trust_remote_code: bool = False
    """Run Python code that comes with a hub model."""

    def run(self) -> int:
        from castlm.inference.advise import advise, shapes_of
        from castlm.inference.devices import find_device
        from castlm.inference.this_device import GpuTimer, this_gpu

        timer = None
        if self.device == "this":
            device = this_gpu()
            if device is None:
                raise InputError("there is no CUDA device here: pass --device, h100 say")
            timer = GpuTimer() if self.measure else None
        elif self.measure:
            raise InputError(f"--measure times the device at hand: leave out --device {self.device}")
        else:
            device = find_device(self.device)
        found = advise(
            shapes_of(result_folder(self.model), self.trust_remote_code),
            device,
            tokens=self.tokens,
            dtype=self.dtype,
            formats=timer.formats(self.dtype) if timer else None,
            seconds=timer.seconds if timer else None,
        )
        write_json(self.json, found.as_dict())
        if self.json != "-":
            print(found.text())
        return 0


def main(arguments: list[str]) -> int:
    return int(parse(AdviseCommand, arguments, "advise").run())
