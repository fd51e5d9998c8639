"""The inputs of the experts of a transformer block: each reads the tokens that the router gives it.

The statistic of an expert that gets fewer tokens than its input has columns is singular. Such an expert is calibrated
on all tokens of the text, as if each were routed to it. The statistics of other experts could not replace its own: its
down-projection reads its own neurons.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castlm.core.errors import InputError
from castlm.core.experts import ExpertLinear, expert_layers
from castlm.oneshot.layer_input import Accumulator, LayerInput
from castlm.oneshot.ranks import Ranks

_REMEDY = "use magnitude without calibration, or leave its experts dense"


class RoutedInputs:
    """The inputs of one projection of a block's experts, each as a `LayerInput`.

    Attributes:
        names: the name of the layer.
        experts: inputs by the number of the expert; their `names` are the layer's name and that number.
        few: the experts with too few routed tokens, which have seen all tokens instead.
    """

    def __init__(self, name: str) -> None:
        self.names = [name]
        self.experts: dict[int, LayerInput] = {}
        self.few: list[int] = []

    @property
    def num_few(self) -> int:
        return len(self.few)

    def entries(self) -> list[LayerInput]:
        """The inputs that have a statistic of their own: one for each expert, in order."""
        return [entry for _, entry in sorted(self.experts.items())]


Seen = list[LayerInput | RoutedInputs]
"""The inputs of some layers of a block, in the order of the calls."""


class Routed:
    """Follows the tokens through a module of experts, on all batches twice: as they are routed, then with `see_all`.

    Args:
        experts: a module as transformers' `use_experts_implementation` makes it: called with hidden states (tokens,
            hidden) and the chosen experts (tokens, top_k).
        names: the names of its layers that are pruned, by projection.
        accumulator, num_sequences: as for `castlm.oneshot.inputs.see_inputs`; None collects nothing.

    Attributes:
        module: the module of experts.
        inputs: the inputs of these layers, by projection.

    Raises:
        InputError: experts of another construction, or that compute their neurons otherwise than `_neurons`, so that
            down-projections would be calibrated on wrong inputs.
    """

    def __init__(
        self, experts: nn.Module, names: dict[str, str], accumulator: Accumulator | None, num_sequences: int
    ) -> None:
        self.layers = expert_layers(experts)
        gated = getattr(experts, "has_gate", None)
        self.up = "gate_up_proj" if gated else "up_proj"
        if not isinstance(gated, bool) or set(self.layers) != {self.up, "down_proj"}:
            raise InputError(f"the neurons of {type(experts).__name__} cannot be computed here: {_REMEDY}")
        self.module, self.gated = experts, gated
        self.accumulator, self.num_sequences = accumulator, num_sequences
        self.has_bias = bool(getattr(experts, "has_bias", False))
        self.inputs = {projection: RoutedInputs(name) for projection, name in names.items()}
        self.num_tokens = [0] * self.layers[self.up].num_experts
        self._seeing_all: list[int] | None = None  # the experts that see all tokens; None while each sees its own
        self._check_neurons()

    def see(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Adds the tokens in a call of the module to the statistics of its experts."""
        if self.accumulator is None:
            return
        hidden, chosen, *_ = (*args, *kwargs.values())  # hidden states, experts of each token, their weights
        experts = range(len(self.num_tokens)) if self._seeing_all is None else self._seeing_all
        for expert in experts:
            tokens = hidden
            if self._seeing_all is None:
                tokens = hidden[(chosen == expert).any(dim=-1)]  # (tokens, top_k) -> (tokens,) -> this expert's tokens
            if not len(tokens):
                continue
            self.num_tokens[expert] += len(tokens)
            for projection, seen in self.inputs.items():
                x = tokens if projection == self.up else self._neurons(expert, tokens)
                if expert not in seen.experts:
                    self._add(seen, expert, x)
                seen.experts[expert].add(x, self.accumulator, self.num_sequences)

    def share(self, ranks: Ranks, device: torch.device) -> None:
        """Gives every rank an input of each expert that has got tokens on any rank; all ranks call it after a turn.

        Its sample is that of the first rank in the turn, which has the first of its tokens in the order of the text.
        """
        own = {
            projection: {expert: entry.sample.shape for expert, entry in seen.experts.items()}
            for projection, seen in self.inputs.items()
        }
        everywhere = ranks.gather(own, patient=True)
        for projection, seen in self.inputs.items():
            first: dict[int, tuple[int, torch.Size]] = {}
            for rank, of_rank in enumerate(everywhere):
                for expert, shape in of_rank[projection].items():
                    first.setdefault(expert, (rank, shape))
            for expert, (owner, shape) in sorted(first.items()):
                if expert not in seen.experts:
                    self._add(seen, expert, torch.zeros(shape, device=device))
                entry = seen.experts[expert]
                entry.fit_sample(shape)
                if owner:  # in the end, all ranks get the samples of rank 0
                    ranks.share_(entry.sample, owner)

    def _add(self, seen: RoutedInputs, expert: int, x: Tensor) -> None:
        seen.experts[expert] = LayerInput(x, self.accumulator)
        seen.experts[expert].names.append(f"{seen.names[0]}.{expert}")

    def see_all(self, ranks: Ranks) -> bool:
        """From now on, all tokens are seen by the experts that have seen fewer than their widest input has columns.

        Returns:
            Whether there are such experts. Their statistics are empty again.
        """
        # X^T X of fewer tokens than columns has no inverse: (2048, 2048) of 300 tokens has rank 300.
        least = max(self.layers[projection].in_features for projection in self.inputs)
        num_tokens = [sum(of_ranks) for of_ranks in zip(*ranks.gather(self.num_tokens, patient=True))]
        few = [expert for expert, number in enumerate(num_tokens) if number < least]
        for seen in self.inputs.values():
            seen.few = few
            seen.experts = {expert: entry for expert, entry in seen.experts.items() if expert not in few}
        self._seeing_all = few
        return bool(few)

    def _neurons(self, expert: int, x: Tensor) -> Tensor:
        """The input (tokens, inner) of the down-projection of an expert for x (tokens, hidden)."""
        experts: Any = self.module
        bias = experts.get_parameter(f"{self.up}_bias")[expert] if self.has_bias else None
        out = F.linear(x, self.layers[self.up].weight[expert], bias)
        inner: Tensor = experts._apply_gate(out) if self.gated else experts.act_fn(out)
        return inner

    def _check_neurons(self) -> None:
        """Compares the output of one expert, computed with `_neurons`, with the module's own."""
        experts = self.module
        like = self.layers[self.up].weight
        if getattr(experts, "has_post_expert_norm", False):
            return  # the norm applies to the output, which no projection reads
        x = torch.randn(1, like.shape[-1], generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
        one = torch.ones(1, 1, device=like.device)
        theirs = experts(x, torch.zeros_like(one, dtype=torch.long), one.to(like.dtype))
        bias = experts.get_parameter("down_proj_bias")[0] if self.has_bias else None
        ours = F.linear(self._neurons(0, x), self.layers["down_proj"].weight[0], bias)
        # An activation that this file does not know, such as a clamp, shows in one token. The tolerance is bf16's.
        if not torch.allclose(ours, theirs, rtol=0, atol=2e-2 * float(theirs.abs().max())):
            raise InputError(f"castlm does not know how {type(experts).__name__} computes its neurons: {_REMEDY}")


def routed_in(
    block: nn.Module, layers: Mapping[str, nn.Module], accumulator: Accumulator | None, num_sequences: int
) -> list[Routed]:
    """The modules of experts in a block that own some of `layers`; see `Routed`."""
    name_of = {layer: name for name, layer in layers.items() if isinstance(layer, ExpertLinear)}
    found = []
    for module in block.modules():
        own = {projection: name_of[layer] for projection, layer in expert_layers(module).items() if layer in name_of}
        if own:
            found.append(Routed(module, own, accumulator, num_sequences))
    return found


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
