"""Kills, stops and hangs the ranks of a run, and holds what comes home against the undisturbed run, bit for bit.

    python -m tests.faults  # 20 kills at random moments, and all the other faults: some minutes

`make test-slow` tries a few of each. Each time the ranks are started again as `torchrun --max-restarts` starts them;
once it is torchrun itself.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from castlm.core.errors import InputError
from castlm.training.config import TrainConfig
from tests import efforts
from tests.ranks import PATIENCE_S, run_ranks, said, start_ranks, wait_for, wait_ranks
from tests.runs import num_rows, small
from tests.tiny import TEXT, save_tiny

RESTARTED = {"TORCHELASTIC_RESTART_COUNT": "1"}


def train_as_a_command(config: TrainConfig) -> int:
    """The exit code of `castlm train`; an error is one line."""
    from castlm.signals import Interrupted
    from castlm.training.train import train

    efforts.use(efforts.AS_USERS_GET_IT)  # as the ranks of torchrun have it
    try:
        train(config)
    except InputError as error:
        print(f"castlm: error: {error}", flush=True)
        return 2
    except Interrupted as stop:
        print(f"castlm: {stop}", flush=True)
        return stop.exit_code
    return 0


@dataclass
class Ground:
    """A model, a text, and the undisturbed run on two ranks."""

    folder: Path
    config: TrainConfig
    num_runs: int = 0

    @classmethod
    def prepare(cls, folder: Path, **over: Any) -> "Ground":
        (folder / "text.txt").write_text(TEXT)
        model = save_tiny(folder / "dense", "gemma")
        fields = {"per_device_train_batch_size": 2, "max_steps": 8, "save_steps": 2, "device": "cpu"}
        config = small(str(model), str(folder / "text.txt"), folder / "undisturbed", **{**fields, **over})
        ground = cls(folder, config)
        run_ranks(train_as_a_command, 2, config, folder=folder)
        return ground

    def new_run(self, **over: Any) -> TrainConfig:
        self.num_runs += 1
        return self.config.changed(output_dir=str(self.folder / f"run-{self.num_runs}"), **over)

    def start(self, config: TrainConfig, **environment: str) -> tuple[list[BaseProcess], Path]:
        log = self.folder / f"log-{time.monotonic_ns()}"
        return start_ranks(train_as_a_command, 2, config, log=log, environment=environment), log

    def bring_home(self, config: TrainConfig) -> None:
        """Starts the ranks again, as torchrun would, and compares what they end with."""
        run_ranks(train_as_a_command, 2, config, folder=self.folder, environment=RESTARTED)
        self.compare(config)

    def compare(self, config: TrainConfig) -> None:
        one, other = (
            load_file(Path(c.checkpoint.output_dir) / "model" / "model.safetensors") for c in (self.config, config)
        )
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].tobytes() == other[name].tobytes(), f"{name} differs from the undisturbed run"


def is_saving(config: TrainConfig, step: int) -> bool:
    return (Path(config.checkpoint.output_dir) / "checkpoints" / f".step-{step:08d}.tmp").is_dir()


def kill(ranks: list[BaseProcess], log: Path, victims: list[int]) -> str:
    """Kills `victims`, and checks that no rank continues without them. Returns who was killed, in words."""
    for victim in victims:
        ranks[victim].kill()
    assert None not in wait_ranks(ranks), f"a rank continues without the other: {said(log, 2)}"
    return f"SIGKILL of {'all ranks' if len(victims) == 2 else f'rank {victims[0]}'}"


def check_kill(ground: Ground, seed: int, victims: list[int], during_save: bool) -> str:
    """SIGKILL; the remaining ranks end by themselves, and the next start continues."""
    chance = random.Random(seed)
    config = ground.new_run(async_save=chance.random() < 0.5)
    ranks, log = ground.start(config)
    step = 2 * chance.randint(1, config.optimizer.max_steps // 2)
    moment = chance.randint(0, config.optimizer.max_steps)
    if moment == 0 and not during_save:
        victims = [0, 1]  # before they have met, no rank can know of the other: torchrun ends it
    folder = config.checkpoint.output_dir
    came = wait_for(lambda: is_saving(config, step) if during_save else num_rows(folder) >= moment, ranks)
    time.sleep(chance.uniform(0, 0.005 if during_save else 0.05))
    killed = kill(ranks, log, victims)
    ground.bring_home(config)
    return f"{killed} {f'while step {step} is saved' if during_save else f'at row {moment}'}{'' if came else ' (late)'}"


def check_kill_in_start(ground: Ground, victims: list[int]) -> str:
    """SIGKILL while the ranks make the start: the next start of the ranks continues after the last finished block."""
    config = ground.new_run()
    progress = Path(f"{config.checkpoint.output_dir}.partial") / "progress.json"
    ranks, log = ground.start(config)
    assert wait_for(progress.is_file, ranks), said(log, 2)
    killed = kill(ranks, log, victims)
    assert not (Path(config.checkpoint.output_dir) / "model").exists(), "the kill came too late"
    ground.bring_home(config)
    assert not progress.exists()
    return f"{killed} during the start"


def check_sigterm(ground: Ground, victims: list[int]) -> str:
    """Pre-emption: all ranks save, exit with 0 within the grace time, also when one alone is told."""
    config = ground.new_run(save_steps=0, max_steps=ground.config.optimizer.max_steps)
    ranks, log = ground.start(config)
    assert wait_for(lambda: num_rows(config.checkpoint.output_dir) >= 3, ranks), said(log, 2)
    started = time.monotonic()
    for victim in victims:
        os.kill(ranks[victim].pid, signal.SIGTERM)
    codes = wait_ranks(ranks)
    took = time.monotonic() - started
    assert codes == [0, 0], f"{codes}: {said(log, 2)}"
    assert "saved; continue with" in said(log, 2) or "model: 2:4 proved" in said(log, 2)
    ground.bring_home(config)
    return f"SIGTERM to {len(victims)} of 2 ranks: saved and exit 0 after {took:.1f} s"


def check_hang(ground: Ground, victim: int, timeout_s: float) -> str:
    """A rank that stands still is named, and the other ends."""
    config = ground.new_run(timeout_s=timeout_s)
    ranks, log = ground.start(config)
    assert wait_for(lambda: num_rows(config.checkpoint.output_dir) >= 4, ranks), said(log, 2)
    os.kill(ranks[victim].pid, signal.SIGSTOP)
    other = ranks[1 - victim]
    other.join(PATIENCE_S)
    text, code = said(log, 2), other.exitcode
    ranks[victim].kill()
    wait_ranks(ranks)
    assert code == 2, f"{code}: {text}"
    (line,) = [line for line in text.splitlines() if line.startswith("castlm: error: ")]
    assert f"rank {victim} " in line, line
    ground.bring_home(config)
    return f"a hang of rank {victim}: {line}"


def check_torchrun(ground: Ground) -> str:
    """`torchrun --max-restarts` brings a run home after a rank is killed in the start, and another after a save."""
    config = ground.new_run()
    folder = Path(config.checkpoint.output_dir)
    arguments = ["--nproc-per-node", "2", "--max-restarts", "2", "--standalone", "-m", "castlm", "train"]
    file = ground.folder / "elastic.yaml"
    file.write_text(config.as_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", *arguments, "--config", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = ground.folder / "torchrun.log"
    with log.open("w") as stream:
        agent = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, start_new_session=True)
    for moment in (Path(f"{folder}.partial") / "progress.json", folder / "checkpoints" / "step-00000002"):
        deadline = time.monotonic() + PATIENCE_S
        while not moment.exists() and agent.poll() is None:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.005)
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
    assert agent.wait(PATIENCE_S) == 0, log.read_text()
    text = log.read_text()
    assert "resuming" in text, text
    ground.compare(config)
    return "torchrun --max-restarts, a rank killed in the start and one after a save: home by itself"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    seed, sets = parser.parse_args().seed, ([0], [1], [0, 1])
    with tempfile.TemporaryDirectory() as folder:
        ground = Ground.prepare(Path(folder))
        for number in range(20):
            print(check_kill(ground, seed * 1000 + number, sets[number % 3], number % 2 == 1), flush=True)
        for victims in sets:
            print(check_kill_in_start(ground, victims), flush=True)
            print(check_sigterm(ground, victims), flush=True)
        for victim in (0, 1):
            print(check_hang(ground, victim, timeout_s=10), flush=True)
        print(check_torchrun(ground), flush=True)
    print("after each of them the final weights equal the undisturbed run's, bit for bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
