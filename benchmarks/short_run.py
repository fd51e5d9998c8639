"""The options that benchmarks of short training runs share, on the command line and in the config of a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from castlm.training.config import TrainConfig


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `short_run` reads, and the number of seeds."""
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, help="training and calibration text")
    parser.add_argument("--eval-text", required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)


def short_run(args: argparse.Namespace, output_dir: Path, **options: Any) -> TrainConfig:
    """The config of a run that saves nothing on its way and scores the whole held-out text at its end.

    Args:
        options: of `castlm train`, beside those that `add_run_options` reads.
    """
    return TrainConfig.of(
        args.model,
        args.text,
        output_dir,
        eval_dataset=args.eval_text,
        seq_len=args.seq_len,
        per_device_train_batch_size=args.batch,
        eval_tokens=0,
        eval_steps=100_000,
        save_steps=0,
        report_to=("none",),
        **options,
    )
