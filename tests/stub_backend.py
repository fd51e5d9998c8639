"""A backend for `to_semi_structured_` that needs no GPU: its sparse layer is a dense one with another type and name."""

import copy

from torch import nn


class StubLinear(nn.Linear):
    """The layer that the stub converts to."""


class FailingLinear(StubLinear):
    """A variant that a library offers and cannot run."""

    def forward(self, x):
        raise RuntimeError("CUSPARSE_STATUS_NOT_SUPPORTED\nat the call")


class StubBackend:
    """Takes the seconds of each contestant from a function of its name and shape.

    Args:
        seconds: `seconds(variant, (out_features, in_features), tokens)`.
        refuse: reason by shape, for layers that cannot be converted.
        wrong: whether the converted layers compute something else.
        failing: a variant that raises when it runs, or "search": the list of variants raises.
    """

    def __init__(self, seconds, refuse=None, wrong=False, variants=("2:4 a", "2:4 b"), failing=None):
        self.failing = failing
        self.seconds, self.refuse, self.wrong = seconds, refuse or {}, wrong
        self.names, self.races = list(variants), []

    def why_not(self, layer):
        return self.refuse.get(tuple(layer.weight.shape))

    def variants(self, layer, x):
        if self.failing == "search":
            raise RuntimeError("CUSPARSE_STATUS_NOT_SUPPORTED\nin the search")
        return self.names

    def convert(self, layer, variant):
        kind = FailingLinear if variant == self.failing else StubLinear
        made = kind(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=layer.weight.dtype)
        made.load_state_dict(copy.deepcopy(layer.state_dict()))
        made.variant = variant
        if self.wrong:
            made.weight.data.neg_()
        return made

    def race(self, modules, x):
        shape = tuple(modules["dense"].weight.shape)
        self.races.append((shape, len(x)))
        return {name: self.seconds(name, shape, len(x)) for name in modules}
