"""castlm compare: the identity of a run, its resumption and its table. All but one test run in this process."""

import dataclasses
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from castlm.cli.compare import show
from castlm.cli.main import main
from castlm.core.errors import InputError
from castlm.data import documents
from castlm.facts import DrawnText, Facts, Perplexities, Start, Verdict, to_json
from castlm.files.output import begin_output, output_folder
from castlm.lab.compare import runs
from castlm.lab.compare.plan import CompareConfig, Plan
from castlm.lab.compare.plan import compare as run_comparison
from castlm.lab.compare.presets import PRESETS, SPARSEGPT
from castlm.lab.compare.report import Report, gaps_over_budgets, rates_note, starts_note, verdict
from castlm.lab.compare.rows import behind, summarize
from castlm.lab.compare.runs import (
    CASTLM,
    ComparedRun,
    Result,
    content_hash,
    refuse_running,
    run_key,
    run_process,
)
from castlm.methods.table import METHODS
from castlm.progress import note
from castlm.training.config import TrainConfig
from castlm.training.trainer import Trainer
from tests.refusals import refusal
from tests.runs import before_each_step, killed_in
from tests.tiny import TEXT, save_tiny

CONFIG = {"mask_interval": 2, "eval_tokens": 256, "seq_len": 32, "per_device_train_batch_size": 2}
CONFIG |= {"calibration_sequences": 4}


SHORT = {"methods": "cast", "config": {**CONFIG, "init_from": "magnitude", "save_steps": 0}}
"""Options of runs that start from magnitude and save nothing on the way, where their results alone matter."""


@pytest.fixture(scope="module")
def files(llama, text, tmp_path_factory) -> dict[str, str]:
    eval_text = tmp_path_factory.mktemp("files") / "eval.txt"
    eval_text.write_text(TEXT[:2000])
    return {"model": llama, "dataset": text, "eval_dataset": str(eval_text)}


def run_here(patch: pytest.MonkeyPatch) -> list[str]:
    """Runs a comparison's processes in this one; returns the names of the configs that were started."""
    started: list[str] = []

    def run(arguments, log, program):
        started.append(Path(arguments[-1]).stem)
        code = main(arguments)
        log.write_text("castlm: error: as it said\n" if code else "done\n")
        return code

    patch.setattr(runs, "run_process", run)
    return started


@pytest.fixture
def in_process(no_charts, monkeypatch) -> list[str]:
    """Runs a comparison's processes in this one; the names of the configs that were started."""
    return run_here(monkeypatch)


def command(files, tmp_path, **over) -> CompareConfig:
    """The options of a comparison; `config` and `variants` may be given by what is in the file."""
    fields = {"output_dir": str(tmp_path / "out"), "budget_tokens": 6 * 64, "seeds": 1, "config": CONFIG}
    fields |= {**files, **over}
    for name in ("config", "variants"):
        if isinstance(fields.get(name), dict):
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(fields[name], sort_keys=False))
            fields[name] = str(tmp_path / f"{name}.yaml")
    return CompareConfig(**fields)


def plan_of(files, tmp_path, **over) -> Plan:
    return Plan(command(files, tmp_path, **over), str)


def compare(files, tmp_path, **over) -> tuple[int, dict]:
    code, _ = run_comparison(command(files, tmp_path, **over), "castlm compare", note)
    return code, json.loads((tmp_path / "out" / "table.json").read_text())


@dataclasses.dataclass
class Compared:
    """A comparison of three methods and the control, which was started twice, and its runs."""

    out: Path
    codes: tuple[int, int]
    tables: tuple[dict, dict]
    """The content of table.json after each start."""
    started: list[str]

    @property
    def rows(self) -> dict[str, dict]:
        return {row["variant"]: row for row in self.tables[0]["rows"]}

    @property
    def facts(self) -> dict[str, Facts]:
        found = [Facts.read(folder) for folder in self.out.glob("runs/*/model")]
        return {facts.method: facts for facts in found}


@pytest.fixture(scope="module")
def compared(files, tmp_path_factory) -> Compared:
    folder = tmp_path_factory.mktemp("compared")
    # At this rate six steps end below the start of this random model, so that no run counts as diverged.
    asked = {"methods": "cast,srste,magnitude", "calibration_sequences": 2, "config": {**CONFIG, "learning_rate": 3e-3}}
    with pytest.MonkeyPatch.context() as patch:
        started = run_here(patch)
        patch.setattr("castlm.lab.compare.report.can_draw", lambda: False)
        first, table = compare(files, folder, **asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "run_process", None)  # nothing is left to run
        second, again = compare(files, folder, **asked)
    return Compared(folder / "out", (first, second), (table, again), started)


def test_each_variant_and_the_control_run_once(compared):
    assert compared.codes == (0, 0)
    assert [name.rpartition("-")[0] for name in compared.started] == ["cast", "srste", "magnitude", "dense"]
    assert list(compared.rows) == ["cast", "srste", "magnitude", "dense"]
    assert compared.tables[1]["rows"] == compared.tables[0]["rows"]
    assert not list(compared.out.glob("runs/*/checkpoints"))


def test_a_row_has_the_figures_of_its_run_and_their_distance_to_the_control(compared):
    rows, facts = compared.rows, compared.facts
    found = {name: (row["pruned"]["mean"], row["gap"]["mean"], row["tokens"]) for name, row in rows.items()}
    tokens = {"cast": 6 * 64, "srste": 6 * 64, "magnitude": 0, "dense": 6 * 64}
    control = facts["dense"].perplexity.final
    of_runs = {name: facts[name].perplexity.final for name in rows}
    assert found == {name: pytest.approx((ppl, math.log(ppl / control), tokens[name])) for name, ppl in of_runs.items()}
    dense = {facts["cast"].perplexity.dense, facts["magnitude"].perplexity.dense}  # measured in two ways
    assert compared.tables[0]["untouched"] == pytest.approx(min(dense), rel=1e-5) == pytest.approx(max(dense), rel=1e-5)
    assert rows["cast"]["peak_memory_mib"]["mean"] > 100


def test_the_table_has_the_conditions_of_its_figures(compared):
    table, measured = compared.tables[0], compared.facts["cast"].measured
    assert table["stamp"].items() >= {"metric": "perplexity", **to_json(measured)}.items()
    assert table["stamp"]["sha256"].keys() == {"model", "dataset", "eval_dataset", "calibration"}
    assert table["stamp"]["date"]
    results = [*table["results"], *table["one_shot_results"]]
    assert {result["method"]: result["versions"] for result in results} == {
        name: facts.versions for name, facts in compared.facts.items()
    }


def test_a_row_names_its_start_and_the_options_that_have_an_effect(compared):
    refined = "sparsegpt, refined"  # sparsegpt alone would be a row of that name
    starts = {"cast": refined, "srste": refined, "magnitude": "dense", "dense": "dense"}
    assert {name: row["start"] for name, row in compared.rows.items()} == starts
    assert {name: set(row["options"]) for name, row in compared.rows.items()} == {
        "cast": {"decay", "decay_end", "hidden_weight", "mask_interval", "scale_groups"},
        "srste": {"hidden_weight", "lam"},
        "magnitude": set(),
        "dense": {"hidden_weight"},  # in which the trained variants differ
    }
    assert [result["config"]["calibration_sequences"] for result in compared.tables[0]["one_shot_results"]] == [2]


def test_the_table_has_all_columns_and_their_meanings(compared):
    text = (compared.out / "table.md").read_text()
    for words in ("| peak memory, MiB |", "behind the best", compared.tables[1]["verdict"], "not tuned: all at 0.003"):
        assert words in text
    assert not (compared.out / "gaps.svg").exists()  # of one budget


def test_a_failed_run_is_a_line_of_the_table_whatever_its_name(files, tmp_path, in_process, capsys):
    bad = f"[/red] a|{'b' * 300}"
    variants = {"good": {}, bad: {"method": "cast", "left_dense": ["*"]}}
    options = command(files, tmp_path, variants=variants, budget_tokens=300, config=SHORT["config"])
    code, report = run_comparison(options, "castlm compare", note)
    assert code == 1
    rows = {row["variant"]: row for row in json.loads((tmp_path / "out" / "table.json").read_text())["rows"]}
    assert "exit code 2: as it said" in rows[bad]["errors"][0]
    assert rows["good"]["pruned"]["mean"] > 1
    assert not rows["good"]["errors"]
    show(report, options.output_dir)
    assert "[/red] a|b" in capsys.readouterr().out
    assert "[/red] a\\|b" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.slow
def test_rates_are_chosen_on_the_tuning_text(files, tmp_path, in_process, capsys):
    tuning = tmp_path / "tuning.txt"
    tuning.write_text("a text of its own, for the choice of the rate\n" * 20)
    asked = {**SHORT, "learning_rates": "1e-4,2e-2", "seeds": 2, "tuning_dataset": str(tuning)}
    _, table = compare(files, tmp_path, **asked)
    assert len(in_process) == 8  # two trials and two seeds, of cast and of the control
    lines = capsys.readouterr().err
    assert re.search(r"1/8  cast, seed 0, rate 0\.0001, 384 .*tuning", lines)
    assert "4/8  cast, seed 1" in lines
    trials = [t for t in table["trials"] if t["variant"] == "cast" and t["text"] == str(tuning)]
    row = table["rows"][0]
    assert row["learning_rate"] == min(trials, key=lambda t: t["perplexity"])["learning_rate"]
    assert row["seeds"] == [0, 1]
    assert row["pruned"]["values"][0] not in [t["perplexity"] for t in trials]
    assert table["stamp"]["text"] == files["eval_dataset"]
    assert f"by the perplexity on {tuning}" in (tmp_path / "out" / "table.md").read_text()


def test_a_killed_run_is_resumed(files, tmp_path, in_process, monkeypatch):
    asked = {"methods": "cast", "config": {**CONFIG, "init_from": "magnitude", "save_steps": 1}}
    with killed_in(Trainer, "train_step", call=5):
        compare(files, tmp_path, **asked)
    steps: list[int] = []
    before_each_step(monkeypatch, lambda run: steps.append(run.step))
    compare(files, tmp_path, **asked)
    first = steps[0]
    assert first in (3, 4)  # the newest save may not have been whole
    assert steps == [*range(first, 6), *range(6)]  # the dense control follows


def test_each_text_is_opened_as_its_runs_open_it(files, tmp_path, monkeypatch):
    real, opened = documents.open_documents, {}

    def open_documents(text, options, **how):
        opened[Path(text).name] = how.get("split")
        return real(text, options)

    monkeypatch.setattr(documents, "open_documents", open_documents)
    config = {**CONFIG, "dataset_split": "a", "eval_split": "b"}
    (tmp_path / "calibration.txt").write_text(TEXT)
    plan_of(files, tmp_path, methods="magnitude", config=config, calibration=str(tmp_path / "calibration.txt"))
    assert opened == {"stories.txt": "a", "eval.txt": "b", "calibration.txt": "train"}


def test_key_has_all_that_matters(tmp_path):
    hashes = {"model": "a", "dataset": "b", "eval_dataset": "c"}
    config = {"model": "x", "dataset": "y", "eval_dataset": "z", "eta": 0.5, "seed": 0, "output_dir": "o"}
    key = run_key(config, hashes)
    assert run_key({**config, "output_dir": "p", "model": "elsewhere/x", "save_steps": 7}, hashes) == key
    assert run_key({**config, "eta": 0.6}, hashes) != key
    assert run_key({**config, "seed": 1}, hashes) != key
    assert all(run_key(config, {**hashes, name: "other"}) != key for name in hashes)
    template = tmp_path / "template.jinja"
    keys = []
    for text in ("one", "two"):
        template.write_text(text)
        keys.append(run_key({**config, "chat_template_path": str(template)}, hashes))
    assert keys[0] != keys[1]


def test_a_start_counts_by_what_its_model_holds(files, tmp_path):
    starts = [save_tiny(tmp_path / "a"), save_tiny(tmp_path / "b"), save_tiny(tmp_path / "c", seed=1)]
    plan = plan_of(files, tmp_path, variants={start.name: {"init_from": str(start)} for start in starts})
    one, same, other = (plan.make(start.name, 6 * 64, 0, None).key for start in starts)
    assert one == same != other
    assert plan.make(starts[0].name, 5 * 64, 0, None).key != one  # another budget is another run


def test_a_hub_model_counts_by_its_commit_before_a_run_has_fetched_it_too(files, tmp_path, monkeypatch):
    fetched = []

    def fetch(name, **_):
        fetched.append(name)
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        for file, content in {"refs/main": "a" * 40, f"snapshots/{'a' * 40}/config.json": "{}"}.items():
            (repository / file).parent.mkdir(parents=True)
            (repository / file).write_text(content)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("castlm.models.io.open_config", fetch)
    over = {
        "model": "someone/tiny",
        "variants": {"cast": {"init_from": "someone/start"}},
        "config": {**CONFIG, "learning_rate": 1e-3},
    }
    first, second = (plan_of(files, tmp_path, **over).make("cast", 6 * 64, 0, None).key for _ in range(2))
    assert first == second
    assert fetched == ["someone/tiny", "someone/start"]


@pytest.mark.parametrize(
    ("published", "init_from", "starts"),
    [
        (False, None, {"cast": "sparsegpt", "finetune": "sparsegpt", "srste": "sparsegpt"}),
        (True, None, {"cast": "magnitude", "finetune": "sparsegpt", "srste": "magnitude"}),
        (False, "wanda", {"cast": "wanda", "finetune": "wanda", "srste": "wanda"}),  # the control has no start
    ],
)
def test_every_method_starts_alike_unless_published_starts_are_asked_for(published, init_from, starts, files, tmp_path):
    config = {**CONFIG, **({} if init_from is None else {"init_from": init_from})}
    names = "cast,finetune,srste,gradual_magnitude"
    plan = plan_of(files, tmp_path, methods=names, published_starts=published, config=config)
    found = {name: plan.make(name, 6 * 64, 0, None).config["init_from"] for name in plan.variants}
    assert found == {**starts, "gradual_magnitude": "magnitude", "dense": "magnitude"}


def test_a_published_start_is_as_published_unless_the_options_say_otherwise(files, tmp_path):
    def start(**over):
        config = plan_of(files, tmp_path, methods="finetune", **over).make("finetune", 6 * 64, 0, None).config
        return {name: config[name] for name in (*SPARSEGPT, "rotate", "refit_iterations")}

    assert start() == {"init_from": "sparsegpt", "start_effort": "best", "rotate": "auto", "refit_iterations": None}
    published = {**SPARSEGPT, "rotate": "off", "refit_iterations": 0}
    assert start(published_starts=True) == published
    chosen = start(published_starts=True, config={**CONFIG, "refit_iterations": 5})
    assert chosen == {**published, "refit_iterations": 5}


def fake(variant: str, budget: int, seed: int, ppl: float, trial: bool = False, tokens: int | None = None) -> Result:
    fields = {"method": variant, "seed": seed, "learning_rate": 1e-3}
    if variant in METHODS:
        fields = TrainConfig.of("model", "text", "run", **fields).as_dict()
    run = ComparedRun(variant, budget, budget if tokens is None else tokens, fields)
    key = "trained" if variant == "dense" else "pruned"
    perplexity = Perplexities(**{key: ppl}, before_prune=ppl)
    facts = Facts(pattern="2:4", left_dense={}, perplexity=perplexity, train_seconds=2.0)
    return Result(run, Path("."), facts, trial=trial)


def fakes(variant: str, *ppls: float, budget: int = 100) -> list[Result]:
    """Results with the seeds 0, 1, ..."""
    return [fake(variant, budget, seed, ppl) for seed, ppl in enumerate(ppls)]


def test_gap_is_paired_by_budget_and_seed():
    controls = {(100, 0): 5.0, (100, 1): 6.0, (200, 0): 4.0, (200, 1): 4.5}
    results = [fake("dense", tokens, seed, ppl) for (tokens, seed), ppl in controls.items()]
    results += [fake("cast", 100, 0, 7.0), fake("cast", 100, 1, 7.5), fake("cast", 200, 0, 5.0)]
    results += [fake("cast", 100, 0, 99.0, trial=True), fake("magnitude", 0, 0, 50.0), fake("wanda", 0, 1, 40.0)]
    results += [fake("cast", 200, 1, 0.0)]
    results[-1].facts, results[-1].failure = Facts(pattern=None, left_dense={}), InputError("it crashed")
    rows = {(row.variant, row.tokens): row for row in summarize(results)}
    gaps = [math.log(7.0 / 5.0), math.log(7.5 / 6.0)]
    assert rows["cast", 100].gap.mean == pytest.approx(statistics.fmean(gaps))
    assert rows["cast", 100].gap.std == pytest.approx(statistics.stdev(gaps))
    assert rows["cast", 200].gap.values == pytest.approx((math.log(5.0 / 4.0),))
    assert rows["cast", 200].gap.std is None
    assert rows["cast", 200].errors == ["seed 1: it crashed"]
    assert rows["magnitude", 0].gap.values == pytest.approx((math.log(50.0 / 4.0), math.log(50.0 / 4.5)))
    assert rows["wanda", 0].gap.mean == pytest.approx(math.log(40.0 / 4.5))


def test_a_row_has_the_tokens_that_its_masks_were_chosen_by():
    one_shot, trained = fake("wanda", 0, 0, 40.0), fake("cast", 100, 0, 7.0)
    drawn = DrawnText("train.txt", "0", seed=0, num_sequences=8, seq_len=2048, tokens_sha256="0", precision="bf16")
    one_shot.facts = dataclasses.replace(one_shot.facts, calibration=drawn)
    trained.facts = dataclasses.replace(trained.facts, start=Start(calibration_tokens=4096))
    table = Report("?", [one_shot, trained, fake("dense", 100, 0, 5.0)], "castlm compare", {})
    assert table.table(["variant", "calibration, tokens"]) == [["wanda", "16,384"], ["cast", "4,096"], ["dense", ""]]


def test_steps_of_another_size_have_the_control_of_the_same_budget_and_a_note():
    results = [fake("dense", 450, 0, 5.0, tokens=448), fake("cast", 450, 0, 7.0, tokens=448)]
    rows = summarize([*results, fake("ste", 450, 0, 6.0, tokens=384)])
    assert [row.tokens for row in rows] == [448, 448, 384]
    assert rows[2].gap.mean == pytest.approx(math.log(6.0 / 5.0))
    assert all(words in verdict(rows) for words in ("450", "ste"))


def test_steps_give_the_token_budget_of_the_options_that_all_runs_share(files, tmp_path):
    variants = {"cast": {}, "large": {"per_device_train_batch_size": 3}}
    plan = plan_of(files, tmp_path, variants=variants, budget_tokens=None, max_steps=6)
    (budget,) = plan.budgets("large")
    assert budget == 6 * 64
    assert plan.make("large", budget, 0, None).tokens == 4 * 96


def test_starts_of_one_solver_with_other_options_are_not_said_to_be_the_same():
    results = [fake("cast", 100, 0, 7.0), fake("srste", 100, 0, 8.0)]
    for result in results:
        result.run.config.update(init_from="sparsegpt")
    assert "sparsegpt, refined" in starts_note(summarize(results))
    for result, rotate in zip(results, ("off", "values")):
        result.run.config.update(rotate=rotate)
    assert all(words in starts_note(summarize(results)) for words in ("rotate off", "rotate values"))
    results[0].run.config.update(SPARSEGPT)
    assert [row.start for row in summarize(results)] == ["sparsegpt", "sparsegpt, refined"]


def test_the_report_says_which_rates_were_tuned():
    results = fakes("cast", 7.0)
    assert "not tuned: all at 0.001" in rates_note(results)
    results[0].run.config.update(learning_rate=1e-4)
    assert "not tuned: between 0.0001 and 0.001" in rates_note([*results, *fakes("srste", 7.0)])
    tried = [fake("cast", 100, 0, 7.0, trial=True), *results]
    assert "smallest candidate for cast" in rates_note(tried)
    tried.append(fake("cast", 100, 0, 8.0, trial=True))
    tried[-1].run.config.update(learning_rate=1e-5)
    assert "smallest" not in rates_note(tried)
    assert rates_note([fake("magnitude", 0, 0, 7.0)]) == ""
    one_shot = [fake("magnitude", 0, 0, 7.0), *fakes("dense", 5.0)]  # no row that a rate could put before another
    assert all(words in rates_note(one_shot) for words in ("dense control", "0.001", "not tuned"))
    assert all(words in verdict(summarize(one_shot)) for words in ("100", "magnitude"))


def test_an_infinite_gap_is_neither_ranked_nor_drawn():
    found = {"dense": 5.0, "cast": 7.0, "ast": 8.0, "ste": math.inf}
    rows = summarize([fake(name, 100, 0, perplexity) for name, perplexity in found.items()])
    assert all(words in verdict(rows) for words in ("cast", "0.3365", "40.0 %"))
    svg = gaps_over_budgets([*rows, *summarize([fake(name, 200, 0, ppl - 0.5) for name, ppl in found.items()])])
    assert ">ste<" not in svg
    assert ">cast<" in svg


def test_the_verdict_names_the_best_and_whether_chance_explains_it():
    dense = fakes("dense", 5.0, 5.0)
    level = fakes("cast", 7.0, 7.5) + fakes("srste", 7.1, 7.5)
    ahead = fakes("cast", 6.0, 6.001) + fakes("srste", 9.0, 9.1)
    assert "includes zero" in verdict(summarize(dense + level))
    text = verdict(summarize(dense + ahead))
    assert "cast" in text
    assert "(20.0 % in perplexity)" in text
    assert "excludes zero" in text
    assert "(2.00 times the perplexity)" in verdict(summarize([*dense, *fakes("cast", 10.0, 10.0)]))
    assert "may be chance" in verdict(summarize([dense[0], level[0], level[2]]))
    assert "No result" in verdict(summarize(level))


def test_a_row_is_behind_the_best_by_the_interval_of_the_differences_of_its_seeds():
    """Bands of the gaps overlap here, which says nothing: each seed moves both rows."""
    cast, ste = summarize(fakes("dense", 5.0, 5.0, 5.0) + fakes("cast", 6.0, 7.0, 8.0) + fakes("ste", 6.1, 7.2, 8.3))[
        1:
    ]
    found = behind(ste, cast)
    differences = [math.log(6.1 / 6.0), math.log(7.2 / 7.0), math.log(8.3 / 8.0)]
    half = 4.3027 * statistics.stdev(differences) / math.sqrt(3)  # Student's t of 2 degrees of freedom at 97.5 %
    assert (found.mean, found.half_width) == pytest.approx((statistics.fmean(differences), half), rel=1e-4)
    assert found.excludes_zero
    assert cast.gap.mean + cast.gap.std > ste.gap.mean - ste.gap.std
    assert behind(cast, ste).mean == pytest.approx(-found.mean)


def test_the_verdict_pairs_the_seeds_that_both_have():
    dense, cast = fakes("dense", *[5.0] * 5), fakes("cast", 6.0, 7.0, 8.0)
    # far less apart than the seeds are, and by the same factor with every seed
    ste = fakes("ste", 6.12, 7.14, 8.1601)
    text = verdict(summarize(dense[:3] + cast + ste))
    assert "0.0198 to 0.0198" in text
    assert "excludes zero" in text
    others = fakes("ste", 6.12, *[0.0] * 2, 7.2, 7.2)
    text = verdict(summarize(dense + cast + [others[0], *others[3:]]))
    assert "chance" in text
    assert "paired over 3 seeds" in verdict(summarize(dense[:3] + cast + [fake("magnitude", 0, 0, 8.2)]))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_planned(name, files, tmp_path):
    options = {"preset": name, "budget_tokens": 64 * 800}
    plan = plan_of(files, tmp_path, **options)
    made = [plan.make(v, t, 0, None) for v in plan.variants for t in plan.budgets(v)]
    keys = {run.key for run in made}
    assert len(keys) == len(made)  # no two of them are the same run
    chosen = next(iter(PRESETS[name].variants))
    if chosen in METHODS:  # named with the preset, a variant keeps what the preset gives it
        assert plan_of(files, tmp_path, **options, methods=chosen).variants[chosen] == plan.variants[chosen]
    if name == "budgets":
        assert sorted({run.tokens for run in made}) == [64 * 100, 64 * 200, 64 * 400, 64 * 800]


@pytest.mark.parametrize(
    ("over", "reason"),
    [
        ({"methods": "cast,stee"}, "methods = 'stee'"),
        ({"variants": {"cast": {"pattern": "channels:0.5"}}}, "castlm cut"),
        ({"budget_tokens": 63}, "less than one step of 64"),
        ({"budget_tokens": None}, "one of --budget-tokens and --max-steps"),
        ({"max_steps": 6}, "one of --budget-tokens and --max-steps"),
        ({"learning_rates": "1e-3,fast"}, "learning_rates = 'fast' is not a number"),
        ({"learning_rates": "1e-3,-1"}, "out of range"),
        ({"tuning_dataset": "x.txt"}, "give --learning-rates"),
        ({"variants": "nowhere.yaml"}, "cannot read nowhere.yaml"),
        ({"dataset": "nowhere.txt"}, "nowhere.txt"),
        ({"model": "no where"}, "no where"),
        ({"variants": {"dense": {"method": "ste"}}}, "'ste', but the name is the dense control's"),
        ({"variants": {"dense": {"method": "cast"}, "other": {"method": "dense"}}}, "rename it"),
        ({"variants": {"other": {"method": "cast", "assistant_only_loss": False}}}, "set it for all variants"),
        ({"variants": {"cast": {"eval_dataset": "nowhere.txt"}}}, "variant cast sets eval_dataset"),
        ({"variants": {"wanda": {"mask_iterations": 5}}}, "variant wanda: mask_iterations is no option of wanda"),
        ({"variants": {"good": {}, "bad": {"lerning_rate": 1}}}, "no option lerning_rate; did you mean learning_rate"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(over, reason, files, tmp_path):
    with refusal(re.escape(reason)):
        plan_of(files, tmp_path, **over)


def test_the_text_that_chooses_rates_is_not_the_evaluation_text(files, tmp_path):
    copy = shutil.copy(files["eval_dataset"], tmp_path / "copy.txt")
    with pytest.raises(InputError, match=r"copy\.txt.*eval_dataset"):
        plan_of(files, tmp_path, methods="cast", tuning_dataset=str(copy), learning_rates="1e-3,3e-3")


def test_the_control_is_the_dense_variant_of_that_name_and_none_that_diverged():
    results = [fake("ste", 64, 0, 8.0), fake("ste", 64, 1, 8.0), fake("dense", 64, 0, 4.0), fake("dense", 64, 1, 1e9)]
    facts = results[-1].facts
    results[-1].facts = dataclasses.replace(facts, verdict=Verdict(ok=False, reason="it diverged"))
    for result in (fake("dense", 64, 0, 2.0), fake("dense", 64, 1, 2.0)):
        results.append(dataclasses.replace(result, run=dataclasses.replace(result.run, variant="other")))
    rows = {row.variant: row for row in summarize(results)}
    assert rows["ste"].gap.values == pytest.approx((math.log(2),))
    assert rows["other"].gap.values == pytest.approx((math.log(1 / 2),))
    assert rows["dense"].diverged == ["seed 1: it diverged"]


def test_a_run_that_a_killed_comparison_has_left_at_work_is_refused(tmp_path):
    with (
        output_folder(tmp_path / "out" / "runs" / "cast-1", "train"),
        pytest.raises(InputError, match=r"cast-1 is in use .*castlm train"),
    ):
        refuse_running(tmp_path / "out")
    refuse_running(tmp_path / "out")


def test_a_folder_of_something_else_is_not_compared_in(files, tmp_path, in_process):
    mine = tmp_path / "out" / "table.md"
    mine.parent.mkdir()
    mine.write_text("my own table")
    with pytest.raises(InputError, match="no output of castlm"):
        compare(files, tmp_path, methods="magnitude")
    assert list(mine.parent.iterdir()) == [mine]
    assert mine.read_text() == "my own table"


def test_a_model_that_no_run_could_open_is_refused_first(files, tmp_path):
    model = shutil.copytree(files["model"], tmp_path / "model")
    (model / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="no tokenizer"):
        compare({**files, "model": str(model)}, tmp_path, methods="magnitude")
    with pytest.raises(InputError, match="seq_len 257 exceeds"):
        compare(files, tmp_path, methods="magnitude", seq_len=257, budget_tokens=1028)
    assert not (tmp_path / "out").exists()


def test_a_changed_result_is_not_reused(files, tmp_path, in_process):
    asked = {"methods": "magnitude,wanda", "calibration_sequences": 2}
    compare(files, tmp_path, **asked)
    (weights,) = (tmp_path / "out" / "runs").glob("wanda-*/model/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, table = compare(files, tmp_path, **asked)
    assert code == 1
    errors = {row["variant"]: row["errors"] for row in table["rows"]}
    assert "has changed since castlm wrote it: remove" in errors["wanda"][0]
    assert not errors["magnitude"]
    assert len(in_process) == 3


def test_a_model_is_known_by_all_that_can_matter_and_by_nothing_else(tmp_path):
    model = save_tiny(tmp_path / "model")
    before = content_hash(str(model), None)
    for name in ("merges.txt", "vocab.txt", "modeling.py", "chat_template.jinja", "code/own.py", "README.md"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("content")
        assert (content_hash(str(model), None) == before) is (name == "README.md"), name
        (model / name).unlink()
    with output_folder(model / "out", "compare", resume=True) as out:  # a comparison inside the folder of its model
        begin_output(out, "compare", resume=True)
        (out / "runs").mkdir()
        (out / "runs" / "cast.yaml").write_text("of no effect")
        assert content_hash(str(model), None) == before


@pytest.mark.slow  # starts three processes, each of which imports torch
def test_a_method_of_ones_own_file_is_compared(files, tmp_path):
    """Its processes are started by that file, however it calls castlm: castlm alone does not know the method."""
    own = tmp_path / "own.py"
    own.write_text(
        "from castlm.cli import main as cli\nfrom castlm.methods.ste import STE\n"
        "from castlm.methods.table import METHODS, Method\n"
        "class Own(STE):\n    pass\n"
        "METHODS['own'] = Method(__name__, 'Own', 'mine')\n"
        "if __name__ == '__main__':\n    raise SystemExit(cli.main())\n"
    )
    arguments = ["--model", files["model"], "--dataset", files["dataset"], "--output-dir", str(tmp_path / "out")]
    arguments += ["--eval-dataset", files["eval_dataset"], "--methods", "own,magnitude", "--seeds", "1"]
    arguments += ["--budget-tokens", "64", "--seq-len", "16", "--per-device-train-batch-size", "2"]
    (tmp_path / "config.yaml").write_text("init_from: magnitude\n")
    arguments += ["--config", str(tmp_path / "config.yaml"), "--eval-tokens", "256", "--calibration-sequences", "2"]
    done = subprocess.run(
        [sys.executable, str(own), "compare", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^own +", done.stdout, re.M)


def test_process_of_a_run(tmp_path):
    log = tmp_path / "log"
    assert run_process(["nonsense"], log, CASTLM) == 2
    assert "there is no command 'nonsense'" in log.read_text()
