"""Each command of docs/paper.md makes the rows of its table, with the options that the rows were measured with."""

import json
import re
import shlex
from pathlib import Path

import pytest
from benchmarks import paper
from benchmarks.render import RESULTS, ROOT

from castlm.cli.command_line import parse
from castlm.cli.train import parse_train
from castlm.lab.compare.plan import CompareConfig, Plan
from castlm.lab.compare.presets import PRESETS
from castlm.training.config import RECIPES
from tests.tiny import TEXT, save_tiny

PAGE = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"^```\n(.*?)^```$", PAGE, re.M | re.S)
    for line in block.replace("\\\n", " ").splitlines()
]
COMPARED = {words[words.index("--preset") + 1]: words[2:] for words in COMMANDS if words[1] == "compare"}
TABLES = json.loads((RESULTS / "paper.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A folder with the model and the texts that the page names, tiny ones."""
    folder = tmp_path_factory.mktemp("texts")
    save_tiny(folder / "stories260K", "llama", max_position_embeddings=512)
    (folder / "tinystories_selfgen.jsonl").write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(9)))
    (folder / "tinystories_heldout.txt").write_text(TEXT[:2000])
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


def plan_of(preset: str) -> Plan:
    return Plan(parse(CompareConfig, COMPARED[preset], "compare"), str)


def test_the_page_has_one_command_for_each_preset():
    assert COMPARED.keys() == PRESETS.keys()
    assert len([words for words in COMMANDS if words[1] == "compare"]) == len(PRESETS)


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset != "law"])
def test_a_command_of_the_page_makes_the_rows_of_its_table(preset, texts, monkeypatch):
    monkeypatch.chdir(texts)
    plan, table = plan_of(preset), TABLES[preset]
    assert list(plan.variants) == [row[0] for row in table["rows"]]
    assert plan.command.seeds == 3
    budgets = (
        [int(column["name"].split()[0].replace(",", "")) for column in table["columns"][1:]]
        if (preset == "budgets")
        else [plan.command.budget_tokens]
    )
    for name in plan.variants:
        runs = [plan.make(name, tokens, 0, None) for tokens in plan.budgets(name)]
        assert [run.tokens for run in runs] == budgets
        for run in runs:
            measured = {**table["options"]["all"], **table["options"][name]}
            resolved = paper.options_of(run.config)
            assert {option: resolved[option] for option in measured} == measured, name


def test_the_command_of_the_law_has_its_budgets(texts, monkeypatch):
    monkeypatch.chdir(texts)
    plan = plan_of("law")
    assert [f"{tokens:,}" for tokens in plan.budgets("cast")] == [row[0] for row in TABLES["law"]["rows"]]
    cast = {**TABLES["budgets"]["options"]["all"], **TABLES["budgets"]["options"]["cast"]}
    assert paper.options_of(plan.make("cast", plan.budgets("cast")[0], 0, None).config) == cast


TRAINED = re.findall(r"`((?:torchrun --nproc-per-node 8 -m )?castlm train [^`]*)`", PAGE)


@pytest.mark.parametrize("command", TRAINED, ids=lambda command: re.search(r"[\w-]+/([\w.-]+)", command)[1])
def test_a_run_of_the_page_has_the_options_that_the_paper_states(command):
    """castlm's own decay, start, loss on hidden states, rate or length would be another method."""
    ranks = 8 if command.startswith("torchrun") else 1
    arguments = shlex.split(command.partition("castlm train ")[2])
    config, _ = parse_train(arguments, ranks_of=lambda options: ranks)
    stated = dict(RECIPES["paper"], lam=4e-7, pattern="2:4")
    length = {"facebook/opt-125m": 2048, "openai-community/gpt2": 1024}
    stated["seq_len"] = length.get(config.model.model, 4096)
    del stated["gradient_accumulation_steps"]  # by the ranks
    resolved = config.as_dict()
    assert {name: resolved[name] for name in stated} == stated
    assert config.optimizer.sequences_per_step(ranks) == 256
    off = "" if ranks == 8 else f"recipe paper, except seq_len {stated['seq_len']} (not 4096)"
    assert config.off_recipe == off


def test_there_is_a_run_for_each_family_of_the_paper():
    assert len(TRAINED) == 3


def test_a_table_is_written_from_a_comparison(tmp_path, monkeypatch):
    config = dict.fromkeys(paper.OPTIONS, 1)
    (tmp_path / "runs").mkdir()
    for key in ("a", "b"):
        text = json.dumps({**config, "eta": 0.5 if key == "b" else 1})
        (tmp_path / "runs" / f"cast-{key}.yaml").write_text(text)
    of_seeds = {name: {"values": [7.0, 9.0]} for name in ("before_prune", "pruned")}
    histogram = {"masked_histogram": {"zeros": 1, "edges": [1e-5, 1e-4, 1e-3], "counts": [1, 2]}}
    results = [{"method": name, "key": key, "mask": {}, **histogram} for name, key in (("cast", "a"), ("dense", "b"))]
    rows = [{"variant": "cast", "budget": 64, **of_seeds}, {"variant": "dense", "budget": 64, **of_seeds}]
    (tmp_path / "table.json").write_text(json.dumps({"rows": rows, "results": results}))
    assert paper.share_below(results[:1], 1e-4) == "50.00 %"
    file = tmp_path / "paper.json"
    monkeypatch.setattr(paper, "FILE", file)
    file.write_text("{}")
    assert paper.main(["parts", str(tmp_path)]) == 0
    table = json.loads(file.read_text())["parts"]
    assert table["rows"] == [["cast", "8.00 ± 1.41", "8.00 ± 1.41"], ["dense", None, "8.00 ± 1.41"]]
    assert table["options"]["dense"] == {"eta": 0.5}
    assert paper.text_of(json.loads(file.read_text())) == file.read_text()
