"""The records of a run in its output folder while it trains: logs, evaluations and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from castlm.core.errors import DivergedError
from castlm.core.shards import local
from castlm.core.sparsify import dense_name
from castlm.hardware import peak_memory
from castlm.progress import note
from castlm.training.checkpoint import Saver, newest
from castlm.training.metrics import forward_flops, mask_figures, masked_histogram, masked_shares, peak_flops
from castlm.training.objective import pruned
from castlm.training.run import Run, local_masks
from castlm.training.run_folder import check_shared
from castlm.training.telemetry import Telemetry, TrackedRun, Tracker, open_trackers


class Recorder:
    """Logs the steps of a run, evaluates it and saves its checkpoints; all ranks call each method together.

    Making one claims the output folder and opens the logs: nothing is written before. It is a context manager, in which
    the progress is shown, and after which the logs are closed.

    Args:
        announce: print the model, the method, the layers and the options without effect.
    """

    def __init__(self, run: Run, *, announce: bool = True) -> None:
        self.run = run
        config, world, folder, first_step = run.config, run.world, run.folder, run.progress.step
        options, teacher, seq_len = config.checkpoint, run.objective.teacher_model, config.data.seq_len
        # a backward pass takes twice the FLOPs of its forward pass; the teacher has none
        self.flops_per_token = 3 * forward_flops(run.names.items(), run.model.config, seq_len)
        if teacher is not None:
            parameters = {parameter: name for name, parameter in teacher.named_parameters()}
            self.flops_per_token += forward_flops(parameters.items(), teacher.config, seq_len)
        self.peak_flops = peak_flops(world.device, run.evaluator.precision)
        opened: list[Tracker] = []

        def open_folder_and_trackers() -> None:
            with folder.begun(config.as_yaml(), resume=options.resume):
                run.text.indexes.save(folder.text_index)
                tracked = TrackedRun(folder.path, folder.run_id, config.as_dict(), first_step)
                chosen = "auto" not in options.report_to  # a broken client that nobody asked for stops no run
                opened.extend(open_trackers(run.trackers, tracked, None if chosen else note))

        world.on_main(open_folder_and_trackers, patient=True)
        if options.overwrite:
            check_shared(folder.path, world)  # again: `begun` has replaced the folder
        self._telemetry = Telemetry(
            folder.path,
            run.total_steps,
            is_main=world.is_main,
            start_step=first_step,
            trackers=opened,
            hidden=run.method.fixed_figures,
        )
        self.say = self._telemetry.say
        self.saver = Saver(
            folder.checkpoints, options.save_total_limit, world, background=options.async_save, say=self.say
        )
        if announce:
            for line in run.introduction():
                self.say(line)
            if run.trackers:
                self.say(f"metrics: metrics.jsonl, {', '.join(run.trackers)}")
        if run.resumed_from is not None:
            self.say(f"resuming {run.resumed_from}")
            if changed := run.progress.new_arithmetic:
                self.say(f"sums run in another order ({', '.join(changed)}): the last bits may differ")
        elif options.resume:
            self.say(f"{folder.path} holds no checkpoint yet: starting at step 0")

    def __enter__(self) -> Recorder:
        self._telemetry.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._telemetry.__exit__(kind, error, tb)

    def log(self, figures: Mapping[str, float]) -> None:
        """Shows and writes the figures of the step that just ended, with the time that is left."""
        run, progress = self.run, self.run.progress
        eval_steps = run.config.evaluation.steps_between(run.total_steps)
        save_steps = run.config.checkpoint.save_steps
        values = dict(figures)
        values["eta_s"] = progress.seconds_left(run.total_steps, eval_steps=eval_steps, save_steps=save_steps)
        if self.peak_flops is not None:
            values["mfu"] = self.flops_per_token * values["tokens_per_s"] / (self.peak_flops * run.world.size)
        self._telemetry.log(progress.step, values)

    def evaluate(self) -> None:
        """Measures the perplexity of the current forward pass, and of the model if it were pruned now."""
        run, started = self.run, time.perf_counter()
        values = {"tokens": run.progress.tokens, "perplexity": run.evaluator.perplexity()}
        masks = local_masks(run.method.masks())
        if masks:
            initial = [local(mask) for mask in run.initial_masks.values()]  # in the order of `masks`
            state = mask_figures(masks, initial, run.method.flips(), run.world)
            values["prune_now_ppl"] = values["perplexity"]
            if state["largest_masked"] != 0 and not run.method.masks_forward:  # otherwise the prune changes nothing
                with pruned(masks, on_host=run.config.optimizer.moments_on_host):
                    values["prune_now_ppl"] = run.evaluator.perplexity()
            values |= state
        if run.progress.step == 0 and run.dense_perplexity is not None:
            values["dense_ppl"] = run.dense_perplexity
        for name, part in run.text.eval_parts.items():
            values[f"perplexity/{name}"] = run.evaluator.perplexity(part)
        run.progress.figures[str(run.progress.step)] = values  # text, as the keys of JSON are
        details: dict[str, Any] = {"peak_memory_bytes": peak_memory(run.world.device.type)}  # for metrics.jsonl alone
        if masks:
            histogram = masked_histogram(masks, run.world)
            assert histogram is not None  # there are masks
            details["masked_histogram"] = [histogram.zeros, *histogram.counts]
        if masks and run.progress.step == 0:
            names = [dense_name(name).removesuffix(".weight") for name in run.initial_masks]
            details["masked_share"] = dict(zip(names, masked_shares(masks, run.world)))
        self._telemetry.evaluated(run.progress.step, values, details)
        run.progress.eval_seconds = time.perf_counter() - started

    def save(self) -> None:
        """Saves a checkpoint of the present step, after finishing the one before."""
        run, started = self.run, time.perf_counter()
        self.saver.finish()
        self.cover_teacher_cache()  # before the save, so that a resumed run continues no later than the cache ends
        manifest = run.manifest()  # a collective: all ranks, before any of them writes
        self.saver.save(run.progress.step, run.tensors(), manifest)
        run.progress.save_seconds = time.perf_counter() - started

    def cover_teacher_cache(self) -> None:
        """Records the sequences that the teacher cache now holds."""
        run, teacher = self.run, self.run.objective.teacher
        if teacher is not None and teacher.cache is not None:
            batch = run.config.optimizer.sequences_per_step(run.world.size)
            whole_epoch = run.config.data.repeat_sequences and run.text.loader.state_dict()["epoch"] > 0
            first, last = run.progress.first_step * batch, run.progress.step * batch
            teacher.cache.cover(first, last, every_epoch=whole_epoch)

    def diverged(self, error: DivergedError) -> DivergedError:
        """The error of a step that diverged, with the last checkpoint, which is published before."""
        self.saver.finish_despite_error(on_all_ranks=error.on_all_ranks)
        found = newest(self.run.folder.checkpoints)
        last = f"the last checkpoint is {found}" if found else "there is no checkpoint yet"
        return DivergedError(f"{error}; {last}")
