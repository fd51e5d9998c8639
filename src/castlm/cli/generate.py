"""`castlm generate`: text from a model, plain or packed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from castlm.cli.command_line import use_threads
from castlm.cli.engine import engine_folder, has_gpu
from castlm.fields import like, option, positional
from castlm.names import LAYOUT, printable
from castlm.training.options import ModelOptions
from castlm_runtime.machine import check_threads

if TYPE_CHECKING:
    from castlm_runtime.generate import Generated


@dataclass
class GenerateCommand:
    """Continue a prompt, or answer it if the model has a chat template, and print the text as it comes."""

    path: str = positional(
        help='Folder, plain or packed, run of `castlm train`, hub id, GGUF file, or "demo".',
    )

    prompt: str = option(
        help="Text to continue or to answer.",
    )

    image: tuple[str, ...] = option(
        (),
        help="Images that the prompt is about, for a vision-language model.",
    )

    max_new_tokens: int = option(
        128,
        at_least=1,
        help="Maximum number of new tokens.",
    )

    temperature: float = option(
        0.0,
        at_least=0,
        help="0, or less than 1e-6, always takes the most probable token; above, tokens are sampled.",
    )

    seed: int = option(
        0,
        help="Seed of the samples.",
    )

    document_limit: float = option(
        1.0,
        above=0,
        help="Factor on the limit of 64 million pixels for an image.",
    )

    raw: bool = option(
        False,
        help="Continue the prompt as it is, without a chat template.",
    )

    threads: int = option(
        0,
        at_least=0,
        help="Processor threads; 0 takes the physical cores that the process may use.",
    )

    trust_remote_code: bool = like(ModelOptions, "trust_remote_code")

    def run(self) -> int:
        from castlm.progress import note

        check_threads(self.threads)
        folder = None if self.image or self.trust_remote_code or has_gpu() else engine_folder(self.path)
        done = self._by_transformers() if folder is None else self._by_engine(folder)
        print(flush=True)
        note(str(done))
        return 0

    def _by_engine(self, folder: Path) -> Generated:
        """By castlm-runtime, which starts in the time that importing torch would take."""
        from castlm_runtime.generate import Session

        session = Session.open(folder, threads=self.threads)
        return session.generate(
            session.encode(self.prompt, self.raw),
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
            write=_print,
        )

    def _by_transformers(self) -> Generated:
        from castlm.data.images import encode_image_prompt, open_processor
        from castlm.packed.generate import encode_prompt, generate_text, load_to_generate
        from castlm.progress import note

        use_threads(self.threads)
        model, tokenizer = load_to_generate(
            self.path, as_stored=False, say=note, trust_remote_code=self.trust_remote_code
        )
        if self.image:
            processor = open_processor(self.path, tokenizer, trust_remote_code=self.trust_remote_code)
            ids, extra = encode_image_prompt(processor, self.prompt, self.image, self.raw, self.document_limit)
        else:
            ids, extra = encode_prompt(tokenizer, self.prompt, self.raw), {}
        return generate_text(
            model,
            tokenizer,
            ids,
            extra=extra,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
            write=_print,
            say=note,
        )


def _print(text: str) -> None:
    print(printable(text, keep=LAYOUT), end="", flush=True)
