"""Examples, notebooks and docs/how-to/extend.md do what they say: they are run as a user runs them, on a tiny model."""

import importlib.util
import os
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

import castlm
from castlm.cli.main import COMMANDS as CASTLM_COMMANDS
from castlm.cli.main import main
from castlm.core.decay import DECAYS
from castlm.core.errors import InputError
from castlm.core.nm import PARSERS
from castlm.data.documents import OPENERS
from castlm.export.verify import verify
from castlm.methods.table import METHODS
from castlm.oneshot.families import LAYOUTS
from castlm.oneshot.solvers import SOLVERS
from castlm_runtime.formats import FORMATS
from tests.chats import save_chat_model
from tests.ranks import run_ranks, start_process
from tests.runs import assert_same_but_for_sums
from tests.tiny import TEXT, save_tiny, tiny_model

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_trainer(model: str, text: str, out: str, batch_size: int) -> None:
    example("trainer").main(model, text, out, steps=6, seq_len=32, batch_size=batch_size)


@pytest.mark.slow
def test_trainer_ends_sparse_in_one_process_and_under_ddp(llama, text, tmp_path):
    folders = []
    for ranks in (1, 2):
        folders.append(tmp_path / f"out-{ranks}")
        arguments = (llama, text, str(folders[-1]), 4 // ranks)
        run_ranks(run_trainer, ranks, *arguments, folder=tmp_path)
        report = verify(folders[-1])
        assert report.ok
        assert len(report.sparse_layers) == 14
    one, two, dense = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (*folders, llama))
    assert_same_but_for_sums(one, two)
    for name, weight in one.items():
        assert not torch.equal(weight[weight != 0], dense[name][weight != 0]), f"{name} was not trained"


def test_trainer_is_the_plain_loop(tmp_path):
    """The same steps by hand: what Trainer adds (clipping, scheduler, accelerate) changes nothing else."""
    blocks = torch.randint(256, (8, 16), generator=torch.Generator().manual_seed(1))
    args = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=8,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trained = tiny_model("llama")
    data = [{"input_ids": block, "labels": block} for block in blocks]
    castlm.CastTrainer(trained, args, train_dataset=data).train()

    model = tiny_model("llama").train()
    castlm.add_weight_scaling(model)
    optimizer = castlm.AdamS(castlm.sparse_param_groups(model), lr=1e-3, total_steps=4)
    for _ in range(4):
        model(input_ids=blocks, labels=blocks).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    castlm.prune_(model, masks=optimizer.masks())
    castlm.fold_weight_scaling(model)
    assert_same_but_for_sums(model.state_dict(), trained.state_dict())


@pytest.mark.parametrize(
    ("setting", "environment", "reason"),
    [
        ({"deepspeed": "zero3.json"}, {}, "DeepSpeed"),
        ({"fsdp": "full_shard"}, {}, "FSDP1 flattens the weights"),
        ({"load_best_model_at_end": True}, {}, "masks of the last step"),
        ({"max_steps": -1}, {}, "set max_steps"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "FSDP1 flattens"),
        ({}, {"WORLD_SIZE": "2"}, "separate model in each process"),
    ],
)
def test_trainer_refuses_what_breaks_the_masks(setting, environment, reason, tmp_path, monkeypatch):
    args = TrainingArguments(str(tmp_path), max_steps=4, report_to=[], use_cpu=True)
    for name, value in setting.items():
        setattr(args, name, value)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=reason):
        castlm.CastTrainer(tiny_model("llama"), args)


def test_trainer_refuses_half_precision_weights(tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=4, report_to=[], use_cpu=True, save_strategy="no")
    blocks = torch.zeros(4, 8, dtype=torch.long)
    data = [{"input_ids": block, "labels": block} for block in blocks]
    with pytest.raises(InputError, match="fp32"):
        castlm.CastTrainer(tiny_model("llama").bfloat16(), args, train_dataset=data).train()


def test_torch_loop(llama, text, tmp_path):
    example("torch_loop").main(llama, text, str(tmp_path / "out"), steps=4, seq_len=32)
    assert verify(tmp_path / "out").ok


# ---- the notebooks, from their first to their last cell


def said(cells: list[Any]) -> str:
    """The text that the cells printed and showed."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)


def run_kernel(file: str, folder: Path, environment: dict[str, str]) -> None:
    """The kernel that listens where the connection file says."""
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["ipykernel_launcher", "-f", file]
    runpy.run_module("ipykernel_launcher", run_name="__main__", alter_sys=True)


@pytest.mark.slow
def test_the_notebooks_run(tmp_path):
    """In one kernel, which begins as a fork with all imports done; each begins without the names of the other."""
    pytest.importorskip("peft")
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")

    class Manager(pytest.importorskip("jupyter_client").AsyncKernelManager):
        has_kernel = True

        async def shutdown_kernel(self, **_: Any) -> None:
            kernel.kill()

    manager = Manager(connection_file=str(tmp_path / "kernel.json"), owns_kernel=False)
    manager.write_connection_file()
    environment = {"CASTLM_NOTEBOOK_MODEL": save_chat_model(tmp_path / "dense"), "CASTLM_NOTEBOOK_STEPS": "4"}
    kernel = start_process(run_kernel, manager.connection_file, tmp_path, environment, log=tmp_path / "log")
    castlm, chat = (nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4) for name in ("castlm", "chat"))
    both = nbformat.v4.new_notebook(metadata=castlm.metadata)
    both.cells = [*castlm.cells, nbformat.v4.new_code_cell("%reset -f"), *chat.cells]
    try:
        nbclient.NotebookClient(both, timeout=300, km=manager).execute()
    finally:
        kernel.kill()
        kernel.join()
    assert "2:4" in said(castlm.cells)
    printed = said(chat.cells)
    assert "2:4 holds in" in printed
    assert "adapter shira of" in printed
    assert "MB, packed" in printed


# ---- docs/how-to/extend.md: each file is written and its commands are run


PAGE = (Path(__file__).resolve().parents[1] / "docs" / "how-to" / "extend.md").read_text()
FILES = {code.splitlines()[0].removeprefix("# "): code for code in re.findall(r"```python\n(.*?)```", PAGE, re.S)}
COMMANDS = re.findall(r"^python (.*)$", PAGE.replace("\\\n", " "), re.M)

SMALL = "--max-steps 4 --seq-len 32 --per-device-train-batch-size 4 --eval-tokens 128 --save-steps 0 --report-to none"
SMALL += " --calibration-sequences 4 --no-report"
SIZES = {"train": SMALL, "prune": "--calibration-sequences 4 --seq-len 32"}
TABLES = (DECAYS, METHODS, SOLVERS, PARSERS, CASTLM_COMMANDS, OPENERS, LAYOUTS, FORMATS)


@pytest.fixture
def tables(monkeypatch):
    """Gives the tables back as they were."""
    before = [(table, dict(table)) for table in TABLES]
    yield
    for table, rows in before:
        table.clear()
        table.update(rows)


def test_the_page_has_a_file_for_each_row_of_its_table():
    assert set(FILES) == {command.split()[0] for command in COMMANDS}
    assert len(FILES) == 10


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_ones_own_extends_the_command(name, tables, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(FILES[name])
    Path("text.txt").write_text(TEXT)
    Path("texts.csv").write_text("\n".join(["text", *(f'"{story}"' for story in TEXT.split("\n\n"))]))
    if name == "gptj.py":
        of_gptj = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 64, "rotary_dim": 4}
        save_tiny(tmp_path / "dense", "gptj", **of_gptj)
    else:
        save_tiny(tmp_path / "dense")

    def code_of(command: str) -> object:
        file, verb, *options = shlex.split(re.sub(r" demo| EleutherAI/\S+", " dense", command))
        monkeypatch.setattr(sys, "argv", [file, verb, *options, *SIZES.get(verb, "").split()])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(file, run_name="__main__")
        return ended.value.code

    for command in COMMANDS:
        if command.split()[0] == name:
            assert code_of(command) == 0, command
    if name == "rows.py":
        assert code_of("rows.py verify dense --pattern rows:0.5") == 1  # the count is of this pattern
    if name == "gptj.py":
        assert "values rotated" in (tmp_path / "pruned" / "castlm.json").read_text()


def test_a_zero_shot_task_of_ones_own_is_a_file_beside_its_data(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for language, file in (("yaml", "capitals.yaml"), ("json", "capitals.jsonl")):
        (block,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)
        (tmp_path / file).write_text(block)
    (command,) = re.findall(r"^castlm (eval .*)$", PAGE, re.M)
    save_tiny(tmp_path / "dense")
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command.replace("demo", "dense"))) == 0
    assert re.search(r"capitals .*acc", capsys.readouterr().out)
    (tmp_path / "capitals.yaml").rename("piqa.yaml")
    assert main(["eval", "dense", "--tasks", "piqa", "--tasks-from", "."]) == 2  # castlm's own has this name
