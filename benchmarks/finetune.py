"""Fine-tuning a 2:4 model on another domain: whole, by adapters, and by plain LoRA that is merged and pruned again.

    python -m benchmarks.finetune --dense MODEL --sparse MODEL_2OF4 --text TRAIN --held-out TEXT [--json OUT]

Every way trains on the same sequences in the same order. Its learning rate is the best of three on the first seed, by
the perplexity of the held-out text; the table has the mean and the range over the seeds at that rate.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import PreTrainedModel

import castlm
from benchmarks.machine import machine, write_json
from castlm.data.documents import open_documents
from castlm.data.tokens import token_ids

FULL_RATES, ADAPTER_RATES = (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class Way:
    """A way to fine-tune: the model, the adapter, and the treatment of the result."""

    name: str
    dense: bool = False
    adapter: Callable[[PreTrainedModel, int], peft.PeftConfig] | None = None
    after: Callable[[PreTrainedModel, dict[str, Tensor]], None] = lambda model, masks: None


def plain_lora(model: PreTrainedModel, r: int) -> peft.LoraConfig:
    names = list(castlm.sparse_linears(model)[0])
    return peft.LoraConfig(r=r, lora_alpha=r, target_modules=names)


def prune_again(model: PreTrainedModel, masks: dict[str, Tensor]) -> None:
    castlm.prune_(model)


def restore_zeros(model: PreTrainedModel, masks: dict[str, Tensor]) -> None:
    for name, mask in masks.items():
        model.get_submodule(name).weight.data.mul_(mask)


WAYS = (
    Way("dense, all weights", dense=True),
    Way("2:4, all kept weights"),
    Way("2:4, SHiRA on kept weights", adapter=castlm.shira_config),
    Way("2:4, plain LoRA, merged", adapter=plain_lora),
    Way("2:4, plain LoRA, merged, pruned by magnitude", adapter=plain_lora, after=prune_again),
    Way("2:4, plain LoRA, merged, pruned by the old mask", adapter=plain_lora, after=restore_zeros),
)


@dataclass
class Setting:
    """Settings that all ways share."""

    dense: PreTrainedModel
    sparse: PreTrainedModel
    sequences: Tensor
    held_out: dict[str, Tensor]
    steps: int
    batch: int
    r: int

    @property
    def seq_len(self) -> int:
        return self.sequences.shape[1]

    def perplexities(self, model: PreTrainedModel) -> dict[str, float]:
        return {
            name: castlm.perplexity(model, ids, seq_len=self.seq_len).perplexity for name, ids in self.held_out.items()
        }


def trained(setting: Setting, way: Way, rate: float, seed: int) -> PreTrainedModel:
    """The model after training, with its adapter merged, before `way.after`."""
    torch.manual_seed(seed)
    model = copy.deepcopy(setting.dense if way.dense else setting.sparse)
    run: Any = model
    if way.adapter is not None:
        run = peft.get_peft_model(model, way.adapter(model, setting.r))
    elif not way.dense:
        castlm.keep_pattern_(model)
    optimizer = torch.optim.AdamW([p for p in run.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    warmup = max(1, setting.steps // 20)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.steps - warmup, eta_min=0.1 * rate),
        ],
        [warmup],
    )
    order = torch.randperm(len(setting.sequences), generator=torch.Generator().manual_seed(seed))
    run.train()
    for step in range(setting.steps):
        ids = setting.sequences[order[step * setting.batch : (step + 1) * setting.batch]]
        run(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grads_with_norm_(
            run.parameters(),
            1.0,
            torch.nn.utils.get_total_norm([p.grad for p in run.parameters() if p.grad is not None]),
        )
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return (run.merge_and_unload() if way.adapter is not None else model).eval()


def measure(
    setting: Setting, ways: Sequence[Way], given: Sequence[float], seeds: Sequence[int], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row for each of the untouched models and for each way; `say` gets the line of a way when it is done."""
    masks = {name: layer.weight.detach() != 0 for name, layer in castlm.sparse_linears(setting.sparse)[0].items()}
    main = next(iter(setting.held_out))
    rows = [
        {"name": name, "rate": None, "runs": [setting.perplexities(model)], "violations": violations(model)}
        for name, model in (("dense, before", setting.dense), ("2:4, before", setting.sparse))
    ]
    models: dict[Any, PreTrainedModel] = {}

    def result(way: Way, rate: float, seed: int) -> PreTrainedModel:
        key = (way.dense, way.adapter, rate, seed)
        if key not in models:  # plain LoRA is trained once, and pruned in several ways
            models[key] = trained(setting, way, rate, seed)
        model = copy.deepcopy(models[key])
        way.after(model, masks)
        return model

    for way in ways:
        rates = given or (FULL_RATES if way.adapter is None else ADAPTER_RATES)
        found = {rate: setting.perplexities(result(way, rate, seeds[0])) for rate in rates}
        best = min(rates, key=lambda rate: found[rate][main])
        runs = [found[best], *(setting.perplexities(result(way, best, seed)) for seed in seeds[1:])]
        rows.append(
            {
                "name": way.name,
                "rate": best,
                "rates": {str(rate): values[main] for rate, values in found.items()},
                "runs": runs,
                "violations": violations(result(way, best, seeds[0])),
            }
        )
        say(row_text(rows[-1], setting))
    return rows


def violations(model: PreTrainedModel) -> float:
    """The share of the groups of all sparse layers that are not 2:4."""
    weights = [layer.weight.detach() for layer in castlm.sparse_linears(model)[0].values()]
    return sum(castlm.count_nm_violations(w) for w in weights) / sum(w.numel() // 4 for w in weights)


def row_text(row: dict[str, Any], setting: Setting) -> str:
    cells = [row["name"], "" if row["rate"] is None else f"{row['rate']:g}"]
    for name in setting.held_out:
        values = [run[name] for run in row["runs"]]
        spread = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
        cells.append(f"{statistics.fmean(values):.3f}{spread}")
    cells.append("yes" if row["violations"] == 0 else f"no, {row['violations']:.0%} of the groups")
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("dense", "sparse", "text"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--held-out", required=True, nargs="+", help="the first one chooses the learning rate")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--only", nargs="+", metavar="TEXT", default=[""], help="ways whose name contains one of these")
    parser.add_argument("--rates", nargs="+", type=float, default=(), help="learning rates instead of the three")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--eval-tokens", type=int, default=32768)
    parser.add_argument("--json", metavar="OUT")
    options = parser.parse_args(arguments)
    dense, sparse = (castlm.load_model(path) for path in (options.dense, options.sparse))
    needed = 2 * options.steps * options.batch * options.seq_len
    ids = token_ids(open_documents(options.text), dense.tokenizer, limit=needed)
    held_out = {
        Path(path).stem: token_ids(open_documents(path), dense.tokenizer, limit=options.eval_tokens)
        for path in options.held_out
    }
    sequences = ids[: len(ids) // options.seq_len * options.seq_len].view(-1, options.seq_len)
    setting = Setting(
        dense.model, sparse.model, sequences, held_out, options.steps, options.batch, options.r
    )  # fmt: skip
    tokens = options.steps * options.batch * options.seq_len
    print(f"{tokens:,} training tokens of {options.text}, {len(options.seeds)} seeds, r = {options.r}")
    print("| model | learning rate | " + " | ".join(held_out) + " | 2:4 |", flush=True)
    ways = [way for way in WAYS if any(text in way.name for text in options.only)]
    rows = measure(setting, ways, options.rates, options.seeds, lambda line: print(line, flush=True))
    print("\n".join(row_text(row, setting) for row in rows[:2]))
    write_json(options.json, {"machine": machine(), "options": vars(options), "rows": rows})


if __name__ == "__main__":
    main()
