"""Trackers and uploads, with stubs of the clients: what they are told, and what is refused before a run."""

import importlib
import importlib.machinery
import json
import math
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from castlm.core.errors import InputError
from castlm.export.hf import push
from castlm.files.record import LOCK, OUTPUT
from castlm.training import telemetry as trackers
from castlm.training.telemetry import Telemetry, TrackedRun, chosen_trackers, open_trackers, read_metrics
from castlm.training.train import train
from tests.runs import metrics, small


class Client(types.ModuleType):
    """Stands in for wandb or trackio and records what it is told."""

    def __init__(self, name: str, api_key: str | None = None) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, importlib.machinery.BuiltinImporter, origin="a stub")
        self.api = types.SimpleNamespace(api_key=api_key)
        self.started: list[dict] = []
        self.logged: list[tuple[int, dict]] = []
        self.num_finished = 0

    def init(self, **options) -> "Client":
        self.started.append(options)
        return self

    def log(self, values, step) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.num_finished += 1


@pytest.fixture
def clients(monkeypatch) -> dict[str, Client]:
    found = {name: Client(name) for name in ("wandb", "trackio")}
    for name, client in found.items():
        monkeypatch.setitem(sys.modules, name, client)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return found


def test_every_installed_tracker_gets_the_figures_of_metrics_jsonl(clients, llama, text, tmp_path, capsys):
    train(small(llama, text, tmp_path / "run", max_steps=2, eval_steps=2, init_from="magnitude", report_to=("auto",)))
    assert "metrics: metrics.jsonl, tensorboard, wandb, trackio" in capsys.readouterr().err
    rows = metrics(tmp_path / "run")
    for client in clients.values():
        assert client.num_finished == 1
        assert client.started[0]["config"]["max_steps"] == 2
        assert [step for step, _ in client.logged] == [row["step"] for row in rows]
        for (_, values), row in zip(client.logged, rows):
            assert values.items() <= row.items()
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_tensorboard_keeps_the_step_that_a_resumed_run_starts_from(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        writer = trackers.TensorBoard(TrackedRun(tmp_path, "a1", {}, first_step))
        for step in steps:
            writer.log({"loss": float(first_step)}, step)
        writer.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 0.0), (2, 0.0), (3, 2.0), (4, 2.0)]


def test_wandb_is_offline_without_a_key_and_resumes_the_same_run(clients, tmp_path, monkeypatch):
    run = TrackedRun(tmp_path / "run", "a1", {}, 0)
    open_trackers(["wandb"], run)
    assert clients["wandb"].started[0]["mode"] == "offline"
    monkeypatch.setitem(sys.modules, "wandb", keyed := Client("wandb", api_key="k"))
    open_trackers(["wandb"], run._replace(first_step=3))
    assert keyed.started[0]["mode"] == "online"
    assert keyed.started[0]["id"] == clients["wandb"].started[0]["id"] == "a1"
    assert keyed.started[0]["resume"] == "allow"


def test_a_tracker_that_is_missing_or_fails_is_one_line(clients, tmp_path, monkeypatch):
    assert chosen_trackers(["none"]) == []
    assert chosen_trackers(["wandb", "wandb"]) == ["wandb"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install wandb"):
        chosen_trackers(["wandb"])
    monkeypatch.setattr(clients["trackio"], "init", lambda **_: 1 / 0)
    with pytest.raises(InputError, match="report_to trackio: division by zero"):
        open_trackers(["trackio"], TrackedRun(tmp_path, "a1", {}, 0))
    closed = []
    monkeypatch.setattr(trackers.TensorBoard, "close", lambda self: closed.append(self))
    with pytest.raises(InputError, match="report_to trackio"):
        open_trackers(["tensorboard", "trackio"], TrackedRun(tmp_path, "a1", {}, 0))
    assert len(closed) == 1


def names_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.name != LOCK)


def test_a_tracker_that_fails_at_the_start_leaves_the_folder_as_it_was(clients, llama, text, tmp_path, monkeypatch):
    def fail(**options) -> None:
        begun = Path(options["dir"]) / "wandb" / "run-20261126_101010-ab" / "logs"
        begun.mkdir(parents=True)
        (begun / "debug.log").write_text("no route")
        (begun.parent.parent / "debug.log").symlink_to("run-20261126_101010-ab/logs/debug.log")
        raise ConnectionError("no route to host")

    config = small(llama, text, tmp_path / "run", max_steps=2, save_steps=2, init_from="magnitude")
    refused = config.changed(report_to=("tensorboard", "wandb"))
    works = clients["wandb"].init
    monkeypatch.setattr(clients["wandb"], "init", fail)
    with pytest.raises(InputError, match="report_to wandb: no route to host"):
        train(refused)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(clients["wandb"], "init", works)
    train(refused.changed(report_to=("auto",)))
    before = names_in(tmp_path / "run")
    record = (tmp_path / "run" / OUTPUT).read_bytes()
    monkeypatch.setattr(clients["wandb"], "init", fail)
    with pytest.raises(InputError, match="report_to wandb: no route to host"):
        train(refused.changed(overwrite=True, seed=1))
    assert names_in(tmp_path / "run") == before
    assert (tmp_path / "run" / OUTPUT).read_bytes() == record
    train(refused.changed(resume=True))  # of the earlier run, which is finished


@pytest.mark.parametrize("at", ["log", "close"])
def test_a_tracker_that_fails_during_a_run_does_not_stop_it(at, tmp_path, capsys):
    told = []

    class Broken:
        name = "broken"

        def log(self, values, step) -> None:
            told.append(step)
            if at == "log":
                raise ConnectionError("no route to host")

        def close(self) -> None:
            told.append("close")
            raise ConnectionError("no route to host")

    telemetry = Telemetry(tmp_path, 3, is_main=True, start_step=0, trackers=[Broken()])
    with telemetry:
        for step in (1, 2):
            telemetry.log(step, {"loss": 1.0, "eta_s": 0.0})
    assert told == ([1] if at == "log" else [1, 2, "close"])
    assert capsys.readouterr().err.count("broken gets no more figures (no route to host)") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_figure_that_is_not_finite_is_null_in_the_file_and_inf_for_its_readers(tmp_path):
    figures = {"perplexity": math.inf, "prune_now_ppl": math.nan}
    telemetry = Telemetry(tmp_path, 2, is_main=True, start_step=0)
    with telemetry:
        telemetry.evaluated(1, figures, {"masked_share": {"a": math.nan}, "masked_histogram": [1, 2]})
    row = {"step": 1, "perplexity": None, "prune_now_ppl": None, "masked_share": {"a": None}}
    assert metrics(tmp_path) == [{**row, "masked_histogram": [1, 2]}]
    (read,) = read_metrics(tmp_path)
    assert (read["perplexity"], read["prune_now_ppl"]) == (math.inf, math.inf)


# ------------------------------------------------------------------------------------------------------------- hub


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as an upload of small files takes."""

    commits: list[list[dict]] = []  # noqa: RUF012
    refuse = False
    there: list[str] = []  # noqa: RUF012

    def log_message(self, *_) -> None:
        pass

    def answer(self, content: dict | list, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.refuse or self.headers.get("Authorization") != "Bearer hf_test":
            self.answer({"error": "Invalid username or password."}, 401)
        elif "/tree/" in self.path:
            self.answer([{"type": "file", "path": name, "oid": "0" * 40, "size": 2} for name in self.there])
        else:
            self.answer({"type": "user", "name": "me", "orgs": [], "sha": "0" * 40, "id": "me/run", "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            self.answer({"url": "https://huggingface.co/me/run", "name": "me/run"})
        elif self.path.endswith("/validate-yaml"):
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            self.commits.append([json.loads(line) for line in body.splitlines()])
            self.answer({"success": True, "commitOid": "1" * 40, "commitUrl": "https://huggingface.co/me/run/commit/1"})
        else:
            self.answer({}, 404)


@pytest.fixture
def endpoint(monkeypatch):
    import huggingface_hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    real = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: real(endpoint=address, token="hf_test"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # the server is in this process
    monkeypatch.setattr(Hub, "commits", [])
    yield address
    server.shutdown()


def test_a_run_uploads_its_verified_model(endpoint, llama, text, tmp_path, capsys):
    config = small(llama, text, tmp_path / "run", max_steps=2, push_to_hub=True, hub_model_id="me/run")
    config = config.changed(init_from="magnitude")
    train(config)
    assert "uploaded: https://huggingface.co/me/run/commit/1" in capsys.readouterr().err
    (commit,) = Hub.commits
    sent = {entry["value"]["path"] for entry in commit if entry["key"] == "file"}
    assert sent == {path.name for path in (tmp_path / "run" / "model").iterdir()} - {OUTPUT}
    train(config.changed(resume=True))  # as after a kill during the upload
    assert len(Hub.commits) == 2


def test_a_run_that_diverged_does_not_replace_what_is_on_the_hub(endpoint, llama, text, tmp_path, capsys):
    over = {"init_from": "magnitude", "learning_rate": 2.0, "push_to_hub": True, "hub_model_id": "me/run"}
    config = small(llama, text, tmp_path / "run", **over)
    assert train(config).verdict.problem == "DIVERGED"
    result = tmp_path / "run" / "model"
    told = f"not uploaded, because the run diverged; hf upload me/run {result}"
    assert told in capsys.readouterr().err
    train(config.changed(resume=True))
    assert told in capsys.readouterr().err
    assert Hub.commits == []


def test_an_upload_removes_the_weights_of_an_earlier_one_and_nothing_else(endpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(Hub, "there", ["model.safetensors", "config.json", "notes.txt", "old/model.safetensors"])
    for name in ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).write_text("{}")
    push(tmp_path, "me/run")
    (commit,) = Hub.commits
    assert [entry["value"]["path"] for entry in commit if entry["key"] == "deletedFile"] == ["model.safetensors"]


def test_an_upload_that_cannot_work_is_refused_before_the_run(endpoint, llama, text, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="a//b"):
        train(small(llama, text, tmp_path / "run", push_to_hub=True, hub_model_id="a//b"))
    monkeypatch.setattr(Hub, "refuse", True)
    with pytest.raises(InputError, match=r"me/run: .*hf auth login"):
        train(small(llama, text, tmp_path / "run", push_to_hub=True, hub_model_id="me/run"))
    assert not (tmp_path / "run" / "model").exists()


def test_a_failed_upload_says_how_to_send_the_result(endpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(Hub, "do_POST", lambda self: self.answer({"error": "no"}, 403))
    with pytest.raises(InputError, match=f"hf upload me/run {tmp_path}"):
        push(tmp_path, "me/run")
