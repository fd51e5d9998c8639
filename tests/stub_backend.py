"""A backend for `to_semi_structured_` that needs no GPU: its sparse layer is a dense one with another type and name."""

import copy

from torch import nn


class StubLinear(nn.Linear):
    """The layer that the stub converts to."""


class FailingLinear(StubLinear):
    """A layer that a library converts and cannot run."""

    def forward(self, x):
        raise RuntimeError("CUSPARSE_STATUS_NOT_SUPPORTED\nat the call")


class StubBackend:
    """Takes the seconds of each variant from a function of its name and shape.

    Args:
        seconds: `seconds(variant, (out_features, in_features), tokens)`.
        refuse: reason by shape, for layers that cannot be converted.
        wrong: whether the converted layers compute something else.
        failing: "run" or "search": where the library raises.
    """

    def __init__(self, seconds, refuse=None, wrong=False, failing=None):
        self.failing = failing
        self.seconds, self.refuse, self.wrong = seconds, refuse or {}, wrong
        self.races = []

    def why_not(self, layer):
        return self.refuse.get(tuple(layer.weight.shape))

    def convert(self, layer, x):
        if self.failing == "search":
            raise RuntimeError("CUSPARSE_STATUS_NOT_SUPPORTED\nin the search")
        kind = FailingLinear if self.failing == "run" else StubLinear
        made = kind(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=layer.weight.dtype)
        made.load_state_dict(copy.deepcopy(layer.state_dict()))
        if self.wrong:
            made.weight.data.neg_()
        return made

    def race(self, modules, x):
        shape = tuple(modules["dense"].weight.shape)
        self.races.append((shape, len(x)))
        return {name: self.seconds(name, shape, len(x)) for name in modules}
