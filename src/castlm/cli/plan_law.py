"""`castlm plan sweep`, `plan fit` and `plan predict`: a scaling law from few runs, and its predictions."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from castlm.cli.options import check_json_path, command_line, parse, to_stderr, to_stdout, write_json
from castlm.core.errors import InputError
from castlm.fields import positional
from castlm.files.reading import read_json
from castlm.names import printable

if TYPE_CHECKING:
    from castlm.planning.law import Law


@dataclass
class FitCommand:
    """Fit a scaling law to finished runs: loss(D) = L_inf + B * D^-beta, in nats per token, for D training tokens."""

    runs: tuple[str, ...] = positional()
    """Run folders, folders of runs, compare results (.json), or CSVs: tokens,perplexity[,seed][,method]."""

    method: str | None = None
    """Use only the runs of this method."""

    json: str | None = None
    """File for the law, for `castlm plan predict`; "-" prints it."""

    plot: str | None = None
    """File for a plot of the fit and its residuals (.pdf, .png or .svg)."""

    def run(self) -> int:
        from castlm.planning.fit import fit_law
        from castlm.planning.law import check_plot, plot_law
        from castlm.planning.points import read_points

        check_json_path(self.json)
        if self.plot is not None:
            check_plot(self.plot)
            if self.json is not None and os.path.realpath(self.json) == os.path.realpath(self.plot):
                raise InputError(f"--json and --plot both name {self.plot}: choose another name for one of them")
        points = read_points(self.runs, method=self.method)
        law = fit_law(points)
        write_json(self.json, law.as_dict())
        if self.plot is not None:
            plot_law(law, points, self.plot)
        if self.json == "-":
            return 0
        for name, (low, high) in law.intervals.items():
            print(f"{name:<6} {getattr(law, name):.5g}  (90 %: {low:.5g} to {high:.5g})")
        print(f"{law.num_points} runs at {law.num_budgets} budgets")
        print(law.tested())
        return 0


@dataclass
class PredictCommand:
    """Predict the perplexity of a token budget, or the tokens that a perplexity needs, from a scaling law."""

    runs: tuple[str, ...] = positional()
    """A law from `castlm plan fit --json` or `plan sweep`, or the runs to fit one to: folders of runs, of `castlm
    compare` or `plan sweep`, or CSVs.
    """

    method: str | None = None
    """Use only the runs of this method."""

    tokens: float | None = None
    """Training tokens to predict the perplexity for."""

    target_ppl: float | None = None
    """Perplexity to find the training tokens for."""

    tokens_per_s: float | None = None
    """Measured throughput of one GPU or CPU; adds the hours of training."""

    price_per_hour: float | None = None
    """Price of one hour of that device; adds the cost."""

    def run(self) -> int:
        from castlm.planning.law import check_positive, duration, gpu_hours, predict_perplexity, readable, tokens_for

        if (self.tokens is None) == (self.target_ppl is None):
            raise InputError("give one of --tokens and --target-ppl")
        if self.price_per_hour is not None:
            check_positive("price_per_hour", self.price_per_hour)
            if self.tokens_per_s is None:
                raise InputError(
                    f"price_per_hour is {self.price_per_hour:g}, but the hours are unknown: give --tokens-per-s too"
                )
        if self.tokens_per_s is not None:  # before half of the answer is printed
            check_positive("tokens_per_s", self.tokens_per_s)
        law = self.law()
        if law.runs_of:
            print("law of " + ", ".join(f"{name} {printable(value)}" for name, value in law.runs_of.items()))
        if self.tokens is not None:
            found = predict_perplexity(law, self.tokens)
            beyond = f", {found.beyond:.1f}x beyond the fitted budgets" if found.beyond > 1 else ""
            beyond = f", {found.below:.1f}x below the fitted budgets" if found.below > 1 else beyond
            ppl, low, high = (readable(value) for value in (found.perplexity, found.low, found.high))
            print(f"{self.tokens:.3g} tokens: perplexity {ppl} (90 %: {low} to {high}){beyond}")
            tokens: float | None = self.tokens
        else:
            needed = tokens_for(law, float(self.target_ppl or 0))
            print(needed)
            tokens = needed.tokens
        if tokens is not None and self.tokens_per_s is not None:
            hours = gpu_hours(tokens, self.tokens_per_s)
            print(f"{duration(hours)} at {self.tokens_per_s:,.0f} tokens/s")
            if self.price_per_hour is not None:
                print(f"cost: {hours * self.price_per_hour:,.2f}, at {self.price_per_hour:g} an hour")
        return 0 if tokens is not None else 1

    def law(self) -> Law:
        """Reads the law from the file, or fits one to the runs."""
        from castlm.planning.fit import fit_law
        from castlm.planning.law import Law
        from castlm.planning.points import read_points

        file = Path(self.runs[0])
        content = read_json(file) if len(self.runs) == 1 and file.suffix == ".json" else None
        if isinstance(content, dict) and "draws" in content:
            return Law.from_dict(content)
        return fit_law(read_points(self.runs, method=self.method), leave_largest_out=False)


def sweep(arguments: list[str]) -> int:
    from castlm.planning.sweep import SweepConfig, sweep

    config = parse(SweepConfig, arguments, "plan sweep")
    return sweep(config, command_line("plan sweep", config), to_stdout, to_stderr)


def predict(arguments: list[str]) -> int:
    return parse(PredictCommand, arguments, "plan predict").run()
