"""The inputs of the experts of a transformer block: each reads the tokens that the router gives it.

The statistic of an expert that gets fewer tokens than its input has columns is singular. Such an expert is calibrated
on all tokens of the text, as if each were routed to it. The statistics of other experts could not replace its own: its
down-projection reads its own neurons.

`Routed` is for modules of experts as transformers' `use_experts_implementation` makes them, whose neurons are computed
from their arguments. DBRX, JetMoE, Llama 4 and LongCat call their experts in other ways, each in its own. `Watched`
finds their tokens in the products of a forward pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from castlm.core.errors import InputError
from castlm.core.experts import ExpertLinear, activate, expert_layers
from castlm.oneshot.layer_input import Accumulator, LayerInput
from castlm.world import World

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


class _Experts:
    """Follows the tokens through some experts, on all batches twice: as they are routed, then with `see_all`.

    Attributes:
        inputs: the inputs of the layers that are pruned.
        num_turns: the passes that a batch needs in this round.
    """

    num_turns = 1

    def __init__(self, inputs: Mapping[str, RoutedInputs], accumulator: Accumulator | None, num_sequences: int) -> None:
        self.inputs, self.accumulator, self.num_sequences = inputs, accumulator, num_sequences

    def hooked(self, turn: int, find: Find, count: Count) -> AbstractContextManager[Any]:
        """Sees inputs inside the context, which is one pass over a batch.

        Args:
            turn: the number of the pass over this batch.
            find: is called with the inputs of a layer that the pass has reached.
            count: is called with a number of layers for which the pass need not go on.
        """
        raise NotImplementedError

    def see_all(self, world: World) -> bool:
        """From now on, all tokens are seen by the experts that have seen too few; all ranks call it.

        Returns:
            Whether there are such experts. Their statistics are empty again.
        """
        raise NotImplementedError

    def share(self, world: World, device: torch.device) -> None:
        """Gives every rank an input of each expert that has got tokens on any rank; all ranks call it after a turn.

        Its sample is that of the first rank in the turn, which has the first of its tokens in the order of the text.
        """
        own = {
            layer: {expert: entry.sample.shape for expert, entry in seen.experts.items()}
            for layer, seen in self.inputs.items()
        }
        everywhere = world.gather(own, patient=True)
        for layer, seen in self.inputs.items():
            first: dict[int, tuple[int, torch.Size]] = {}
            for rank, of_rank in enumerate(everywhere):
                for expert, shape in of_rank[layer].items():
                    first.setdefault(expert, (rank, shape))
            for expert, (owner, shape) in sorted(first.items()):
                if expert not in seen.experts:
                    self._add(seen, expert, torch.zeros(shape, device=device))
                entry = seen.experts[expert]
                entry.fit_sample(shape)
                if owner:  # in the end, all ranks get the samples of rank 0
                    world.share_(entry.sample, owner)

    def _see(self, seen: RoutedInputs, expert: int, x: Tensor) -> None:
        """Adds x (tokens, in) to the statistic of an expert."""
        if expert not in seen.experts:
            self._add(seen, expert, x)
        seen.experts[expert].add(x, self.accumulator, self.num_sequences)

    def _add(self, seen: RoutedInputs, expert: int, x: Tensor) -> None:
        seen.experts[expert] = LayerInput(x, self.accumulator)
        seen.experts[expert].names.append(f"{seen.names[0]}.{expert}")


Find = Callable[[RoutedInputs], None]
Count = Callable[[int], None]


class Routed(_Experts):
    """Follows the tokens through a module of experts by its arguments.

    Args:
        experts: a module as transformers' `use_experts_implementation` makes it: called with hidden states (tokens,
            hidden) and the chosen experts (tokens, top_k).
        names: the names of its layers that are pruned, by projection.
        accumulator, num_sequences: as for `castlm.oneshot.inputs.see_inputs`; None collects nothing.

    Attributes:
        module: the module of experts.

    Raises:
        InputError: experts that compute their neurons otherwise than `_neurons`, so that down-projections would be
            calibrated on wrong inputs.
    """

    def __init__(
        self, experts: nn.Module, names: dict[str, str], accumulator: Accumulator | None, num_sequences: int
    ) -> None:
        inputs = {projection: RoutedInputs(name) for projection, name in names.items()}
        super().__init__(inputs, accumulator, num_sequences)
        self.layers, self.module = expert_layers(experts), experts
        self.up = "gate_up_proj" if experts.has_gate else "up_proj"
        self.has_bias = bool(getattr(experts, "has_bias", False))
        self.num_tokens = [0] * self.layers[self.up].num_experts
        self._seeing_all: list[int] | None = None  # the experts that see all tokens; None while each sees its own
        self._check_neurons()

    @staticmethod
    def can_follow(experts: nn.Module) -> bool:
        """Whether the layers of a module of experts are those that `_neurons` knows."""
        gated = getattr(experts, "has_gate", None)
        up = "gate_up_proj" if gated else "up_proj"
        return isinstance(gated, bool) and set(expert_layers(experts)) == {up, "down_proj"}

    def hooked(self, turn: int, find: Find, count: Count) -> AbstractContextManager[Any]:
        if turn:
            return nullcontext()

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for seen in self.inputs.values():
                find(seen)
            self._see_call(args, kwargs)
            count(len(self.inputs))

        return self.module.register_forward_pre_hook(before, with_kwargs=True)

    def _see_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
                self._see(seen, expert, tokens if projection == self.up else self._neurons(expert, tokens))

    def see_all(self, world: World) -> bool:
        # X^T X of fewer tokens than columns has no inverse: (2048, 2048) of 300 tokens has rank 300.
        least = max(self.layers[projection].in_features for projection in self.inputs)
        num_tokens = [sum(of_ranks) for of_ranks in zip(*world.gather(self.num_tokens, patient=True))]
        few = [expert for expert, number in enumerate(num_tokens) if number < least]
        for seen in self.inputs.values():
            seen.few = few
            seen.experts = {expert: entry for expert, entry in seen.experts.items() if expert not in few}
        self._seeing_all = few
        return bool(few)

    def _neurons(self, expert: int, x: Tensor) -> Tensor:
        """The input (tokens, inner) of the down-projection of an expert for x (tokens, hidden)."""
        bias = self.module.get_parameter(f"{self.up}_bias")[expert] if self.has_bias else None
        out = F.linear(x, self.layers[self.up].weight[expert], bias)
        return activate(self.module, out)

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


class Watched(_Experts):
    """Follows the tokens through experts of any construction by the products of a forward pass.

    The factors beside an expert's matrices are its tokens, however the module has sorted them:

        mm(x (5, 32), w1[3].T (32, 48))                  5 tokens of expert 3
        bmm(x (4, 64, 32), gate_up_proj (4, 32, 96))     64 rows for each of 4 experts, of which the others' are zeros

    For each expert that has seen too few tokens, every batch passes once more, while the expert's matrices stand in the
    places of all others. So all tokens reach it, each as often as it is routed.

    Args:
        layers: all layers of one module with experts, by name.
        names: the names of those that are pruned.
        accumulator, num_sequences: as for `castlm.oneshot.inputs.see_inputs`; None collects nothing.
    """

    def __init__(
        self, layers: Mapping[str, ExpertLinear], names: set[str], accumulator: Accumulator | None, num_sequences: int
    ) -> None:
        super().__init__({name: RoutedInputs(name) for name in layers if name in names}, accumulator, num_sequences)
        self.layers = layers
        self.num_tokens = {name: [0] * layers[name].num_experts for name in self.inputs}
        self._alone: list[int] | None = None  # the experts that see all tokens, one in each turn

    def hooked(self, turn: int, find: Find, count: Count) -> AbstractContextManager[Any]:
        if turn >= self.num_turns:
            return nullcontext()
        alone = None if self._alone is None else self._alone[turn]

        def see(name: str, first: int, x: Tensor) -> None:
            """Takes x (tokens, in) of the expert `first`, or x (experts, tokens, in) of those from `first` on."""
            seen = self.inputs.get(name)
            if seen is None:
                return
            find(seen)
            if self.accumulator is None or (alone is not None and alone not in seen.few):
                return
            for expert, rows in enumerate(x if x.dim() == 3 else x[None], first):
                tokens = rows[rows.any(dim=-1)] if x.dim() == 3 else rows
                if len(tokens) and alone is None:
                    self.num_tokens[name][expert] += len(tokens)
                if len(tokens):
                    self._see(seen, expert if alone is None else alone, tokens)

        return self._watching(_Products(see), alone)

    @contextmanager
    def _watching(self, products: _Products, alone: int | None) -> Iterator[None]:
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                if alone is not None and alone < layer.num_experts:
                    stack.enter_context(_in_all_places(layer, alone))
                show = layer.register_forward_hook(
                    lambda layer, _, shown, name=name: products.show(name, shown, layer.num_experts)
                )
                stack.enter_context(show)
            stack.enter_context(products)
            yield

    def see_all(self, world: World) -> bool:
        of_ranks = world.gather(self.num_tokens, patient=True)
        few: set[int] = set()
        for name, seen in self.inputs.items():
            numbers = enumerate(map(sum, zip(*(numbers[name] for numbers in of_ranks))))
            seen.few = [expert for expert, number in numbers if number < self.layers[name].in_features]
            seen.experts = {expert: entry for expert, entry in seen.experts.items() if expert not in seen.few}
            few.update(seen.few)
        self._alone = sorted(few)
        self.num_turns = len(few)
        return bool(few)


@contextmanager
def _in_all_places(layer: ExpertLinear, expert: int) -> Iterator[None]:
    """Puts the matrix of one expert in the places of all others."""
    weight = layer.weight.data
    layer.weight.data = weight[expert].expand_as(weight)
    try:
        yield
    finally:
        layer.weight.data = weight


class _Shown(NamedTuple):
    """A tensor that holds the matrices of some experts of a layer."""

    tensor: Tensor  # held, so that no new tensor can take its memory
    name: str
    first: int
    """The first of the experts."""
    num_elements: int
    """The elements of a matrix."""


class _Products(TorchDispatchMode):
    """Finds the products with matrices of experts.

    Args:
        see: is called with the name of the layer, the number of the first expert, and the other factor.
    """

    FACTORS = {"mm": 0, "bmm": 0, "linear": 0, "addmm": 1, "baddbmm": 1}  # noqa: RUF012
    """The place of x among the arguments of each product; the matrix follows it."""

    def __init__(self, see: Callable[[str, int, Tensor], None]) -> None:
        super().__init__()
        self._see = see
        self._shown: dict[int, _Shown] = {}

    def show(self, name: str, tensor: Tensor, num_experts: int) -> None:
        """Notes that `tensor` holds all matrices of a layer."""
        self._note(_Shown(tensor, name, 0, tensor.numel() // num_experts))

    def _note(self, shown: _Shown) -> None:
        self._shown[shown.tensor.untyped_storage().data_ptr()] = shown

    def _find(self, tensor: Any) -> tuple[_Shown, int] | None:
        """What a tensor is a part of, and its first expert."""
        shown = self._shown.get(tensor.untyped_storage().data_ptr()) if isinstance(tensor, Tensor) else None
        return None if shown is None else (shown, shown.first + tensor.storage_offset() // shown.num_elements)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operation: str = function.overloadpacket.__name__
        place = self.FACTORS.get(operation)
        if place is not None and (found := self._find(args[place + 1])) is not None:
            shown, expert = found
            x = args[place]
            self._see(shown.name, expert, x if operation == "bmm" or operation == "baddbmm" else x.flatten(0, -2))
        result = function(*args, **(kwargs or {}))
        if operation in ("_to_copy", "clone") and (found := self._find(args[0])) is not None:  # to bf16, of autocast
            shown, expert = found
            self._note(shown._replace(tensor=result, first=expert))
        return result


def routed_in(
    block: nn.Module, layers: Mapping[str, nn.Module], accumulator: Accumulator | None, num_sequences: int
) -> list[Routed | Watched]:
    """Follows the experts in a block that own some of `layers`, module by module."""
    name_of = {layer: name for name, layer in layers.items() if isinstance(layer, ExpertLinear)}
    found: list[Routed | Watched] = []
    others: dict[str, dict[str, ExpertLinear]] = defaultdict(dict)
    for path, module in block.named_modules():
        own = expert_layers(module)
        names = {projection: name_of[layer] for projection, layer in own.items() if layer in name_of}
        if names and Routed.can_follow(module):
            found.append(Routed(module, names, accumulator, num_sequences))
        elif own and not Routed.can_follow(module):
            # JetMoE has a module for each layer: the layers of one mixture of experts are in the module around.
            together = others[path.rpartition(".")[0]]
            together |= {name_of.get(layer, f"{path}.{projection}"): layer for projection, layer in own.items()}
    wanted = set(name_of.values())
    found += [Watched(own, wanted, accumulator, num_sequences) for own in others.values() if wanted & own.keys()]
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
