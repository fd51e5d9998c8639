"""Zero-shot tasks from local files: the prompts are those of lm-eval's tasks, the accuracies those of the logits."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset

from castlm.cli.main import main
from castlm.core.errors import InputError
from castlm.evaluation.tasks.hellaswag import process_docs
from castlm.evaluation.zero_shot import SHIPPED, local_task, local_task_names, metrics_of, zero_shot
from tests.tiny import EOS_ID, tiny_model, tiny_tokenizer

ROWS = {
    "piqa.jsonl": [
        {"query": "Question: How to sit?\n", "choices": ["On a chair.", "Under a chair, upside down."], "gold": 0},
        {"query": "Question: dresser\n", "choices": ["wood", "water"], "gold": 1},
        {"query": "Question: tea\n", "choices": ["boil the water first", "boil"], "gold": 1},
    ],
    "arc_easy.jsonl": [{"query": "Question: What is up?", "choices": ["sky", "sea", "mud", "air"], "gold": 2}],
    "arc_challenge.jsonl": [{"query": "Question: What is up?", "choices": ["sky", "sea", "mud", "air"], "gold": 2}],
    "openbook_qa.jsonl": [{"query": "Predators eat", "choices": ["lions", "grass"], "gold": 0}],
    "winogrande.jsonl": [
        {"context_options": ["Ann met Bo so Ann", "Ann met Bo so Bo"], "continuation": "was glad.", "gold": 1}
    ],
    "boolq.jsonl": [{"query": "Passage: A is B.\nQuestion: is a b?", "choices": ["no", "yes"], "gold": 1}],
    "lambada_openai.jsonl": [{"context": "I look at him, feeling", "continuation": "stunned"}],
}
HELLASWAG = ["Roofing: A man sits. he", "1", "sleeps [x] now.", "rips tiles off.", "sings.", "runs."]
# what lm-eval's own task makes of the same question: (context, continuation) of every choice
PROMPTS = {
    "piqa": [
        ("Question: How to sit?\nAnswer:", " On a chair."),
        ("Question: How to sit?\nAnswer:", " Under a chair, upside down."),
    ],
    "arc_easy": [("Question: What is up?\nAnswer:", f" {c}") for c in ("sky", "sea", "mud", "air")],
    "arc_challenge": [("Question: What is up?\nAnswer:", f" {c}") for c in ("sky", "sea", "mud", "air")],
    "openbookqa": [("Predators eat", " lions"), ("Predators eat", " grass")],
    "winogrande": [("Ann met Bo so Ann", " was glad."), ("Ann met Bo so Bo", " was glad.")],
    "boolq": [("A is B.\nQuestion: is a b?\nAnswer:", " no"), ("A is B.\nQuestion: is a b?\nAnswer:", " yes")],
    "lambada_openai": [("I look at him, feeling", " stunned")],
    "hellaswag": [("Roofing: A man sits. He", f" {e}") for e in ("sleeps now.", "rips tiles off.", "sings.", "runs.")],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in ROWS.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "hellaswag_val_full.txt").write_text("\n".join(HELLASWAG) + "\n")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_every_shipped_task_is_tested():
    assert local_task_names() == sorted(PROMPTS)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_those_of_lm_eval(name, folder):
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    task = TaskManager(include_defaults=False).load([local_task(name, folder)])["tasks"][name]
    task.build_all_requests(limit=1, rank=0, world_size=1)
    assert [request.args for request in task.instances] == PROMPTS[name]


@pytest.mark.parametrize("name", PROMPTS)
def test_metrics_are_those_of_lm_eval(name):
    lm_eval = pytest.importorskip("lm_eval")
    own = {"boolq": "super_glue/boolq/default", "winogrande": "winogrande/default", "lambada_openai": "lambada/{}"}
    own |= {"arc_easy": "arc/{}", "arc_challenge": "arc/arc_easy"}
    file = Path(lm_eval.__file__).parent / "tasks" / f"{own.get(name, '{0}/{0}').format(name)}.yaml"

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: None)
    theirs = yaml.load(file.read_text(), Loader=Loader)
    ours = yaml.load((SHIPPED / f"{name}.yaml").read_text(), Loader=Loader)
    assert [m["metric"] for m in ours["metric_list"]] == [m["metric"] for m in theirs["metric_list"]]
    assert ours["metadata"]["version"] == theirs["metadata"]["version"]
    assert ours["output_type"] == theirs["output_type"]


def test_hellaswag_is_read_in_sixes():
    rows = process_docs(Dataset.from_dict({"text": [*HELLASWAG, "How to cut. Do a [Step] b.", "0", *"abcd"]}))
    assert rows["query"] == ["Roofing: A man sits. He", "How to cut. Do a b."]  # a finished sentence stays
    assert rows["choices"][0] == ["sleeps now.", "rips tiles off.", "sings.", "runs."]
    assert rows["gold"] == [1, 0]
    with pytest.raises(ValueError, match="5 lines"):
        process_docs(Dataset.from_dict({"text": HELLASWAG[:5]}))


def test_accuracy_is_that_of_the_logits(folder):
    evaluator = pytest.importorskip("lm_eval.evaluator")
    model, tokenizer = tiny_model("llama", seed=3), tiny_tokenizer()
    before = evaluator.get_git_commit_hash, torch.get_rng_state()
    record = zero_shot(model, tokenizer, ["piqa"], folder=folder)
    assert evaluator.get_git_commit_hash is before[0]  # lm-eval stays as it is for the rest of the process
    assert torch.equal(torch.get_rng_state(), before[1])
    right, right_norm = [], []
    for row in ROWS["piqa.jsonl"]:
        prompt, scores = row["query"] + "Answer:", []
        for choice in row["choices"]:
            context, whole = tokenizer.encode(prompt), tokenizer.encode(f"{prompt} {choice}")
            with torch.no_grad():
                logp = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(logp[i - 1, whole[i]]) for i in range(len(context), len(whole))))
        right.append(max((0, 1), key=lambda i, s=scores: s[i]) == row["gold"])
        lengths = [len(c) for c in row["choices"]]
        right_norm.append(max((0, 1), key=lambda i, s=scores, n=lengths: s[i] / n[i]) == row["gold"])
    figures = {row["metric"]: row for row in record["results"]}
    assert figures["acc"]["value"] == pytest.approx(sum(right) / 3)
    assert figures["acc_norm"]["value"] == pytest.approx(sum(right_norm) / 3)
    assert figures["acc"]["num_docs"] == 3
    assert figures["acc"]["data"] == "piqa.jsonl"
    assert EOS_ID not in tokenizer.encode("a")  # no token is put before the prompt here, so none was above


def test_refusals(folder, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with pytest.raises(InputError, match="no local task 'piqua'"):
        zero_shot(model, tokenizer, ["piqua"], folder=folder)
    with pytest.raises(InputError, match=r"piqa needs .*piqa.jsonl"):
        zero_shot(model, tokenizer, ["piqa"], folder=tmp_path)
    assert main(["eval", str(tmp_path), "--tasks", "piqa", "--tasks-from", str(folder), "--limit", "0"]) == 2
    assert "--limit" in capsys.readouterr().err
    assert main(["eval", str(tmp_path)]) == 2
    assert "--tasks" in capsys.readouterr().err


def test_command(llama, folder, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    file = tmp_path / "figures.json"
    arguments = ["eval", llama, "--tasks", "arc_easy,boolq", "--tasks-from", str(folder), "--json", str(file)]
    assert main(arguments) == 0
    rows = json.loads(file.read_text())["zero_shot"]["results"]
    assert [(row["task"], row["metric"]) for row in rows] == [
        ("arc_easy", "acc"),
        ("arc_easy", "acc_norm"),
        ("boolq", "acc"),
    ]
    assert "arc_easy" in capsys.readouterr().out


def test_no_metric_of_a_task_is_dropped():
    figures = {"alias": "gsm8k", "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.01}
    figures |= {"acc,none": 0.5, "acc_stderr,none": "N/A"}
    assert metrics_of(figures) == [
        {"metric": "exact_match,strict-match", "value": 0.25, "stderr": 0.01},
        {"metric": "acc", "value": 0.5, "stderr": None},
    ]
