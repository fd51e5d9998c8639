"""Lets a model write training text, for users without data: from nothing, after prompts, or as conversations.

The work is divided into batches, each with its own prompts and seed. An interrupted run therefore continues with the
next batch and writes the same text as an uninterrupted one, on the same device and version of torch. Conversations are
sampled as in Magpie (arXiv 2406.08464): the model continues its chat template at the user's turn, then answers itself.

Rows go into `NAME.part` first. `NAME.castlm.json`, written after each batch, records the settings and the counts, bytes
and hash of complete batches; after a kill, bytes beyond them are cut off. A finished file gets its name in one rename.
A file is finished if it has the recorded hash and there is no `NAME.part`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from castlm.core.errors import InputError
from castlm.data.columns import CUT_COLUMN, Kind
from castlm.data.documents import open_documents
from castlm.data.options import SamplingOptions, TextOptions
from castlm.data.tokens import Encoder
from castlm.files.atomic_file import atomic_write_json, flush_folder, reporting_full_disk
from castlm.files.output import locked
from castlm.hardware import choose_device
from castlm.models.architecture import check_context, context_length, generating
from castlm.models.io import Loaded, load_model
from castlm.say import Progress, Say, silent
from castlm_runtime.reading import read_record, read_text, sha256_file, user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SENTINEL = "castlm-user-turn"
FEW_SAMPLES = 32
"""Number of texts after which a line may report that most of them are left out."""
_NUM_NEW = 256
"""Most tokens of a text, where neither the user nor the model's context says otherwise."""
PATIENCE = 20
"""Consecutive batches without a new text after which sampling stops."""

_COUNTS = ("batches", "samples", "tokens", "bytes", "duplicates", "cut", "dropped")


class Sample(NamedTuple):
    """A document that the model wrote."""

    row: dict[str, Any]
    """The row of the file: `messages`, or `text` with `is_cut` (true if the model did not end the text)."""
    num_tokens: int
    """The prompt and the generated text."""


class Sampler:
    """Samples batches of documents.

    Args:
        model: in eval mode.
        prompts: texts to continue, or with `chat` the user's turns; used in order, repeatedly. None starts from the
            token that begins a document; with `chat` it samples the user's turn too.
        chat: sample conversations of one turn each, in the tokenizer's chat template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        options: SamplingOptions,
        *,
        prompts: Sequence[str] | None = None,
        chat: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.options, self.chat = model, tokenizer, options, chat
        self.prompts = list(prompts) if prompts is not None else None
        encoder = Encoder(tokenizer)
        self._template = encoder.chat
        self._first = encoder.bos or [encoder.eos]
        ends = model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        ends += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._ends = sorted({encoder.eos, *encoder.bos, *ends})  # a document also ends where the next one begins
        self._user: list[int] = []
        if chat:  # the text before a user's first turn, and the token that ends the turn
            before, found, after = self._template.render([_user(_SENTINEL)]).partition(_SENTINEL)
            following = self._encode(after)
            if not found or not before or not following or following[0] not in tokenizer.all_special_ids:
                raise InputError(
                    f"the chat template of {tokenizer.name_or_path} does not end a user's turn with a special token "
                    f"({after[:20]!r} follows it): sample without chat"
                )
            self._user, self._ends = self._encode(before), sorted({*self._ends, following[0]})
        self._longest = context_length(model.config)
        longest = max(len(self._begin(prompt)) for prompt in self.prompts or [""])
        self._num_new = options.max_new_tokens or _NUM_NEW
        if options.max_new_tokens is None and self._longest is not None:
            turns = 2 if chat and prompts is None else 1  # the user's turn is sampled too
            self._num_new = max(1, min(_NUM_NEW, (self._longest - longest) // turns))
        check_context(model.config, longest, self._num_new)

    def batch(self, number: int) -> Sequence[Sample | None]:
        """Samples a batch, in order; the same number and options give the same samples.

        With `chat`, a conversation with an empty or unfinished turn is None.
        """
        size = self.options.batch_size
        prompts = [prompt_of(self.prompts, number * size + row) for row in range(size)]
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        seed = np.random.SeedSequence([self.options.seed, number]).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=devices), torch.inference_mode():
            torch.manual_seed(int(seed[0]))
            return self._talk(prompts) if self.chat else self._write(prompts)

    def _write(self, prompts: list[str]) -> list[Sample]:
        begins = [self._begin(prompt) for prompt in prompts]
        samples = []
        for prompt, begin, (ids, is_whole) in zip(prompts, begins, self._continue(begins)):
            # Decoded together, because some tokenizers drop the space before the first word.
            before, whole = self._decode(begin), self._decode(begin + ids)
            text = whole[len(before) :] if whole.startswith(before) else self._decode(ids)
            samples.append(Sample({"text": prompt + text, CUT_COLUMN: not is_whole}, len(begin) + len(ids)))
        return samples

    def _talk(self, prompts: list[str]) -> list[Sample | None]:
        asked = [bool(prompt.strip()) for prompt in prompts]
        if self.prompts is None:
            users = self._continue([self._user] * len(prompts))
            prompts = [self._decode(ids).strip() for ids, _ in users]
            asked = [is_whole and bool(prompt) for prompt, (_, is_whole) in zip(prompts, users)]
        begins = {row: self._begin(prompts[row]) for row, ok in enumerate(asked) if ok}
        if self._longest is not None:  # a long question leaves no room for an answer
            most = self._longest - self._num_new
            begins = {row: begin for row, begin in begins.items() if len(begin) <= most}
        samples: list[Sample | None] = [None] * len(prompts)
        for (row, begin), (ids, is_whole) in zip(begins.items(), self._continue([*begins.values()])):
            if is_whole and (text := self._decode(ids).strip()):
                messages = [_user(prompts[row]), {"role": "assistant", "content": text}]
                samples[row] = Sample({"messages": messages}, len(begin) + len(ids))
        return samples

    def _begin(self, prompt: str) -> list[int]:
        """The token ids that are continued."""
        if not self.chat:
            return self._first + self._encode(prompt)
        if not prompt:
            return self._user
        return self._encode(self._template.render([_user(prompt)], reply=True))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _continue(self, begins: list[list[int]]) -> list[tuple[list[int], bool]]:
        """Samples after each of `begins`, in one batch, padded on the left.

        Returns the generated tokens without the end token, and whether there was one.
        """
        if not begins:
            return []
        width = max(map(len, begins))
        ids = torch.full((len(begins), width), self._ends[0], device=self.model.device)
        mask = torch.zeros_like(ids)
        for row, begin in enumerate(begins):
            ids[row, width - len(begin) :] = torch.tensor(begin)
            mask[row, width - len(begin) :] = 1
        config = GenerationConfig(
            do_sample=True,
            temperature=self.options.temperature,
            top_p=self.options.top_p,
            top_k=0,
            max_new_tokens=self._num_new,
            eos_token_id=self._ends,
            pad_token_id=self._ends[0],
        )
        own = self.model.generation_config
        self.model.generation_config = config  # transformers would fill unset options from it
        try:
            output = generating(self.model).generate(input_ids=ids, attention_mask=mask, generation_config=config)
        finally:
            self.model.generation_config = own
        found, ends = [], set(self._ends)
        for row in output[:, width:].tolist():
            end = next((place for place, token in enumerate(row) if token in ends), None)
            found.append((row[:end], end is not None))
        return found


def load_to_sample(
    name: str, device: str = "auto", *, trust_remote_code: bool = False, revision: str | None = None
) -> Loaded:
    """A model on a device, as of `choose_device`: in its own dtype on a GPU, in fp32 on a CPU."""
    device = choose_device(device)
    dtype = torch.float32 if device == "cpu" else None
    loaded = load_model(name, dtype=dtype, trust_remote_code=trust_remote_code, revision=revision)
    nn.Module.to(loaded.model, device)
    return loaded


def prompt_of(prompts: Sequence[str] | None, place: int) -> str:
    """The prompt of sample number `place`, counted over the batches; "" without prompts."""
    return prompts[place % len(prompts)] if prompts is not None else ""


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def read_prompts(path: str | Path, options: TextOptions) -> list[str]:
    """The prompts in a file: the lines of a .txt file, else the texts of `open_documents`.

    Raises `InputError` where there is no prompt, as in conversations.
    """
    if str(path).lower().endswith(".txt"):
        prompts = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    else:
        documents = open_documents(path, options)
        prompts = [piece.text for piece in documents.pieces(None)] if documents.kind is Kind.TEXT else []
    if not prompts:
        raise InputError(f"{path} holds no prompt: give one on each line, or name a column of texts")
    return prompts


# --------------------------------------------------------------------------------------------------------- the file


class SampleFile:
    """Rows of samples, appended batch by batch. Made by `open_samples`.

    Attributes:
        batches, samples, tokens, bytes, duplicates, cut, dropped: counts of the complete batches.
        is_finished: whether the file was finished by an earlier start.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any], prompts: Sequence[str] | None, dedup_prefix: int
    ) -> None:
        self.path = path
        self.part = path.with_name(f"{path.name}.part")
        self.record_file = path.with_name(f"{path.name}.castlm.json")
        self.settings = json.loads(json.dumps(settings))  # as a record gives them back
        self.is_finished = False
        self.batches = self.samples = self.tokens = self.bytes = self.duplicates = self.cut = self.dropped = 0
        self._prompts, self._dedup_prefix = prompts, dedup_prefix
        self._replaces: str | None = None  # SHA-256 of the file that the new one replaces
        self._seen: set[bytes] = set()
        self._digest = hashlib.sha256()

    def begin(self, overwrite: bool, resume: bool) -> None:
        """Continues an earlier start, or begins a new one where nothing is in the way; errors as `open_samples`."""
        record = read_record(self.record_file)
        digest = sha256_file(self.path) if os.path.lexists(self.path) else None
        known = {
            self.record_file: "settings" in record,
            self.path: digest in (record.get("sha256"), record.get("replaces")),
            self.part: bool(record),
        }
        for file, is_known in known.items():
            if os.path.lexists(file) and not is_known:
                raise InputError(
                    f"{file} was not written by castlm, or was changed since: move it away, or name another file"
                )
        has_part = os.path.lexists(self.part)
        self.is_finished = resume and digest is not None and digest == record.get("sha256") and not has_part
        if not (overwrite or resume) and (digest is not None or has_part):
            raise InputError(
                f"{self.path} or a part of it already exists: name another file, or pass --resume or --overwrite"
            )
        if resume and record:
            self._restore(record)
        if self.is_finished:
            return
        self._replaces = digest
        if not self.batches:  # a kill from now on leaves no rows without a record
            self._write_record()

    def _restore(self, record: Mapping[str, Any]) -> None:
        before, now = record.get("settings"), self.settings
        changed = InputError(
            f"{self.part} or its record {self.record_file.name} has changed since castlm wrote it: remove both, and "
            "start again"
        )
        counts = {name: record.get(name) for name in _COUNTS}
        if not isinstance(before, dict) or any(type(count) is not int or count < 0 for count in counts.values()):
            raise changed
        names = [name for name in sorted(now | before) if before.get(name) != now.get(name)]
        if found := [f"{name} {before.get(name)} -> {now.get(name)}" for name in names]:
            raise InputError(f"{self.path} was sampled differently ({', '.join(found)}): undo that, or start again")
        for name, count in counts.items():
            setattr(self, name, count)
        if self.is_finished or not self.bytes:
            return
        number = 0
        try:
            with self.part.open("rb") as file:
                for number, line in enumerate(islice(file, self.samples), 1):  # noqa: B007  # compared below
                    self._digest.update(line)
                    row = json.loads(line)
                    self._is_new(prompt_of(self._prompts, row["sample"]), row)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise changed from error
        if number != self.samples or self._digest.hexdigest() != record.get("sha256"):
            raise changed

    def add(self, samples: Sequence[Sample | None], size: int) -> int:
        """Appends the new texts of a batch of `size` and records that it is done; returns their number."""
        rows = []
        for place, sample in enumerate(samples, self.batches * size):
            prompt = prompt_of(self._prompts, place)
            if sample is None or not generated_of(sample.row, prompt).strip():
                self.dropped += 1
            elif not self._is_new(prompt, sample.row):
                self.duplicates += 1
            else:
                self.tokens += sample.num_tokens
                self.cut += sample.row.get(CUT_COLUMN, False)
                rows.append({**sample.row, "sample": place})
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        with (
            reporting_full_disk(self.part, "free some space and resume"),
            self.part.open("r+b" if self.bytes else "wb") as file,
        ):
            file.truncate(self.bytes)
            file.seek(self.bytes)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._digest.update(content)
        self.bytes += len(content)
        self.samples += len(rows)
        self.batches += 1
        self._write_record()
        return len(rows)

    def finish(self) -> None:
        """Gives the file its name, unless another file of that name has appeared."""
        if self.path.exists() and sha256_file(self.path) != self._replaces:
            raise InputError(
                f"{self.path} was not written by castlm: move it away and resume; the text is in {self.part}"
            )
        os.replace(self.part, self.path)
        flush_folder(self.path.parent)
        self._replaces = None
        self._write_record()

    def _write_record(self) -> None:
        record = {name: getattr(self, name) for name in _COUNTS}
        record |= {"sha256": self._digest.hexdigest(), "settings": self.settings}
        atomic_write_json(self.record_file, record | ({"replaces": self._replaces} if self._replaces else {}))

    def _is_new(self, prompt: str, row: Mapping[str, Any]) -> bool:
        """Whether no earlier text is the same or has the same first `dedup_prefix` characters after its prompt."""
        generated = generated_of(row, prompt)
        parts = [("whole", prompt, generated)]
        if self._dedup_prefix:
            parts.append(("prefix", prompt, generated[: self._dedup_prefix]))
        keys = [hashlib.sha256("\0".join(part).encode("utf-8", "replace")).digest()[:16] for part in parts]
        is_new = self._seen.isdisjoint(keys)
        if is_new:
            self._seen.update(keys)
        return is_new


def generated_of(row: Mapping[str, Any], prompt: str) -> str:
    """The part of a row's text that the model wrote, without the prompt."""
    if "text" in row:
        return str(row["text"]).removeprefix(prompt)
    question, answer = (str(message["content"]) for message in row["messages"])
    return answer if prompt else f"{question}\0{answer}"


@contextmanager
def open_samples(
    path: str | Path,
    settings: Mapping[str, Any],
    *,
    prompts: Sequence[str] | None = None,
    dedup_prefix: int,
    overwrite: bool = False,
    resume: bool = False,
) -> Iterator[SampleFile]:
    """Opens the file at `path` for new samples and holds its lock during the block.

    Args:
        settings: everything that the samples depend on; `resume` compares them.
        prompts: as for `Sampler`.
        dedup_prefix: characters after which two texts with the same beginning count as one; 0 compares whole texts.
        resume: continue an unfinished file, or open a finished one, if there is one.

    Raises:
        InputError: the file exists (without `overwrite`), is not castlm's, or another process writes it; or an earlier
            start had other settings, or its files have changed.
    """
    path = user_path(path)
    if path.suffix != ".jsonl" or path.is_dir() or not path.parent.is_dir():
        raise InputError(f"output_file {path} cannot be made: name a file that ends in .jsonl in an existing folder")
    lock = path.with_name(f".{path.name}.lock")
    with locked(lock, "sample", path):
        file = SampleFile(path, settings, prompts, dedup_prefix)
        was_recorded = os.path.lexists(file.record_file)
        try:
            file.begin(overwrite, resume)
            yield file
        except BaseException:
            if not (was_recorded or file.batches or os.path.lexists(file.part)):  # nothing written leaves no trace
                file.record_file.unlink(missing_ok=True)
            raise
        finally:
            lock.unlink(missing_ok=True)


def fill(
    file: SampleFile,
    sampler: Sampler,
    *,
    num_tokens: int,
    progress: Progress = silent,
    say: Say = silent,
) -> None:
    """Samples batches into `file` until it holds `num_tokens` tokens, and finishes it.

    Args:
        progress: called with (tokens so far, `num_tokens`) after each batch.
        say: called with a line, once, if most texts are empty or unfinished.
    """
    size, without, said = sampler.options.batch_size, 0, False
    while file.tokens < num_tokens:
        without = 0 if file.add(sampler.batch(file.batches), size) else without + 1
        num_sampled = file.batches * size
        if not said and num_sampled >= FEW_SAMPLES and 2 * file.dropped > num_sampled:
            say(
                f"{file.dropped:,} of {num_sampled:,} texts are left out, empty or unfinished: raise max_new_tokens, "
                "lower temperature and top_p, or pass prompts"
            )
            said = True
        if without == PATIENCE:
            repeats = file.duplicates > file.dropped
            remedy = "raise temperature or the number of prompts" if repeats else "raise max_new_tokens"
            raise InputError(
                f"{PATIENCE} batches in a row have brought no new text; {file.part} holds {file.samples:,}: {remedy}, "
                "or lower num_tokens"
            )
        progress(min(file.tokens, num_tokens), num_tokens)
    file.finish()
