"""The last table of `castlm demo`: file size, memory and time of the n:m result against the dense model.

Every model runs in its own process, so that each has its own peak of memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from castlm.api.pack import pack
from castlm.hardware import in_own_process, peak_memory
from castlm.say import Say

REPEATS = 2
NEW_TOKENS = 48


class Case(NamedTuple):
    """A model folder and the way it is run."""

    name: str
    folder: Path
    in_fp32: bool = False
    """Cast the weights to fp32 after loading."""


class Measured(NamedTuple):
    """The figures of one process."""

    tokens_per_second: float
    peak_bytes: int
    text: str


def payoff_table(dense: Path, sparse: Path, packed: Path, prompt: str, say: Say) -> tuple[Table, str, str]:
    """Packs `sparse` to `packed`, and compares the packed model with `dense`.

    Returns:
        The table, and the texts that `dense` (in fp32) and the packed model generate.
    """
    pack(sparse, output_dir=packed, dtype="bf16", overwrite=True)
    cases = (
        Case("dense, bf16, transformers", dense),
        Case("dense, fp32, transformers", dense, in_fp32=True),
        Case("packed, bf16, castlm's kernels", packed),
    )
    say(f"measuring {len(cases)} ways to run the model")
    measured = {case.name: in_own_process(measure, case, prompt) for case in cases}
    _, in_fp32, of_packed = (measured[case.name].text for case in cases)
    return _table(cases, measured), in_fp32, of_packed


def measure(case: Case, prompt: str) -> Measured:
    """Loads a model on the CPU, generates greedily once to warm up, and `REPEATS` times for the figures."""
    from castlm.packed.generate import encode_prompt, generate_text, load_to_generate

    model, tokenizer = load_to_generate(str(case.folder), device="cpu")
    if case.in_fp32:
        model.float()
    ids = encode_prompt(tokenizer, prompt, raw=False)
    generate_text(model, tokenizer, ids, max_new_tokens=8)
    runs = [generate_text(model, tokenizer, ids, max_new_tokens=NEW_TOKENS) for _ in range(REPEATS)]
    done = max(runs, key=lambda run: run.tokens_per_second)
    return Measured(done.tokens_per_second, peak_memory("cpu"), " ".join(done.text.split()))


def _table(cases: tuple[Case, ...], measured: dict[str, Measured]) -> Table:
    table = Table(
        title=f"Greedy decoding of {NEW_TOKENS} tokens on the CPU, best of {REPEATS}, each model in its own process",
        title_justify="left",
    )
    for heading in ("model", "weight files, MiB", "peak memory of the process, MiB", "tokens/s"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for case in cases:
        size = sum(file.stat().st_size for file in case.folder.glob("*.safetensors*"))
        found = measured[case.name]
        row = (f"{size / 2**20:,.0f}", f"{found.peak_bytes / 2**20:,.0f}", f"{found.tokens_per_second:.1f}")
        table.add_row(case.name, *row)
    return table
