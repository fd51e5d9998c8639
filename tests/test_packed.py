"""The packed format: what goes in comes out bit for bit, and whatever is damaged is refused in one line."""

import contextlib
import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from castlm.cli.main import main
from castlm.core.errors import InputError
from castlm.core.nm import nm_mask, pack_mask, unpack_mask
from castlm.core.sparsify import prune_
from castlm.export.folder import check_layers, pattern_of_files, read_config, stored_tensors
from castlm.export.hf import export_model
from castlm.export.loads import check_loads
from castlm.export.packed import pack_folder, unpack_folder
from castlm.export.verify import verify
from castlm.models.io import load_model, save_model
from castlm.packed.tensor import pack, pack_integers, unpack
from castlm.patterns import parse_pattern
from castlm_runtime.packed import METADATA_KEY, Feature, PackedSpec, read_specs, to_metadata
from castlm_runtime.stored import PACKED_INDEX as INDEX
from castlm_runtime.stored import PACKED_SINGLE as FILE
from castlm_runtime.stored import read_header
from tests.refusals import assert_refused, disk_full
from tests.runs import assert_equal_weights, edit_json, edit_weights, record_of, weights
from tests.slow import slow
from tests.tiny import FAMILIES, linear_model, save_tiny, tiny_model, tiny_tokenizer

PATTERNS = [*((n, m) for m in (2, 3, 4, 8) for n in range(1, m)), (5, 16), (8, 16)]
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def pruned_folder(folder: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16, n=2, m=4, **over) -> Path:
    model = tiny_model(family, **over)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    loaded = load_model(folder)
    prune_(loaded.model, f"{n}:{m}")
    save_model(loaded.model.to(dtype), loaded.tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    return pruned_folder(tmp_path_factory.mktemp("pruned") / "model")


@pytest.fixture(scope="module")
def packed(pruned, tmp_path_factory) -> Path:
    """`pruned`, packed; tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("packed") / "packed"
    pack_folder(pruned, folder)
    return folder


def assert_comes_back(source: Path, packed: Path, back: Path) -> None:
    """`packed` unpacks, to `back`, to every bit of `source`."""
    unpack_folder(packed, back)
    assert_equal_weights(back, source)


# ---- tensors


@settings(max_examples=60, deadline=None)
@given(
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from(list(BITS)),
    rows=st.integers(1, 5),
    groups=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    density=st.floats(0, 1),
)
def test_unpack_gives_back_every_bit(pattern, dtype, rows, groups, seed, density):
    n, m = pattern
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * m, generator=generator)
    weight *= torch.rand(weight.shape, generator=generator) < density
    weight = weight.masked_fill(~nm_mask(weight, n, m), 0.0).to(dtype)
    packed = pack(weight, n, m)
    assert packed.values.shape == (rows, groups * n)
    assert torch.equal(unpack(packed).view(BITS[dtype]), weight.view(BITS[dtype]))


def test_extreme_values_keep_their_bits():
    for dtype, bits in BITS.items():
        info = torch.finfo(dtype)
        smallest = torch.tensor([1], dtype=bits).view(dtype).item()  # the least subnormal number
        row = [info.max, 0, info.tiny, 0, 0, -smallest, smallest, 0, info.min, -0.0, 0, 0]
        weight = torch.tensor([row], dtype=dtype)
        assert torch.equal(unpack(pack(weight, 2, 4)).view(bits), weight.view(bits))


def test_a_negative_zero_is_kept_where_there_is_room_and_else_becomes_zero():
    weight = torch.tensor([[1.0, -0.0, 0.0, 0.0, 1.0, 2.0, -0.0, 0.0]])
    back = unpack(pack(weight, 2, 4))
    assert torch.equal(back, weight)
    assert torch.signbit(back).tolist() == [[False, True, False, False, False, False, False, False]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(bad):
    with pytest.raises(InputError, match="NaN or infinity"):
        pack(torch.tensor([[bad, 0, 0, 0.0]]), 2, 4)


def test_a_weight_that_is_not_nm_is_refused():
    with pytest.raises(InputError, match="is not 2:4: prune it first"):
        pack(torch.tensor([[1.0, 2.0, 3.0, 0.0]]), 2, 4)
    with pytest.raises(InputError, match="does not divide by m = 4"):
        pack(torch.zeros(2, 6), 2, 4)


@pytest.mark.parametrize("values", ["int8", "int4", "int3"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (2, 3), (0, 0)])
def test_integers_come_back_as_value_times_scale(values, n, m):
    generator = torch.Generator().manual_seed(0)
    end, groups = {"int8": (128, 1), "int4": (8, 3), "int3": (4, 3)}[values]
    codes = torch.randint(-end, end, (5, 144), generator=generator).to(torch.int8)
    if m:
        codes *= nm_mask(codes.float(), n, m)
    scales = torch.rand(5, groups, generator=generator).to(torch.float32 if values == "int8" else torch.bfloat16)
    packed = pack_integers(codes, scales, values, n, m)
    wide = scales.float().repeat_interleave(144 if values == "int8" else 64, 1)[:, :144]
    assert torch.equal(unpack(packed), codes.float() * wide)
    for suffix, (_, shape) in packed.spec.tensors().items():
        assert packed.tensors()[suffix].shape == shape


# ---- folders


@pytest.mark.parametrize(
    ("family", "n", "m"),
    [*((family, 2, 4) for family in ("llama", "gpt2", "gemma")), ("llama", 1, 4), ("llama", 4, 8)]
    + [slow(family, 2, 4) for family in FAMILIES if family not in ("llama", "gpt2", "gemma")],
)
def test_a_folder_comes_back_bit_for_bit(family, n, m, tmp_path):
    source = pruned_folder(tmp_path / "source", family, n=n, m=m)
    report = pack_folder(source, tmp_path / "packed", f"{n}:{m}")
    assert report.num_packed > 0
    assert report.bytes_after < report.bytes_before
    assert_comes_back(source, tmp_path / "packed", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert verify(tmp_path / "packed", f"{n}:{m}").ok


def test_sharded_models_stay_sharded_and_no_shard_is_verified_as_a_model(tmp_path, capsys):
    source = pruned_folder(tmp_path / "one")
    loaded = load_model(source, dtype=torch.bfloat16)
    save_model(loaded.model, loaded.tokenizer, tmp_path / "many", max_shard_bytes=20_000)
    pack_folder(tmp_path / "many", tmp_path / "packed")
    assert (tmp_path / "packed" / INDEX).is_file()
    assert verify(tmp_path / "packed").totals()["layers"] == 14
    unpack_folder(tmp_path / "packed", tmp_path / "back")
    assert_equal_weights(source, tmp_path / "back")
    assert torch.equal(load_model(tmp_path / "back").model.lm_head.weight, load_model(source).model.lm_head.weight)
    shards = [shard for name in ("many", "packed") for shard in (tmp_path / name).glob("*.safetensors")]
    assert len(shards) > 4
    assert_refused([(["verify", str(shard)], "one of several files") for shard in shards], capsys)


def test_a_packed_file_that_lacks_a_block_is_refused_by_its_own_path(pruned, tmp_path, capsys):
    packed = tmp_path / "packed"
    pack_folder(pruned, packed)
    assert main(["verify", str(packed / FILE)]) == 0
    edit_json(packed / "config.json", num_hidden_layers=3)
    for path in (packed, packed / FILE):
        assert main(["verify", str(path)]) == 2
        assert "lacks model.layers.2" in capsys.readouterr().err


def test_verify_takes_the_pattern_on_record_of_a_folder_a_file_and_a_path_from_home(pruned, tmp_path, monkeypatch):
    source, packed = shutil.copytree(pruned, tmp_path / "source"), tmp_path / "packed"
    edit_json(source / "castlm.json", pattern="1:4")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (str(source), str(source / "model.safetensors"), "~/source", "~/source/model.safetensors"):
        assert main(["verify", path]) == 1  # it is 2:4
    edit_json(source / "castlm.json", pattern="4:8")
    assert main(["pack", "~/source", "--output-dir", str(packed)]) == 0
    assert read_specs(read_header(packed / FILE))["model.layers.0.mlp.up_proj"].m == 8
    monkeypatch.chdir(source)
    assert pattern_of_files("no-folder") is None  # a name on the hub is no file beside castlm.json


def test_layers_left_dense_stay_dense(tmp_path):
    source = pruned_folder(tmp_path / "source")
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(source, lambda w: w[name].fill_(1))
    with pytest.raises(InputError, match=f"{name}: .* is not 2:4"):
        pack_folder(source, tmp_path / "packed")
    edit_json(source / "castlm.json", left_dense={"model.layers.0.mlp.up_proj": "a test"})
    assert pack_folder(source, tmp_path / "packed").num_packed == 14
    assert read_specs(read_header(tmp_path / "packed" / FILE))[name.removesuffix(".weight")].pattern == "dense"
    report = verify(tmp_path / "packed", allow_dense=1.0)
    assert report.ok
    assert report.totals()["left_dense"] == 1


def test_dtype_casts_everything_first(tmp_path):
    source = pruned_folder(tmp_path / "source", dtype=torch.float32)
    pack_folder(source, tmp_path / "packed", dtype="bf16")
    unpack_folder(tmp_path / "packed", tmp_path / "back")
    ours, theirs = weights(tmp_path / "back"), weights(source)
    assert all(torch.equal(ours[name], theirs[name].bfloat16()) for name in theirs)
    assert load_model(tmp_path / "packed").model.config.dtype == torch.float32


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_value_that_does_not_fit_the_dtype_is_no_damage(name, tmp_path, capsys):
    source = pruned_folder(tmp_path / "source", dtype=torch.float32)
    edit_weights(source, lambda w: w[name].masked_fill_(w[name] == w[name].max(), -1e5))
    command = ["pack", str(source), "--output-dir", str(tmp_path / "packed"), "--dtype"]
    assert main([*command, "fp16"]) == 2
    assert capsys.readouterr().err.endswith(f"{name}: a value of 1e+05 does not fit fp16: pass --dtype bf16\n")
    assert main([*command, "bf16"]) == 0


# ---- damage


def change(packed: Path, to: Path, change_fn) -> Path:
    """A copy of a packed folder with its tensors and metadata changed."""
    to.mkdir()
    for file in packed.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    with safe_open(packed / FILE, framework="pt") as opened:
        tensors, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata())  # noqa: SIM118
    change_fn(tensors, metadata)
    save_file(tensors, to / FILE, metadata)
    return to


def readers(folder: Path, back: Path) -> list[list[str]]:
    """The commands that read a packed folder."""
    path = str(folder)
    return [["verify", path], ["unpack", path, "--output-dir", str(back)], ["generate", path, "--prompt", "a"]]


UP = "model.layers.0.mlp.up_proj"


def transpose(name):
    def change_entry(tensors, metadata):
        content = json.loads(metadata[METADATA_KEY])
        entry = content["tensors"][name]
        assert entry["shape"][0] == entry["shape"][1]
        metadata[METADATA_KEY] = json.dumps(
            {**content, "tensors": {**content["tensors"], name: entry | {"transposed": not entry["transposed"]}}}
        )

    return change_entry


def drop_entry(tensors, metadata):
    content = json.loads(metadata[METADATA_KEY])
    del content["tensors"][UP]
    metadata[METADATA_KEY] = json.dumps(content)


def two_experts(tensors, metadata):
    content = json.loads(metadata[METADATA_KEY])
    content["tensors"][UP]["experts"] = 2
    metadata[METADATA_KEY] = json.dumps(content)


def drop_layer(tensors, metadata):
    drop_entry(tensors, metadata)
    for suffix in ("values", "mask"):
        del tensors[f"{UP}.{suffix}"]


DAMAGES = {  # exit code of verify, and what all readers name
    "no mask of 2:4": (lambda t, _: t[f"{UP}.mask"][0, 0].fill_(255), 1, "exactly 2 of"),  # codes 7, 7 and 3
    "NaN": (lambda t, _: t[f"{UP}.values"][1, 1].fill_(torch.nan), 1, "finite|infinite|infinity"),
    "lost mask": (lambda t, _: t.pop(f"{UP}.mask"), 2, r"up_proj\.mask"),
    "cut values": (
        lambda t, _: t.update({f"{UP}.values": t[f"{UP}.values"][:, 1:].contiguous()}),
        2,
        r"up_proj\.values",
    ),
    "newer": (lambda _, m: m.update({METADATA_KEY: '{"features": 1025, "tensors": {}}'}), 2, "1024.*castlm pack"),
    "older": (lambda _, m: m.update({METADATA_KEY: '{"version": 1, "tensors": {}}'}), 2, "1.*castlm pack"),
    "broken JSON": (lambda _, m: m.update({METADATA_KEY: m[METADATA_KEY][:-5]}), 2, "metadata of"),
    "lost entry": (drop_entry, 2, r"up_proj\.mask"),
    "lost layer": (drop_layer, 2, r"up_proj"),
    "lost norm": (lambda t, _: t.pop("model.norm.weight"), 2, r"norm\.weight"),
    "two experts": (two_experts, 2, r"up_proj"),
    "stray mask": (lambda t, _: t.update({"model.layers.9.mlp.up_proj.mask": t[f"{UP}.mask"].clone()}), 2, r"9\S+mask"),
    "stray scales": (lambda t, _: t.update({f"{UP}.scales": torch.ones(64, 1)}), 2, r"up_proj\.scales"),
    "also plain": (lambda t, _: t.update({f"{UP}.weight": torch.zeros(64, 32)}), 2, r"up_proj\.weight"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_kind_of_damage_is_refused_by_every_reader(damage, packed, tmp_path, capsys):
    """Nothing that is missing is filled with random numbers."""
    change_fn, code, words = DAMAGES[damage]
    folder, back = change(packed, tmp_path / "changed", change_fn), tmp_path / "back"
    for command in readers(folder, back):
        assert main(command) == (code if command[0] == "verify" else 2), command
        output = capsys.readouterr()
        assert re.search(words, output.out + output.err), command
        assert output.err.count("\n") == (0 if command[0] == "verify" and code == 1 else 1)
    assert not back.exists()
    with pytest.raises(InputError, match=words):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_class_with_a_new_head_loads_a_packed_folder(packed):
    assert AutoModelForSequenceClassification.from_pretrained(packed).score.weight.isfinite().all()


@pytest.mark.parametrize(
    "change",
    [
        {"values": "fp64"},
        *({"shape": shape} for shape in ([8, -8], [8, 2**40], [True, 8])),
        *({"pattern": pattern} for pattern in ("4:2", "2:3", "x")),
    ],
)
def test_hostile_metadata_are_refused(change, tmp_path):
    entry = {"shape": [8, 8], "pattern": "2:4", "values": "bf16", "transposed": False} | change
    metadata = {METADATA_KEY: json.dumps({"features": 63, "tensors": {"x": entry}})}
    save_file({"x.values": torch.zeros(8, 4)}, tmp_path / FILE, metadata)
    with pytest.raises(InputError, match="damaged"):
        read_specs(read_header(tmp_path / FILE))


def test_the_tokenizer_of_a_packed_folder_is_shorter_and_the_same(pruned, tmp_path):
    source = shutil.copytree(pruned, tmp_path / "source")
    content = json.loads((source / "tokenizer.json").read_text())
    content |= {"model": {"type": "BPE"}, "added_tokens": []}
    for merges, stored in (([["a", "b"]], ["a b"]), ([["a", " b"]], [["a", " b"]])):
        content["model"] |= {"vocab": {"".join(merges[0]): 0, "a": 1, merges[0][1]: 2}, "merges": merges}
        text = json.dumps(content, indent=2)
        (source / "tokenizer.json").write_text(text)
        pack_folder(source, tmp_path / "packed", overwrite=True)
        found = (tmp_path / "packed" / "tokenizer.json").read_text()
        assert json.loads(found)["model"]["merges"] == stored
        assert len(found) < len(text)
        assert Tokenizer.from_str(found).to_str() == Tokenizer.from_str(text).to_str()
    (source / "tokenizer.json").write_text("{damaged")
    pack_folder(source, tmp_path / "packed", overwrite=True)
    assert (tmp_path / "packed" / "tokenizer.json").read_text() == "{damaged"


def test_a_file_names_the_features_that_its_tensors_need(tmp_path):
    spec = PackedSpec(8, 8, 2, 4, "bf16")
    entry = to_metadata({"x": spec, "y": PackedSpec(8, 8, 0, 0, "int6")})[METADATA_KEY]
    assert json.loads(entry)["features"] == Feature.CODED_MASKS | Feature.INT6
    values, mask = torch.zeros(8, 4, dtype=torch.bfloat16), torch.zeros(8, 1, dtype=torch.uint8)
    for features, is_read in ((1, True), (63, True), (64, False), (65, False), (-1, False), ("1", False)):
        metadata = {METADATA_KEY: json.dumps({"features": features, "tensors": {"x": spec.as_dict()}})}
        save_file({"x.values": values, "x.mask": mask}, tmp_path / FILE, metadata)
        with contextlib.nullcontext() if is_read else pytest.raises(InputError):
            assert read_specs(read_header(tmp_path / FILE)) == {"x": spec}


# ---- commands


def test_pack_and_unpack_as_commands(pruned, tmp_path, capsys):
    packed, back = tmp_path / "packed", tmp_path / "back"
    assert main(["pack", str(pruned), "--output-dir", str(packed)]) == 0
    assert "14 tensors packed and verified 2:4" in capsys.readouterr().out
    assert main(["unpack", str(packed), "--output-dir", str(back)]) == 0
    assert main(["verify", str(back)]) == 0
    capsys.readouterr()
    for arguments in (
        ["pack", str(pruned), "--output-dir", str(packed)],  # taken
        ["pack", str(packed), "--output-dir", str(tmp_path / "twice")],  # packed already
        ["unpack", str(pruned), "--output-dir", str(tmp_path / "plain")],  # not packed
        ["pack", str(pruned), "--output-dir", str(tmp_path / "other"), "--pattern", "1:4"],  # not of that pattern
        ["pack", str(tmp_path / "nothing"), "--output-dir", str(tmp_path / "none")],
    ):
        assert main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_every_chat_template_goes_with_the_model(pruned, tmp_path):
    source, packed, back = shutil.copytree(pruned, tmp_path / "source"), tmp_path / "packed", tmp_path / "back"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "A", "tool_use": "B"}
    tokenizer.save_pretrained(source)
    quantized = ["quantize", str(source), "--packed", "--pattern", "2:4"]
    for command, folder in (
        (["pack", str(source)], packed),
        (["unpack", str(packed)], back),
        (quantized, tmp_path / "quantized"),
    ):
        assert main([*command, "--output-dir", str(folder)]) == 0
        assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
        assert main([*command, "--output-dir", str(folder), "--overwrite"]) == 0  # the templates are its own files
    assert (packed / "additional_chat_templates" / "tool_use.jinja").is_file()


# ---- the model card


def test_the_card_of_a_result_goes_with_it(tmp_path, capsys):
    model = tiny_model("llama", intermediate_size=64)
    pattern = parse_pattern("2:4")
    prune_(model, pattern)
    record = {"base_model": "owner/base", "license": "mit", "verdict": {"ok": False, "reason": "it is bad"}}
    plain, packed, back = (tmp_path / name for name in ("plain", "packed", "back"))
    export_model(model, tiny_tokenizer(), plain, pattern=pattern, left_dense={}, record=record)
    assert main(["pack", str(plain), "--output-dir", str(packed), "--head", "int8"]) == 0
    card = (packed / "README.md").read_text()
    named = (
        "license: mit",
        "Do not use this model",
        "made 2:4 sparse",
        "castlm.register()",
        "output head are dense, in int8",
    )
    for text in (*named, "castlm unpack"):
        assert text in card
    assert main(["verify", str(packed)]) == 0
    assert "2:4 holds" in capsys.readouterr().out
    unpack_folder(packed, back)
    assert (back / "README.md").read_text() == (plain / "README.md").read_text()
    assert "packed" not in record_of(back)
    edit_json(plain / "castlm.json", proof={"weights": 1})
    with pytest.raises(InputError, match=r"castlm\.json: proof\.layers is missing"):
        pack_folder(plain, tmp_path / "again")


@pytest.mark.parametrize(
    "card", [None, "# Mine\n\nHello\n", "---\nlicense: mit\n---\n\n# Mine\n", "---\nno end\n", "---\n"]
)
def test_the_card_of_anothers_model_comes_back(card, pruned, tmp_path):
    source = shutil.copytree(pruned, tmp_path / "source")
    if card is not None:
        (source / "README.md").write_text(card)
    pack_folder(source, tmp_path / "packed")
    packed = (tmp_path / "packed" / "README.md").read_text()
    assert "castlm.register()" in packed
    if card is not None and "license" in card:
        assert packed.startswith("---\nlicense: mit\n---\n")
    unpack_folder(tmp_path / "packed", tmp_path / "back")
    back = tmp_path / "back" / "README.md"
    assert (back.read_text() if back.exists() else None) == card


UP_1, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(UP_1), rf"lacks {UP_1} that its config\.json asks for"),
        (lambda w: w.update({UP_1: w[UP_1][:-4].contiguous()}), rf"{UP_1} of .* is stored as"),
        (lambda w: w[NORM][3].fill_(torch.nan), f"not finite, as in {NORM}"),
    ],
)
def test_a_model_that_is_not_whole_or_not_finite_is_not_packed(change, message, pruned, tmp_path):
    folder = shutil.copytree(pruned, tmp_path / "model")
    edit_weights(folder, change)
    with pytest.raises(InputError, match=message):
        pack_folder(folder, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_a_full_disk_leaves_nothing(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr("castlm.files.weights.write_safetensors", disk_full)
    with pytest.raises(InputError, match="disk full"):
        pack_folder(pruned, tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []


# ---- other weights than those that are verified


def assert_no_reader_takes_weights(folder: Path, named: str | None, back: Path, reason: str) -> None:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_json(folder / "config.json", quantization_config=config | {"weights": named})
    for command in readers(folder, back):
        assert main(command) == 2, command
    assert not back.exists()
    with pytest.raises(ValueError, match=reason):  # of transformers if it sees the name first
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("named", ["a/../castlm.safetensors", None])
def test_weights_of_other_names_are_neither_verified_nor_loaded(named, pruned, tmp_path, capsys):
    folder = tmp_path / "packed"
    pack_folder(pruned, folder)
    (folder / "a").mkdir()
    assert_no_reader_takes_weights(folder, named, tmp_path / "back", "names the weights")


@pytest.mark.parametrize("absolute", [False, True])
def test_an_index_that_leaves_its_folder_is_refused_by_every_reader(absolute, pruned, tmp_path, capsys):
    folder, other = tmp_path / "packed", tmp_path / "other"
    pack_folder(pruned, folder)
    shutil.copytree(folder, other)
    file = str(other / FILE) if absolute else f"../other/{FILE}"
    with safe_open(folder / FILE, framework="pt") as opened:
        names = list(opened.keys())
    (folder / FILE).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, file)}))
    assert_no_reader_takes_weights(folder, INDEX, tmp_path / "back", "other/castlm|is not in")


def test_scales_with_which_integers_are_infinite_are_refused(pruned, tmp_path, capsys):
    assert main(["quantize", str(pruned), "--kind", "int8", "--packed", "--output-dir", str(tmp_path / "packed")]) == 0

    def huge(tensors, metadata):
        tensors["model.layers.0.mlp.up_proj.scales"][0] = 3e38

    folder = change(tmp_path / "packed", tmp_path / "changed", huge)
    assert [main(command) for command in readers(folder, tmp_path / "back")] == [1, 2, 2]
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("family", "name"), [("llama", "model.layers.0.self_attn.q_proj"), ("gpt2", "transformer.h.0.attn.c_proj")]
)
@pytest.mark.parametrize("pattern", ["2:4", None])
def test_a_square_layer_that_is_marked_as_stored_the_other_way_round_is_refused(
    family, name, pattern, tmp_path, capsys
):
    model = linear_model(family, num_attention_heads=4, num_key_value_heads=4)
    if pattern is not None:
        prune_(model)
    save_model(model, tiny_tokenizer(), tmp_path / "plain")
    pack_folder(tmp_path / "plain", tmp_path / "packed", pattern)
    folder = change(tmp_path / "packed", tmp_path / "changed", transpose(name))
    assert [main(command) for command in readers(folder, tmp_path / "back")] == [2, 2, 2]
    assert capsys.readouterr().err.count(name) == (3 if pattern else 2)  # a dense model has nothing to verify
    assert not (tmp_path / "back").exists()


def test_a_packed_model_that_cannot_be_loaded_is_not_kept(pruned, tmp_path, monkeypatch):
    """Whatever loading raises in the fresh process: here for an activation that transformers does not have."""
    source = Path(shutil.copytree(pruned, tmp_path / "source"))
    edit_json(source / "config.json", hidden_act="no_such")
    monkeypatch.setattr("castlm.export.packed.check_loads", check_loads)
    config = read_config(pruned)
    uses = check_layers(pruned, stored_tensors(pruned, config), config)
    for module in ("packed", "verify"):
        monkeypatch.setattr(f"castlm.export.{module}.check_layers", lambda *_: uses)
    with pytest.raises(InputError, match=r"cannot be loaded .*no_such"):
        pack_folder(source, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_weights_that_are_too_large_for_a_finite_product_are_not_packed_and_give_no_text(pruned, tmp_path, capsys):
    source = Path(shutil.copytree(pruned, tmp_path / "source"))
    edit_weights(source, lambda w: w["lm_head.weight"].fill_(1e38))
    with pytest.raises(InputError, match="logits of the packed model"):
        pack_folder(source, tmp_path / "packed")
    assert main(["generate", str(source), "--prompt", "a"]) == 2
    assert "logits of the model are not finite" in capsys.readouterr().err


# ---- dense models


def test_a_dense_model_is_packed_and_comes_back(tmp_path, capsys):
    source = save_tiny(tmp_path / "dense", "llama")
    tiny_model("llama").bfloat16().save_pretrained(source)
    assert main(["pack", str(source), "--output-dir", str(tmp_path / "packed")]) == 0
    assert "14 tensors packed dense" in capsys.readouterr().out
    assert {spec.pattern for spec in read_specs(read_header(tmp_path / "packed" / FILE)).values()} == {"dense"}
    assert_comes_back(source, tmp_path / "packed", tmp_path / "back")


# ---- the masks of the format, and the table of numeric formats


def test_codes_number_the_masks_of_a_group_in_order():
    masks = [m for m in itertools.product((0, 1), repeat=4) if sum(m) == 2]
    masks.sort(key=lambda m: sum(bit << i for i, bit in enumerate(m)))  # column 0 is the lowest bit
    weight = torch.tensor([mask for code in range(6) for mask in (masks[code], masks[0])], dtype=torch.float32)
    spec = PackedSpec(12, 4, 2, 4, "bf16")
    stored = spec.mask_to_stored(pack_mask(weight.bool()).numpy())
    assert stored[:, 0].tolist() == [0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0]


@pytest.mark.parametrize(
    ("n", "m", "values", "bits"), [(2, 4, "int4", 3.0), (0, 0, "int4", 4.25), (0, 0, "int3", 3.25)]
)
def test_bits_a_weight_of_a_file(n, m, values, bits):
    spec = PackedSpec(64, 1024, n, m, values)
    assert 8 * spec.num_bytes / (64 * 1024) == bits


def test_codes_follow_each_other_from_the_lowest_bit_on():
    codes = torch.tensor([[1, -1, 2, -4, 3, 0, -2, 1, -3, 2]], dtype=torch.int8)
    of_three = pack_integers(codes, torch.ones(1, 1), "int3", 0, 0).values[0].tolist()
    assert sum(byte << 8 * i for i, byte in enumerate(of_three)) == sum(
        (c & 7) << 3 * i for i, c in enumerate(codes[0].tolist())
    )
    of_four = pack_integers(codes[:, :3], torch.ones(1, 1), "int4", 0, 0).values[0].tolist()
    assert of_four == [0xF1, 0x02]


def test_integers_keep_a_given_mask():
    mask = torch.tensor([[True, True, False, False]])
    codes = torch.tensor([[3, 0, 0, 0]], dtype=torch.int8)
    packed = pack_integers(codes, torch.ones(1, 1), "int8", 2, 4, mask)
    assert torch.equal(unpack_mask(packed.mask_bits, 4), mask)
    assert torch.equal(packed.mask, pack(codes.float() + torch.tensor([[0.0, 1.0, 0.0, 0.0]]), 2, 4).mask)
