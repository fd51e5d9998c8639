"""Image-text data: what a processor makes of it, who counts, and training, pruning and evaluation on it."""

import base64
import contextlib
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from castlm.cli.main import main
from castlm.core.blocks import is_tower
from castlm.core.errors import InputError
from castlm.core.nm import is_nm_sparse
from castlm.core.sparsify import sparse_linears
from castlm.data import images as image_reader
from castlm.data.calibration import calibration_sequences
from castlm.data.columns import Document, Kind, find_columns
from castlm.data.documents import Mixture, open_documents
from castlm.data.extra import join_extra
from castlm.data.images import BYTES, open_images, open_processor
from castlm.data.options import TextOptions
from castlm.data.packing import BatchLoader, UnpackedSequences, open_sequences
from castlm.data.scored import scored_text
from castlm.data.tokens import Encoder, Tokens
from castlm.evaluation.perplexity import perplexity
from castlm.export.verify import verify
from castlm.models.io import load_model
from castlm.names import printable
from castlm.oneshot.methods import prune_oneshot_
from castlm.oneshot.options import Refinements
from castlm.oneshot.source import block_stack
from castlm.oneshot.walk import BlockInputs
from castlm.training.train import train
from tests.ranks import run_ranks
from tests.refusals import assert_refused, refusal
from tests.runs import (
    assert_equal_weights,
    prune_to,
    small,
    small_command,
    train_until,
)
from tests.slow import slow
from tests.texts import write_rows
from tests.tiny import EOS_ID, IMAGE_TEMPLATE, IMAGE_TOKENS, VISION, save_tiny, save_tiny_with_images, tiny_tokenizer

COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255), "lime": (0, 255, 0), "gray": (128, 128, 128)}
OVER: dict[str, Any] = {"seq_len": 64, "eval_tokens": 200, "max_steps": 4, "save_steps": 2, "device": "cpu"}


def user(*parts: str | dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


PICTURE = {"type": "image"}


@pytest.fixture(scope="module", params=[slow(VISION[0]), slow(VISION[1]), VISION[2]])
def vlm(request, tmp_path_factory) -> Path:
    """Its positions are those of tokens for a LLaVA, and depend on the images for a Qwen2-VL."""
    return save_tiny_with_images(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    return save_tiny_with_images(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """24 conversations: two images, one, and none, in turn; the answers name their colors."""
    folder = tmp_path_factory.mktemp("images")
    for name, color in COLORS.items():
        Image.new("RGB", (32, 32), color).save(folder / f"{name}.png")
    names, rows = [*COLORS], []
    for i in range(24):
        one, other = names[i % 4], names[(i // 4) % 4]
        match i % 3:
            case 0:
                messages = [user("which? ", PICTURE, " and ", PICTURE), assistant(f"{one}, {other}")]
                rows.append({"messages": messages, "images": [f"{one}.png", f"{other}.png"]})
            case 1:
                rows.append({"messages": [user(PICTURE, "color"), assistant(one)], "images": [f"{one}.png"]})
            case _:
                rows.append({"messages": [user(f"say {other}"), assistant(other)], "images": []})
    return Path(write_rows(folder / "data.jsonl", rows))


@pytest.fixture(scope="module")
def encoder(llava) -> Encoder:
    return encoder_of(llava)


def encoder_of(model: Path, assistant_only: bool = True) -> Encoder:
    tokenizer = load_model(model).tokenizer
    return Encoder(tokenizer, assistant_only=assistant_only, processor=open_processor(model, tokenizer))


def loss_of(model: PreTrainedModel, tokens: Tokens) -> torch.Tensor:
    """The summed loss of a conversation alone."""
    ids, labels = (torch.from_numpy(array).long() for array in (tokens.ids, tokens.labels))
    with torch.no_grad():
        logits = model(input_ids=ids[None, :-1], **join_extra([tokens.extra], len(ids) - 1)).logits[0]
    return F.cross_entropy(logits, labels[1:], reduction="sum")


def document_of(row: dict[str, Any], folder: Path | None = None) -> Document:
    columns = find_columns(row, TextOptions(), folder)
    return columns.document(row)


def test_the_tokens_are_those_of_the_processor_and_the_assistant_counts(vlm, dataset):
    encoder = encoder_of(vlm)
    row = json.loads(dataset.read_text().splitlines()[0])
    tokens = encoder.conversation(document_of(row, dataset.parent))
    processor = AutoProcessor.from_pretrained(vlm)
    messages = [row["messages"][0], {"role": "assistant", "content": [{"type": "text", "text": "red, red"}]}]
    images = [Image.open(dataset.parent / name).convert("RGB") for name in row["images"]]
    text = processor.apply_chat_template(messages)
    theirs = processor(text=text, images=images, return_tensors="pt", add_special_tokens=False)
    assert tokens.ids.tolist() == [*theirs["input_ids"][0].tolist(), EOS_ID]
    assert tokens.extra is not None
    torch.testing.assert_close(tokens.extra.by_item["pixel_values"], theirs["pixel_values"])
    counted = tokens.labels[tokens.labels != -100]
    assert processor.tokenizer.decode(counted) == "red, red<|endoftext|>"
    places = [i for i, token in enumerate(tokens.ids.tolist()) if token == 260]
    assert len(places) == 8
    assert processor.tokenizer.convert_ids_to_tokens(260) in IMAGE_TOKENS.values()
    assert tokens.extra.end == places[-1] + 1
    assert {*tokens.extra.by_token} == {*theirs.keys()} & {"mm_token_type_ids"}


def test_images_of_a_column_without_parts_come_before_the_first_text(dataset, encoder):
    plain = {"messages": [{"role": "user", "content": "color"}, assistant("blue")], "image": "blue.png"}
    parts = {"messages": [user(PICTURE, "color"), assistant("blue")], "images": ["blue.png"]}
    inline = {"messages": [user({"type": "image", "path": "blue.png"}, "color"), assistant("blue")]}
    of_llava = {"messages": [{"role": "user", "content": "<image>color"}, assistant("blue")], "images": ["blue.png"]}
    found = [
        encoder.conversation(document_of(row, dataset.parent)).ids.tolist() for row in (plain, parts, inline, of_llava)
    ]
    assert found[0] == found[1] == found[2] == found[3]


def test_the_token_of_an_image_in_a_text_is_refused(dataset, encoder):
    row = {"messages": [user("what does <image> mean?"), assistant("a token")]}
    with pytest.raises(InputError, match=r"0 images.*1 tokens"):
        encoder.conversation(document_of(row, dataset.parent))


def test_images_are_found_in_any_row_and_either_column(dataset, tmp_path):
    text = {"messages": [user("hi"), assistant("ho")]}
    rows = [text, text | {"images": None}, text | {"images": ["red.png"]}, text | {"image": "blue.png"}]
    for name in ("mixed.jsonl", "mixed.jsonl.gz"):
        path = write_rows(dataset.parent / name, rows)
        documents = open_documents(path)
        assert documents.kind is Kind.WITH_EXTRA
        kinds = [Kind.CHAT, Kind.CHAT, Kind.WITH_EXTRA, Kind.WITH_EXTRA]
        assert [piece.kind for piece in documents.pieces(None)] == kinds
    named = open_documents(path, TextOptions(column="messages"))  # which leaves the other columns out
    assert named.kind is Kind.CHAT


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32)).save(tmp_path / "photo.jpg", exif=exif)
    assert open_images([str(tmp_path / "photo.jpg")])[0].size == (32, 64)


def test_each_text_of_a_mixture_with_images_has_its_share_and_position(dataset, encoder, tmp_path):
    data = "data:image/png;base64," + base64.b64encode((dataset.parent / "red.png").read_bytes()).decode()
    for name, image in (("paths", str(dataset.parent / "red.png")), ("bytes", data)):
        row = {"messages": [user(PICTURE, "color"), assistant("red")], "images": [image]}
        write_rows(tmp_path / f"{name}.jsonl", [row] * 20)
    mixed = Mixture([open_documents(tmp_path / f"{name}.jsonl") for name in ("paths", "bytes")], [3, 1])
    stream, resumed = (open_sequences(mixed, encoder, seq_len=64, seed=0) for _ in range(2))
    assert sum(piece.extra[0].startswith(BYTES) for piece in stream.take(20)) == 5
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert [piece.extra for piece in resumed.take(9)] == [piece.extra for piece in stream.take(9)]
    ids, extra = calibration_sequences(mixed, encoder, 4, 64)
    assert ids.shape == (4, 64)
    assert extra is not None
    assert all("pixel_values" in of for of in extra)


def test_images_in_parquet_and_of_the_hub_are_those_of_files(dataset, encoder, monkeypatch, tmp_path):
    rows = [json.loads(line) for line in dataset.read_text().splitlines()]
    for row in rows:  # each part has the same fields, as a table needs
        for message in row["messages"]:
            parts = message["content"]
            parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
            message["content"] = [{"type": part["type"], "text": part.get("text")} for part in parts]
        row["images"] = [str(dataset.parent / name) for name in row["images"]]
    in_bytes = [{"bytes": Path(name).read_bytes(), "path": name} for row in rows for name in row["images"]]
    packed = [row | {"images": [in_bytes.pop(0) for _ in row["images"]]} for row in rows]
    write_rows(tmp_path / "a.parquet", packed, row_group_size=7)
    of_hub = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: of_hub.to_iterable_dataset())
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, revision: SimpleNamespace(sha="abc"))
    of_files, *others = (open_documents(place) for place in (dataset, tmp_path / "a.parquet", "some/name"))
    for documents, as_bytes in zip(others, (True, False)):
        assert documents.kind is of_files.kind is Kind.WITH_EXTRA
        for one, other in zip(of_files.pieces(None), documents.pieces(None), strict=True):
            a, b = encoder.conversation(one), encoder.conversation(other)
            assert a.ids.tolist() == b.ids.tolist()
            assert (a.extra is None) == (b.extra is None)
            if a.extra is not None and b.extra is not None:
                assert (BYTES in other.extra[0]) is as_bytes
                assert torch.equal(a.extra.by_item["pixel_values"], b.extra.by_item["pixel_values"])


def test_a_batch_gives_the_loss_of_its_conversations(vlm, dataset):
    model, encoder = load_model(vlm).model, encoder_of(vlm)
    documents = open_documents(dataset)
    loader = BatchLoader(UnpackedSequences(documents, encoder, seq_len=64, seed=3), rows_per_rank=6)
    batch = next(loader)
    with torch.no_grad():
        labels = batch.pop("labels")
        logits = model(**batch).logits
    theirs = [loss_of(model, encoder.conversation(piece)) for piece in list(documents.pieces(3))[:6]]
    ours = [F.cross_entropy(row, targets, reduction="sum") for row, targets in zip(logits, labels)]
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=1e-4, atol=1e-4)


def test_the_order_is_the_same_on_two_ranks_and_after_a_resume(dataset, encoder):
    def loader(rank: int = 0, size: int = 1, rows: int = 4) -> BatchLoader:
        sequences = UnpackedSequences(open_documents(dataset), encoder, seq_len=64, seed=1)
        return BatchLoader(sequences, rows_per_rank=rows, rank=rank, world_size=size)

    straight = loader()
    batches = [next(straight)["input_ids"] for _ in range(9)]  # into the second epoch
    ranks = [loader(rank, 2, 2) for rank in (0, 1)]
    for batch in batches:
        assert torch.equal(torch.cat([next(rank)["input_ids"] for rank in ranks]), batch)
    for stop in (0, 3, 6, 7):
        stopped, resumed = loader(), loader()
        for _ in range(stop):
            next(stopped)
        resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
        assert all(torch.equal(next(resumed)["input_ids"], batch) for batch in batches[stop:])


def test_a_conversation_that_is_too_long_is_cut_or_left_out_and_said(dataset, encoder):
    said: list[str] = []
    sequences = UnpackedSequences(open_documents(dataset), encoder, seq_len=14, seed=0, say=said.append)
    batch = sequences.batch(sequences.take(24))
    assert batch["input_ids"].shape == (24, 14)
    assert len(said) == 2
    assert any("raise seq_len" in line for line in said)
    assert any("seq_len 14" in line for line in said)
    assert sum(bool((row == -100).all()) for row in batch["labels"]) >= 8


def test_the_perplexity_is_that_of_the_conversations_with_their_images(vlm, dataset):
    loaded, encoder, total, count = load_model(vlm), encoder_of(vlm), 0.0, 0
    text = scored_text(open_documents(dataset), encoder)
    result = perplexity(loaded.model, text, seq_len=64)
    for piece in open_documents(dataset).pieces(None):
        tokens = encoder.conversation(piece)
        total += float(loss_of(loaded.model, tokens))
        count += int((tokens.labels[1:] != -100).sum())
    assert result.num_tokens == count
    assert result.loss == pytest.approx(total / count, rel=1e-4)
    assert perplexity(loaded.model, text, seq_len=64, batch_size=4).loss == pytest.approx(result.loss, rel=1e-5)


def test_the_solver_sees_the_images(vlm, dataset):
    loaded = load_model(vlm)
    ids, images = calibration_sequences(open_documents(dataset), encoder_of(vlm), 4, 64)
    assert ids.shape == (4, 64)
    assert images is not None
    assert any(images)
    layers, _ = sparse_linears(loaded.model)
    _, blocks = block_stack(loaded.model, layers)
    with torch.no_grad():
        inputs = BlockInputs(loaded.model, blocks, ids, extras=images)
        inputs.advance()
    assert len(inputs) == 4
    for number, batch in enumerate(inputs):  # what enters the second block of the model itself
        seen: list[torch.Tensor] = []
        hook = blocks[1].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        loaded.model.model(input_ids=ids[number : number + 1], **images[number])
        hook.remove()
        torch.testing.assert_close(batch, seen[0], rtol=1e-5, atol=1e-5)
    twin = load_model(vlm).model
    refinements = Refinements(reconstruct_epochs=1)
    report = prune_oneshot_(twin, "sparsegpt", calibration=ids, extras=images, refinements=refinements, effort="best")
    assert all(block.after <= block.before for block in report.reconstructions)
    many = prune_oneshot_(load_model(vlm).model, "magnitude", calibration=ids.repeat(40, 1), extras=images * 40)
    assert all(layer.error is not None for layer in many.layers)
    blind = load_model(vlm).model
    prune_oneshot_(loaded.model, "sparsegpt", calibration=ids, extras=images)
    prune_oneshot_(blind, "sparsegpt", calibration=ids)
    name = next(iter(layers))
    assert is_nm_sparse(loaded.model.get_submodule(name).weight)
    assert not torch.equal(loaded.model.get_submodule(name).weight, blind.get_submodule(name).weight)


@pytest.fixture(scope="module")
def trained(vlm, dataset, tmp_path_factory) -> Path:
    """The folder of a run of the command."""
    run = tmp_path_factory.mktemp("trained") / "run"
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert main([*small_command("train", vlm, dataset, run, **OVER), "--no-report"]) == 0
    assert "assistant tokens" in said.getvalue()
    return run


FIRST_AND_LAST = pytest.mark.parametrize("vlm", [slow(VISION[0]), VISION[-1]], indirect=True)
"""LLaVA, and Qwen3-VL, whose positions depend on the images as those of Qwen2-VL do, and whose blocks read them too."""


@FIRST_AND_LAST
@pytest.mark.slow
def test_castlm_train_prune_and_eval_on_images(vlm, dataset, trained, tmp_path, capsys):
    run, pruned = trained, tmp_path / "pruned"
    prune_to(pruned, vlm, dataset, seq_len=64, device="cpu")
    dense = AutoModelForImageTextToText.from_pretrained(vlm)
    for folder in (run / "model", pruned):
        model = AutoModelForImageTextToText.from_pretrained(folder)
        assert all(torch.equal(p, model.get_parameter(n)) for n, p in dense.named_parameters() if is_tower(n))
        assert all(is_nm_sparse(layer.weight) for layer in sparse_linears(model)[0].values())
        assert type(AutoProcessor.from_pretrained(folder)) is type(AutoProcessor.from_pretrained(vlm))
        assert main(["eval", str(folder), "--text", str(dataset), "--seq-len", "64", "--device", "cpu"]) == 0
        assert "assistant tokens" in capsys.readouterr().out


@pytest.mark.parametrize("vlm", [VISION[-1]], indirect=True)
def test_a_run_on_images_resumes_exactly(vlm, dataset, trained, tmp_path):
    config = small(str(vlm), str(dataset), tmp_path / "resumed", **OVER)
    train_until(config, 3)
    train(config.changed(resume=True))
    assert_equal_weights(trained / "model", tmp_path / "resumed" / "model")


@pytest.mark.slow
def test_a_rank_without_images_does_not_wait_for_one_with_some(llava, dataset, tmp_path):
    """The vision tower is called on one rank alone: of two rows a step, one has an image."""
    lines = dataset.read_text().splitlines()
    data = dataset.parent / "uneven.jsonl"
    data.write_text("\n".join([lines[1], *[lines[2]] * 7]))
    over = {"per_device_train_batch_size": 1, "eval_dataset": str(dataset), "save_steps": 0, "calibration_sequences": 2}
    run_ranks(train, 2, small(str(llava), str(data), tmp_path / "run", **{**OVER, **over}), folder=tmp_path)
    assert verify(tmp_path / "run" / "model").ok


def test_generate_answers_about_an_image(vlm, dataset, tmp_path, capsys):
    def said(*options: str) -> str:
        assert main(["generate", str(vlm), "--prompt", "color", "--max-new-tokens", "6", *options]) == 0
        return capsys.readouterr().out

    red, blue = (str(dataset.with_name(f"{name}.png")) for name in ("red", "blue"))
    processor = open_processor(vlm, load_model(vlm).tokenizer)
    text = processor.apply_chat_template([user(PICTURE, "color")], add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[Image.open(red)], return_tensors="pt", add_special_tokens=False)
    model = load_model(vlm).model.eval()
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert said("--image", red) == printable(processor.tokenizer.decode(tokens, skip_special_tokens=True)) + "\n"
    assert said("--image", red, blue)
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    cases = [
        (["generate", str(vlm), "--prompt", "a", "--image", str(bad)], "cannot read the image"),
        (["generate", str(vlm), "--prompt", "a", "--image", "none.png"], "none.png"),
        (["generate", str(vlm), "--prompt", "a", "--image", red, "--raw"], "cannot prepare"),
    ]
    assert_refused(cases, capsys)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no such file": ({"images": ["none.png"]}, "image 1 is 'none.png'"),
    "an address": ({"images": ["https://a.b/c.png"]}, "image 1 is 'https://a.b/c.png'"),
    "too many": ({"images": ["red.png", "red.png"]}, "2 images for 1 places"),
    "too few": ({"images": []}, "0 images for 1 places"),
    "not a path": ({"images": [3]}, "image 1 is '3'"),
    "a video": ({"videos": ["a.mp4"], "images": ["red.png"]}, "column 'videos'"),
    "both places": (
        {"messages": [user({"type": "image", "path": "red.png"}), assistant("x")], "images": ["red.png"]},
        "2 images for 1 places.* or all beside them",
    ),
    "an unknown part": (
        {"messages": [user({"type": "video", "path": "a.mp4"}), assistant("x")], "images": []},
        'message 1 .*"video"',
    ),
    "plain text": ({"messages": None, "text": "a caption", "images": ["red.png"]}, "column 'images'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_refused_with_its_line(case, dataset):
    change, message = BAD[case]
    row = {"messages": [user(PICTURE), assistant("red")], "images": ["red.png"]} | change
    row = {name: value for name, value in row.items() if value is not None}
    with pytest.raises(InputError, match=message):
        document_of(row, dataset.parent)


def test_a_file_that_is_no_image_is_refused_by_name(dataset, encoder, tmp_path):
    (tmp_path / "torn.png").write_bytes((dataset.parent / "red.png").read_bytes()[:40])
    row = {"messages": [user(PICTURE), assistant("red")], "images": ["torn.png"]}
    named = r"conversation that begins 'red': cannot read the image .*torn.png.*remove it"
    with pytest.raises(InputError, match=named):
        encoder.conversation(document_of(row, tmp_path))


def test_a_relative_path_is_of_the_working_folder_of_now(tmp_path, monkeypatch):
    """The process that decodes was started in another one."""
    for folder, color in (("a", "red"), ("b", "blue")):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        Image.new("RGB", (2, 2), color).save(f"{color}.png")
        (image,) = open_images([f"{color}.png"])
        assert image.getpixel((0, 0)) == COLORS[color]


def test_images_of_too_many_pixels_or_too_much_memory_are_refused(dataset, encoder, monkeypatch, tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "large.png")  # 50 kB
    with pytest.raises(InputError, match=r"large.png.*400,000,000 pixels, more than 256,000,000"):
        open_images([str(tmp_path / "large.png")])
    Image.new("L", (3_500, 3_500)).save(tmp_path / "a.jp2")
    assert open_images([str(tmp_path / "a.jp2")])[0].size == (3_500, 3_500)
    monkeypatch.setattr(image_reader, "MAX_MEMORY", 100 << 20)  # its decoder takes 24 bytes for each pixel
    with pytest.raises(InputError, match=r"a.jp2.*GiB to decode"):
        open_images([str(tmp_path / "a.jp2")])
    assert open_images([str(tmp_path / "a.jp2")], document_limit=8)[0].size == (3_500, 3_500)
    monkeypatch.setattr(image_reader, "MAX_PIXELS", 2 * 32 * 32 - 1)
    row = json.loads(dataset.read_text().splitlines()[0])
    with pytest.raises(InputError, match=r"'which\? and'.*1,024 pixels, more than 1,023"):
        encoder.conversation(document_of(row, dataset.parent))
    assert len(open_images([str(dataset.parent / "red.png")] * 2, document_limit=1.1)) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # which Pillow hands to Ghostscript
        b"\0\0\0\x20ftypavif\0\0\0\0avifmif1" + bytes(100),
        b"RIFF\x04\0\0\0WEBPVP8 ",
        b"",
    ],
)
def test_no_decoder_but_those_of_pixels_sees_a_file_and_none_ends_in_more_than_a_line(content, tmp_path):
    (tmp_path / "a.png").write_bytes(content)
    with refusal(r"^cannot read the image .*a\.png: .+$"):
        open_images([str(tmp_path / "a.png")])


def many_scans(count: int, size: int) -> bytes:
    """A JPEG whose last scan, of some bytes, comes `count` times more."""
    file = io.BytesIO()
    Image.new("L", (size, size)).save(file, "JPEG", progressive=True)
    whole = file.getvalue()
    return whole[:-2] + whole[whole.rindex(b"\xff\xda") : -2] * count + whole[-2:]


def test_an_image_that_takes_more_time_or_memory_than_its_file_tells_is_refused(monkeypatch, tmp_path):
    def inline(content):
        return BYTES + base64.b64encode(content).decode()

    assert open_images([inline(many_scans(3, 64))])[0].size == (64, 64)
    monkeypatch.setattr(image_reader, "MAX_SECONDS", 0.5)
    with pytest.raises(InputError, match=r"in the dataset: it takes longer than 0.5 seconds"):
        open_images([inline(many_scans(2_000, 2_000))])  # 1 MB, and 8 billion pixels in its scans
    assert open_images([inline(many_scans(3, 64))])[0].size == (64, 64)  # by a new process
    (tmp_path / "a.webp").write_bytes(b"RIFF\0\0\0\xffWEBPVP8X" + bytes(10))
    os.truncate(tmp_path / "a.webp", 10**10)  # sparse: its decoder begins by reading it whole
    with pytest.raises(InputError, match=r"a\.webp: it takes more than 1 GiB"):
        open_images([str(tmp_path / "a.webp")])


def test_a_bad_image_does_not_end_a_run(llava, dataset, tmp_path, capsys):
    lines = [json.loads(line) for line in dataset.read_text().splitlines()]
    (tmp_path / "torn.png").write_bytes((dataset.parent / "red.png").read_bytes()[:40])
    for line in lines:
        line["images"] = [str(dataset.parent / name) for name in line["images"]]
    lines[1]["images"] = ["torn.png"]
    write_rows(tmp_path / "data.jsonl", lines)
    over = {**OVER, "eval_dataset": dataset, "max_steps": 7, "save_steps": 0, "init_from": "magnitude"}
    command = small_command("train", llava, tmp_path / "data.jsonl", tmp_path / "run", **over)
    assert main([*command, "--no-report"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "a conversation does not count" in line]
    assert "cannot read the image" in line


def test_a_run_in_which_nothing_counts_does_not_end_well(llava, dataset, text, tmp_path, capsys):
    over = {**OVER, "seq_len": 6, "eval_dataset": text, "init_from": "magnitude"}
    assert main(small_command("train", llava, dataset, tmp_path / "run", **over)) == 2
    assert "raise seq_len" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model").exists()


def test_columns_of_any_row_that_would_be_lost_are_refused(dataset):
    first = {"messages": [user("hi"), assistant("ho")]}
    columns = find_columns(first, TextOptions())
    with pytest.raises(InputError, match="column 'videos'"):
        columns.document(first | {"videos": ["a.mp4"]})
    columns = find_columns({"text": "a"}, TextOptions())
    with pytest.raises(InputError, match="column 'image'"):
        columns.document({"text": "a", "image": "red.png"})
    named = find_columns({"text": "a", "image": "red.png"}, TextOptions(column="text"))
    assert named.document({"text": "a", "image": "red.png"}).text == "a"
    columns = find_columns({"text": "a", "image": None}, TextOptions())
    assert columns.document({"text": "a", "image": None}).text == "a"


def test_what_cannot_be_done_with_images_is_refused_by_name_before_the_start(llava, dataset, text, tmp_path, capsys):
    llama, without = save_tiny(tmp_path / "llama"), save_tiny(tmp_path / "without", "llava")
    cached = {"teacher_cache": tmp_path / "cache", "teacher_top_k": 8, "hidden_weight": 0}
    short = {**OVER, "seq_len": 16, "eval_dataset": dataset}
    cases = [
        (small_command("train", llama, dataset, tmp_path / "a", **OVER), "reads no images"),
        (small_command("train", llava, dataset, tmp_path / "b", **OVER, **cached), "teacher_cache"),
        (small_command("train", without, dataset, tmp_path / "c", **OVER), "processor"),
        (small_command("train", llava, dataset, tmp_path / "d", **short), "'which? and' end at token"),
        (["eval", str(llama), "--text", str(dataset), "--device", "cpu"], "reads no images"),
    ]
    assert_refused(cases, capsys)
    assert not any((tmp_path / name).exists() for name in "abcd")


def test_a_template_that_reads_parts_alone_gets_text_in_parts(llava, tmp_path):
    tokenizer, chat = load_model(llava).tokenizer, tmp_path / "chat.jsonl"
    write_rows(chat, [{"messages": [{"role": "user", "content": "hello"}, assistant("there")]}])
    text = scored_text(open_documents(chat), Encoder(tokenizer))
    assert tokenizer.decode(text.ids) == "user:hello<|endoftext|>\nassistant:there<|endoftext|>\n<|endoftext|>"
    assert tokenizer.decode(text.labels[text.labels != -100]) == "there<|endoftext|>"


def processor_of(family: str, tokenizer: Any = None) -> transformers.ProcessorMixin:
    """A processor of small images, with a token for each byte; an image of 32 x 32 takes at least 4 tokens."""
    tokenizer, small = tokenizer or tiny_tokenizer(), {"height": 16, "width": 16}

    def known(**names: str) -> None:
        tokenizer.add_special_tokens({"additional_special_tokens": list(names.values())})
        for name, token in names.items():
            setattr(tokenizer, name, token)
            setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))

    match family:
        case "idefics3":
            known(image_token="<image>", fake_image_token="<around>", global_image_token="<global-img>")
            tokenizer.add_tokens([f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)])
            sizes = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
            images = transformers.Idefics3ImageProcessor(do_image_splitting=True, **sizes)
            processor = transformers.Idefics3Processor(images, tokenizer, image_seq_len=4)
        case "gemma3":
            known(image_token="<soft>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
            images = transformers.Gemma3ImageProcessor(size=small)
            processor = transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)
        case "llava_next":
            known(image_token="<image>")
            tiles = {"image_grid_pinpoints": [[16, 32], [32, 16]]}
            images = transformers.LlavaNextImageProcessor(size={"shortest_edge": 16}, crop_size=small, **tiles)
            of_model = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
            processor = transformers.LlavaNextProcessor(images, tokenizer, patch_size=8, **of_model)
        case "pixtral":
            known(image_token="[IMG]", image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]")
            images = transformers.PixtralImageProcessor(patch_size=8, size={"longest_edge": 32})
            processor = transformers.PixtralProcessor(images, tokenizer, patch_size=8)
    stands_for = {"gemma3": "<start_of_image>", "pixtral": "[IMG]"}.get(family, "<image>")
    tokenizer.chat_template = IMAGE_TEMPLATE.replace("IMAGE", stands_for)
    return processor


def test_tokens_that_merge_with_those_around_an_image_are_told_apart(dataset):
    """Gemma 3 puts line breaks around an image, which become one token with those of its template."""
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bpe = Tokenizer(models.BPE(alphabet | {"ĊĊ": 300, "ĊĊĊ": 301}, [("Ċ", "Ċ"), ("ĊĊ", "Ċ")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    merging = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")
    processor = processor_of("gemma3", merging)
    merging.chat_template = merging.chat_template.replace("{{ m['role'] }}:", "{{ m['role'] }}\n").replace(
        "assistant:", "assistant\n"
    )
    row = {"messages": [user(PICTURE, "color"), assistant("red")], "images": ["red.png"]}
    tokens = Encoder(merging, processor=processor).conversation(document_of(row, dataset.parent))
    assert 301 in tokens.ids.tolist()
    assert merging.decode(tokens.labels[tokens.labels != -100]) == "red<|endoftext|>"


@pytest.mark.parametrize("family", ["idefics3", "gemma3", "llava_next", "pixtral"])
def test_the_assistant_is_found_whatever_a_processor_puts_around_images(family, dataset):
    row = json.loads(dataset.read_text().splitlines()[0])
    processor = processor_of(family)
    tokens = Encoder(processor.tokenizer, processor=processor).conversation(document_of(row, dataset.parent))
    assert processor_of(family).tokenizer.decode(tokens.labels[tokens.labels != -100]) == "red, red<|endoftext|>"
    text = processor_of(family).tokenizer.decode(tokens.ids[: tokens.extra.end] if tokens.extra else [])
    assert text.startswith("user:which? ")
    assert text.count(" and ") == 1
    assert len(text) > 60
