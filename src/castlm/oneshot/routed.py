"""The inputs of the experts of a transformer block: each reads the tokens that the router gives it.

With fewer tokens than input columns, the statistic of an expert is singular. Such an expert is calibrated on all tokens
of the text, as if each were routed to it. Its down-projection then has statistics of its own neurons, which statistics
of other experts could not replace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castlm.core.errors import InputError
from castlm.core.experts import ExpertLinear, expert_layers

Take = Callable[[str, int, Tensor], None]
"""`take(projection, expert, x)`: x (tokens, in) enters a projection of an expert."""


def experts_of(block: nn.Module, layers: dict[str, Any]) -> dict[nn.Module, dict[str, str]]:
    """The modules of experts in a block that own some of `layers`, each with its layers' names by projection."""
    name_of = {layer: name for name, layer in layers.items() if isinstance(layer, ExpertLinear)}
    found = {}
    for module in block.modules():
        own = {projection: name_of[layer] for projection, layer in expert_layers(module).items() if layer in name_of}
        if own:
            found[module] = own
    return found


class Routed:
    """Follows the tokens through a module of experts.

    Args:
        experts: a module as transformers' `use_experts_implementation` makes it: called with hidden states (tokens,
            hidden) and the chosen experts (tokens, top_k).
        wanted: the names of its layers that are pruned, by projection.

    Raises:
        InputError: experts of another construction.
    """

    def __init__(self, experts: nn.Module, wanted: dict[str, str]) -> None:
        layers = expert_layers(experts)
        gated = getattr(experts, "has_gate", None)
        self.up = "gate_up_proj" if gated else "up_proj"
        if not isinstance(gated, bool) or set(layers) != {self.up, "down_proj"}:
            raise InputError(
                f"the neurons of {type(experts).__name__} cannot be computed here: use magnitude without calibration, "
                "or leave its experts dense"
            )
        self.experts, self.wanted, self.gated = experts, wanted, gated
        self.has_bias = bool(getattr(experts, "has_bias", False))
        self.layers: dict[str, ExpertLinear] = layers
        self.num_tokens = [0] * layers[self.up].num_experts

    @property
    def few(self) -> list[int]:
        """The experts that have seen fewer tokens than the widest input of a wanted projection has columns."""
        least = max(self.layers[projection].in_features for projection in self.wanted)
        return [expert for expert, seen in enumerate(self.num_tokens) if seen < least]

    def see(self, args: tuple[Any, ...], kwargs: dict[str, Any], take: Take) -> None:
        """Passes each expert's routed tokens in a call of the module to `take`."""
        hidden, chosen = [*args, *kwargs.values()][:2]
        for expert in range(len(self.num_tokens)):
            tokens = hidden[(chosen == expert).any(dim=-1)]
            if len(tokens):
                self.num_tokens[expert] += len(tokens)
                self._give(expert, tokens, take)

    def see_all(self, args: tuple[Any, ...], kwargs: dict[str, Any], experts: list[int], take: Take) -> None:
        """Passes all tokens in a call of the module to `take`, for each of `experts`."""
        for expert in experts:
            self._give(expert, [*args, *kwargs.values()][0], take)

    def _give(self, expert: int, tokens: Tensor, take: Take) -> None:
        if self.up in self.wanted:
            take(self.up, expert, tokens)
        if "down_proj" in self.wanted:
            take("down_proj", expert, self.neurons(expert, tokens))

    def neurons(self, expert: int, x: Tensor) -> Tensor:
        """The input (tokens, inner) of the down-projection of an expert for x (tokens, hidden)."""
        experts: Any = self.experts
        bias = experts.get_parameter(f"{self.up}_bias")[expert] if self.has_bias else None
        out = F.linear(x, self.layers[self.up].weight[expert], bias)
        inner: Tensor = experts._apply_gate(out) if self.gated else experts.act_fn(out)
        return inner


def check_neurons(routed: Routed) -> None:
    """Checks on one expert that `Routed.neurons` agrees with the module itself.

    Raises:
        InputError: the results differ, so that down-projections would be calibrated on wrong inputs.
    """
    experts, up = routed.experts, routed.layers[routed.up]
    if getattr(experts, "has_post_expert_norm", False):
        return  # the norm applies to the output, which no projection reads
    like = up.weight
    x = torch.randn(1, up.in_features, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    one = torch.ones(1, 1, device=like.device)
    theirs = experts(x, torch.zeros_like(one, dtype=torch.long), one.to(like.dtype))
    bias = experts.get_parameter("down_proj_bias")[0] if routed.has_bias else None
    ours = F.linear(routed.neurons(0, x), routed.layers["down_proj"].weight[0], bias)
    if not torch.allclose(ours, theirs, rtol=0, atol=2e-2 * float(theirs.abs().max())):
        raise InputError(
            f"castlm does not know how {type(experts).__name__} computes its neurons: use magnitude without "
            "calibration, or leave its experts dense"
        )


def calibrated_on_all_note(few: Mapping[str, int]) -> str:
    """A line about experts that were calibrated on all tokens; `few` has their number by layer, at least 1."""
    of_block: dict[str, int] = {}
    for name, number in few.items():
        experts = name.rpartition(".")[0]
        of_block[experts] = max(number, of_block.get(experts, 0))
    return (
        f"{sum(of_block.values())} experts had fewer routed tokens than their input has columns, and were calibrated "
        "on all tokens: more calibration text gives them their own"
    )


def calibrated_on_all_record(few: Mapping[str, int]) -> dict[str, Any]:
    """The entry of castlm.json about experts that were calibrated on all tokens; empty if there are none."""
    return {"experts_calibrated_on_all_tokens": dict(few)} if few else {}
