"""`castlm sample`: lets the dense model write training text, for users without data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from castlm.cli.command_line import command_with, result_folder, to_stdout
from castlm.core.errors import InputError
from castlm.data.options import SamplingOptions, TextOptions
from castlm.fields import Needs, essential, free_on_resume, given, like, option, positional
from castlm.methods.options import OptimizerOptions
from castlm.training.config import TrainConfig, names_of
from castlm.training.options import DataOptions, EvaluationOptions, ModelOptions, RuntimeOptions, TeacherOptions


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Options of the text and of the sampling."""

    path: str = positional(
        essential=True,
        help='Local Hugging Face folder, run of `castlm train`, hub id, GGUF file, or "demo".',
    )

    output_file: str = essential(
        changes_result=False,
        help="File to write, .jsonl, with one document or conversation on a line.",
    )

    num_tokens: int = essential(
        1_000_000,
        at_least=1,
        may_change=True,
        help="Number of tokens to write, not counting duplicates, which are dropped.",
    )

    chat: bool = essential(
        False,
        help="Write conversations, a user's turn and an answer, in the chat template instead of plain text.",
    )

    prompts: str | None = essential(
        None,
        help="Texts to continue, or with --chat to answer: a .txt file with one per line, or any other text of "
        "castlm train.",
    )

    dedup_prefix: int = option(
        200,
        at_least=0,
        help="Number of leading characters to compare: texts that share them are duplicates. 0 compares whole texts.",
    )

    device: Literal["auto", "cpu", "cuda"] = option(
        "auto",
        help="auto uses CUDA if there is a GPU. A GPU computes in the model's dtype, a CPU in fp32.",
    )

    resume: bool = essential(
        False,
        changes_result=False,
        help="Continue an interrupted start with the same options; without one, start.",
    )

    overwrite: bool = essential(
        False,
        changes_result=False,
        help="Replace a file that castlm sample wrote.",
    )

    revision: str | None = like(ModelOptions, "revision")
    trust_remote_code: bool = like(ModelOptions, "trust_remote_code")


def _of_cache(section: type[Any], name: str, **more: Any) -> Any:
    """An option of the teacher cache, which does not change the text."""
    needs = Needs("--teacher-cache", lambda command: command.teacher_cache is not None)
    return like(section, name, needs=needs, may_change=True, **more)


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Stores the teacher's predictions for the text, for `castlm train`, whose options have the same names."""

    teacher_cache: str | None = like(TeacherOptions, "teacher_cache", essential=True)
    teacher_top_k: int = _of_cache(TeacherOptions, "teacher_top_k", default=64)
    seq_len: int = _of_cache(DataOptions, "seq_len", essential=False)
    per_device_train_batch_size: int = _of_cache(OptimizerOptions, "per_device_train_batch_size")
    eval_dataset: str | None = _of_cache(EvaluationOptions, "eval_dataset", essential=False)
    precision: Literal["auto", "fp32", "bf16"] = _of_cache(RuntimeOptions, "precision")


@dataclass(frozen=True)
class SampleCommand(CacheOptions, SamplingOptions, TextOptions, SampleOptions):
    """Let a model write text to train on: documents, continuations of prompts, or conversations. After Ctrl-C or a
    kill, the same command with --resume continues.
    """

    def run(self) -> int:
        from castlm.lab.sampling import open_samples, read_prompts

        if self.resume and self.overwrite:
            raise InputError("resume and overwrite exclude each other: choose one")
        config = self._train_config()
        prompts = None if self.prompts is None else read_prompts(self.prompts, self)
        if self.teacher_cache is not None:
            from castlm.training.train import check_teacher_pass

            check_teacher_pass(config)
        free = free_on_resume([SampleCommand])
        settings = {name: value for name, value in dataclasses.asdict(self).items() if name not in free}
        with open_samples(
            self.output_file,
            settings,
            prompts=prompts,
            dedup_prefix=self.dedup_prefix,
            overwrite=self.overwrite,
            resume=self.resume,
        ) as file:
            if not file.is_finished:
                self._sample(file, prompts)
            elif file.tokens < self.num_tokens:
                raise InputError(
                    f"{self.output_file} is finished with {file.tokens:,} tokens: lower num_tokens, or overwrite it"
                )
        to_stdout(
            f"{self.output_file}: {file.samples:,} texts of {file.tokens:,} tokens; left out: {file.duplicates:,} "
            f"duplicates, {file.dropped:,} empty or unfinished; {file.cut:,} were cut at max_new_tokens"
        )
        if self.teacher_cache is not None:
            from castlm.progress import note, shown_progress
            from castlm.training.train import fill_teacher_cache

            try:
                with shown_progress("reading with the teacher, sequences", rate="sequences/s") as progress:
                    num_sequences = fill_teacher_cache(config, progress)
            except (InputError, KeyboardInterrupt, SystemExit) as error:
                remedy = "" if isinstance(error, InputError) else ": the same command with --resume continues there"
                note(f"the text is finished, {self.teacher_cache} is not{remedy}")
                raise
            to_stdout(
                f"{self.teacher_cache}: the teacher's top {self.teacher_top_k} tokens for {num_sequences:,} sequences "
                f"of {self.seq_len} tokens, for any number of steps without a teacher"
            )
        to_stdout(f"train on it with: {command_with('train', config.given)}")
        return 0

    def _train_config(self) -> TrainConfig:
        """The run that the text is for."""
        passed_on = ("chat_template_path", "document_limit", "revision", "trust_remote_code")
        options: dict[str, Any] = {name: getattr(self, name) for name in given(self, passed_on)}
        if self.teacher_cache is not None:
            options |= {name: getattr(self, name) for name in (*names_of(CacheOptions), "seed", "device")}
        return TrainConfig.of(result_folder(self.path), self.output_file, "RUN", **options)

    def _sample(self, file: Any, prompts: list[str] | None) -> None:
        from castlm.data.chat import with_template
        from castlm.lab.sampling import Sampler, fill, load_to_sample
        from castlm.progress import note, shown_progress

        loaded = load_to_sample(
            result_folder(self.path),
            self.device,
            trust_remote_code=self.trust_remote_code,
            revision=self.revision,
        )
        with_template(loaded.tokenizer, self.chat_template_path)
        sampler = Sampler(loaded.model, loaded.tokenizer, self, prompts=prompts, chat=self.chat)
        if self.resume:
            note(f"continuing after {file.samples:,} texts" if file.batches else "nothing to continue: starting")
        try:
            with shown_progress("sampling, tokens", rate="tokens/s", before=file.tokens) as progress:
                fill(file, sampler, num_tokens=self.num_tokens, progress=progress, say=note)
        except (KeyboardInterrupt, SystemExit):
            if file.batches:
                note(f"{file.samples:,} texts are saved; the same command with --resume continues")
            raise
