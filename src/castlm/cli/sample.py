"""`castlm sample`: training text from the dense model itself, for those who have no data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from castlm.cli.options import parse, result_folder
from castlm.core.errors import InputError
from castlm.fields import positional


@dataclass
class SampleCommand:
    """Let a model write text to train on: documents, continuations of prompts, or conversations. Stopped by Ctrl-C or a
    kill, the same command with --resume goes on where it stood."""

    path: str = positional()
    """Local Hugging Face folder, run of `castlm train`, hub id, GGUF file, or "demo"."""

    output_file: str = field(kw_only=True)
    """File to write, .jsonl, with one document or conversation on a line."""

    num_tokens: int = field(default=1_000_000, metadata={"at_least": 1})
    """Tokens to write, without the duplicates that are left out."""

    chat: bool = False
    """Write conversations in the chat template, the turn of a user and the answer, instead of plain text."""

    prompts: str | None = None
    """Texts to continue, or with --chat to answer: .txt with one on each line, .jsonl, .parquet or a hub dataset."""

    column: str | None = None
    """Column that holds the prompts in .jsonl and .parquet."""

    chat_template_path: str | None = None
    """File with a Jinja chat template to use in place of the tokenizer's own."""

    max_new_tokens: int = 256
    """Tokens after which a text is cut. A conversation with a turn that is cut is left out."""

    temperature: float = 1.0
    """Above 1 makes rare tokens more likely, below 1 less."""

    top_p: float = 1.0
    """Sample from the most probable tokens that make up this probability; 1 samples from all."""

    batch_size: int = 16
    """Texts that are written at the same time."""

    dedup_prefix: int = field(default=200, metadata={"at_least": 0})
    """Two texts whose first characters, this many, are equal count as duplicates. 0 compares whole texts only."""

    seed: int = 0
    """Of the samples."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses CUDA if there is a GPU, in the dtype of the model. The CPU computes in fp32."""

    resume: bool = False
    """Go on where an earlier start with the same options was stopped."""

    overwrite: bool = False
    """Replace a file that castlm sample wrote."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    trust_remote_code: bool = False
    """Run the Python code that comes with a hub model."""

    def run(self) -> int:
        from castlm.data.sample_file import open_samples
        from castlm.data.sampling import SamplingOptions, read_prompts

        if self.resume and self.overwrite:
            raise InputError("resume and overwrite exclude each other: choose one")
        names = [option.name for option in dataclasses.fields(SamplingOptions)]
        options = SamplingOptions(**{name: getattr(self, name) for name in names})
        prompts = None if self.prompts is None else read_prompts(self.prompts, self.column)
        free = ("output_file", "num_tokens", "resume", "overwrite", "trust_remote_code")
        settings = {name: value for name, value in dataclasses.asdict(self).items() if name not in free}
        with open_samples(
            self.output_file,
            settings,
            dedup_prefix=self.dedup_prefix,
            overwrite=self.overwrite,
            resume=self.resume,
        ) as file:
            record = self._sample(file, options, prompts)
        print(
            f"{self.output_file}: {record['samples']:,} texts of {record['tokens']:,} tokens; left out: "
            f"{record['duplicates']:,} duplicates, {record['dropped']:,} empty or unfinished; {record['cut']:,} were "
            "cut at max_new_tokens"
        )
        print(f"train on it with: castlm train --model {self.path} --dataset {self.output_file} --output-dir RUN")
        return 0

    def _sample(self, file: Any, options: Any, prompts: list[str] | None) -> dict[str, Any]:
        import torch

        from castlm.data.chat import with_template
        from castlm.data.sample_file import sample
        from castlm.data.sampling import Sampler
        from castlm.hardware import choose_device
        from castlm.models import load_model
        from castlm.progress import note, shown_progress

        device = choose_device(self.device)
        loaded = load_model(
            result_folder(self.path),
            dtype=torch.float32 if device == "cpu" else None,
            trust_remote_code=self.trust_remote_code,
            revision=self.revision,
        )
        with_template(loaded.tokenizer, self.chat_template_path)
        sampler = Sampler(loaded.model.to(device), loaded.tokenizer, options, prompts=prompts, chat=self.chat)
        if self.resume:
            file.restore(sampler.prompt_of)
        try:
            with shown_progress("sampling, tokens", rate="tokens/s", before=file.tokens) as progress:
                return sample(sampler, file, num_tokens=self.num_tokens, progress=progress)
        except (KeyboardInterrupt, SystemExit):
            if file.batches:
                note(f"{file.samples:,} texts are saved; the same command with --resume goes on")
            raise


def main(arguments: list[str]) -> int:
    return int(parse(SampleCommand, arguments, "sample").run())
