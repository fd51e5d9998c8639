"""How a model multiplies by its weights: the axis of each that is summed over, seen in a forward pass without values.

n:m groups run along the axis that a product sums over. Neither the name of a weight, nor its shape, nor the family of
the model tells which one that is: DBRX computes x @ w2 where others compute x @ w2.T. So the class of the model is
asked. It runs on tokens, and every operation of torch passes through a `TorchDispatchMode`, which follows the weights:

    w1 (4 * 96, 32)  -> view -> (4, 96, 32) -> select -> (96, 32) -> t -> (32, 96)      mm(x (8, 32), (32, 96))
       axes 0, 1                0, 0, 1                   0, 1            1, 0              sums over axis 1 of w1

Weights, and whatever is computed from them, have shapes and no values (the meta device), so that a model of any size
takes no memory and hardly any time. Everything else has values, because they decide which experts run and where. What
is not understood is not guessed: an operation that is not listed here leaves the use of its weights unknown.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from castlm.core.blocks import why_dense
from castlm.core.experts import ExpertLinear, Stack

_TOKENS = (8, 160)
"""The lengths of the sequences that pass through the model: the second only if the first does not reach all weights,
such as those of blocks of 128 tokens (DeepSeek-V4)."""

Labels = tuple[frozenset[tuple[str, int]], ...]
"""For each axis of a tensor, the axes of weights that run along it, by the weight's name."""


@dataclass
class Use:
    """How a model uses a weight."""

    summed: dict[int, set[int]] = field(default_factory=dict)
    """The axes, counted from the end as -1, over which products sum, with the number of terms of their sums."""
    others: set[str] = field(default_factory=set)
    """Operations that use it in another way, such as a look-up."""
    is_called: bool = True
    """Whether only the forward pass of the module that holds it multiplies by it, so that another module can do so."""
    chosen_of: set[int] = field(default_factory=set)
    """Of a 2-D weight that is read as several matrices, of which one is chosen at a time, their number."""
    reader: str = ""
    """The innermost module in whose forward pass all operations on it are."""

    @property
    def is_known(self) -> bool:
        """Whether all uses are understood: products over one axis, or none."""
        return len(self.summed) <= 1 and self.others <= _NO_PRODUCT and bool(self.summed or self.others)

    @property
    def axis(self) -> int | None:
        """The axis, counted from the end, that every product sums over; None without a product, or if not known."""
        return next(iter(self.summed)) if self.is_known and self.summed else None

    @property
    def width(self) -> int:
        """The greatest common divisor of the numbers of terms in the sums."""
        return math.gcd(*(terms for axis in self.summed.values() for terms in axis))

    def __str__(self) -> str:
        found = [f"a sum over axis {axis}" for axis in sorted(self.summed)] + sorted(self.others)
        return " and ".join(found) or "not used in a forward pass over text"


_NO_PRODUCT = {"a look-up", "multiplied element by element", "a depthwise convolution"}
"""Uses of a tensor that is no layer."""

# Operations by the name of their ATen function. Views of a contiguous tensor tell by their strides what became of its
# axes; a copy keeps them.
_VIEWS = {
    *("t", "transpose", "permute", "view", "_unsafe_view", "_reshape_alias", "expand", "unsqueeze", "squeeze"),
    *("select", "slice", "split", "split_with_sizes", "unbind", "alias", "detach", "diagonal", "unfold"),
}
_COPIES = {"clone", "_to_copy", "lift_fresh", "constant_pad_nd", "roll", "flip", "tril", "triu", "masked_fill"}
_REDUCTIONS = {"sum", "mean", "amax", "amin", "prod", "linalg_vector_norm", "norm", "_softmax", "var", "std"}
_LIKE = {f"new_{what}" for what in ("zeros", "ones", "full", "empty")} | {
    f"{what}_like" for what in ("zeros", "ones", "full", "empty")
}
"""Constants of the shape or type of a tensor, whose values they do not read."""
_PRODUCTS: dict[str, tuple[tuple[int, int], ...]] = {
    "mm": ((0, -1), (1, -2)),
    "bmm": ((0, -1), (1, -2)),
    "addmm": ((1, -1), (2, -2)),
    "baddbmm": ((1, -1), (2, -2)),
    "mv": ((0, -1), (1, -1)),
    "addmv": ((1, -1), (2, -1)),
    "dot": ((0, -1), (1, -1)),
    "linear": ((0, -1), (1, -1)),
    "_grouped_mm": ((0, -1), (1, -2)),
}
"""The arguments of each product, with the axis that it sums over."""


def plain_on_meta(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class and config as `model`, as the class makes it, on the meta device."""
    with unset_fake_temporarily(), torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


def stacks_of(model: PreTrainedModel) -> dict[str, Stack]:
    """The parameters inside the transformer blocks that hold the matrices of several experts, by name.

    Those whose module says so itself (`is_transposed`) are layers already, see `linearize_experts_`.
    """
    in_layers = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D, ExpertLinear)
    asked = {
        f"{fqn}.{name}"
        for fqn, module in model.named_modules()
        if not isinstance(module, in_layers) and why_dense(fqn) is None
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() in (2, 3)
    }
    if not asked:
        return {}
    plain = plain_on_meta(model)
    shapes = {name: parameter.shape for name, parameter in plain.named_parameters()}
    with unset_fake_temporarily():
        uses = uses_of(plain)
    stacks = {}
    for name in sorted(asked & uses.keys(), key=list(shapes).index):
        use, shape = uses[name], shapes[name]
        if use.axis not in (-1, -2):
            continue
        if len(shape) == 3 and use.width == shape[use.axis]:
            stacks[name] = Stack(shape[0], use.axis == -2, False, use.reader)
        elif len(shape) == 2 and len(use.chosen_of) == 1:
            num_experts = next(iter(use.chosen_of))
            rows, odd = divmod(shape[0], num_experts)
            if not odd and use.width == (rows if use.axis == -2 else shape[-1]):
                stacks[name] = Stack(num_experts, use.axis == -2, True, use.reader)
    return stacks


def uses_of(model: nn.Module) -> dict[str, Use]:
    """How a model uses each parameter with two axes or more, by name.

    A layer that no text reaches, such as a cross attention, is called by itself.

    Args:
        model: a causal language model of transformers on the meta device. It is used up: its buffers get values.
    """
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() >= 2}
    if isinstance(model, PreTrainedModel):
        model.set_experts_implementation("eager")  # others call kernels that take values
    _give_values_(model.eval())
    watch, failure = _Watch(weights), ""
    with torch.no_grad(), _calls_noted(model, watch):
        for num_tokens in _TOKENS:
            if not weights.keys() <= watch.uses.keys():
                tokens = torch.arange(1, num_tokens + 1, device="cpu")[None]
                watch.is_input[tokens] = True
                try:
                    with watch:
                        model(input_ids=tokens, use_cache=False)
                except Exception as error:  # of any type, as of a family that needs more than tokens, or values
                    failure = f"not reached, as a forward pass ended with {type(error).__name__}: {error}"[:300]
        for name, module in model.named_modules():
            if type(module) in (nn.Linear, Conv1D) and f"{name}.weight" not in watch.uses:
                width = module.get_parameter("weight").shape[-1 if type(module) is nn.Linear else 0]
                with watch:
                    module(torch.empty(1, width, device="meta"))
    unknown = {failure} if failure else set[str]()
    names = {module: name for name, module in model.named_modules()}
    for name, use in watch.uses.items():
        use.chosen_of |= watch.chosen_of.get(name, set())
        use.reader = names[watch.readers[name][-1]] if watch.readers.get(name) else ""
    return {name: watch.uses.get(name, Use(others=set(unknown))) for name in weights}


@contextlib.contextmanager
def _calls_noted(model: nn.Module, watch: _Watch) -> Iterator[None]:
    """Tells `watch` inside the context which modules are at work."""

    def begin(module: nn.Module, args: Any) -> None:
        watch.at_work.append(module)

    def end(module: nn.Module, args: Any, output: Any) -> None:
        if module in watch.at_work:
            watch.at_work.remove(module)

    hooks = []
    for name, module in model.named_modules():
        for leaf, _ in module.named_parameters(recurse=False):
            watch.owners[f"{name}.{leaf}".lstrip(".")] = module
        hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _give_values_(model: nn.Module) -> None:
    """Gives integer buffers of a model on the meta device values."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer is not None:
                setattr(module, name, _with_values(buffer))


class _Watch(TorchDispatchMode):
    """Runs each operation without the values of weights, and notes how it uses them."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.uses: dict[str, Use] = {}
        self.labels = WeakIdKeyDictionary()
        """The labels of weights, and of what is computed from weights alone."""
        self.is_input = WeakIdKeyDictionary()
        """Tensors that depend on the tokens. Other tensors without labels are constants."""
        self.at_work: list[nn.Module] = []
        self.owners: dict[str, nn.Module] = {}
        self.chosen_of: dict[str, set[int]] = {}
        self.readers: dict[str, list[nn.Module]] = {}
        """The modules at work in all operations on a weight itself, the outer ones first."""
        self.names = WeakIdKeyDictionary()
        self.dims = {name: weight.dim() for name, weight in weights.items()}
        for name, weight in weights.items():
            self.names[weight] = name
            self.labels[weight] = tuple(frozenset([(name, axis)]) for axis in range(weight.dim()))

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name: str = function.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        labelled = [tensor for tensor in tensors if tensor in self.labels]
        depends = any(tensor in self.is_input for tensor in tensors)
        for tensor in labelled:
            if tensor in self.names:
                self._note_reader(self.names[tensor])
        result = _run(function, name, args, kwargs, tensors)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        after: list[Labels] | None = None
        if labelled and name in _PRODUCTS:
            self._note_sums(name, args)
        elif labelled and name not in _LIKE:
            # Of all experts (8, 96, 32), those of each token may be taken before they are multiplied by.
            takes_experts = name in ("index", "index_select") and args[0] in self.labels and args[0].dim() == 3
            if not depends or takes_experts:
                after = self._followed(function, name, args, kwargs, labelled, outputs)
            if after is None:
                self._note_other(function, name, args, labelled)
        for number, output in enumerate(outputs):
            if after is not None:
                self.labels[output] = after[number]
            elif depends:
                self.is_input[output] = True
        return result

    def _note_reader(self, weight: str) -> None:
        before = self.readers.get(weight, self.at_work)
        both = [module for module, other in zip(before, self.at_work) if module is other]
        self.readers[weight] = both

    def _note_sums(self, name: str, args: Sequence[Any]) -> None:
        for argument, axis in _PRODUCTS[name]:
            tensor = args[argument]
            for weight, summed in self.labels[tensor][axis] if tensor in self.labels else ():
                use = self._use(weight)
                use.summed.setdefault(summed - self.dims[weight], set()).add(tensor.shape[axis])
                use.is_called &= self.owners[weight] in self.at_work

    def _note_other(self, function: Any, name: str, args: Sequence[Any], labelled: Sequence[Tensor]) -> None:
        what = name
        if name == "convolution":  # its weight is (out, in / groups, width)
            what = "a depthwise convolution" if args[1].shape[1] == 1 else "a convolution"
        elif name in ("embedding", "index", "index_select", "gather"):
            what = "a look-up"
        elif torch.Tag.pointwise in function.tags:
            what = "multiplied element by element"
        for tensor in labelled:
            for weight in {weight for axis in self.labels[tensor] for weight, _ in axis}:
                self._use(weight).others.add(what)

    def _use(self, weight: str) -> Use:
        return self.uses.setdefault(weight, Use())

    def _followed(
        self,
        function: Any,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        labelled: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> list[Labels] | None:
        """The labels of what an operation makes of weights and constants; None for one that is not understood."""
        first, none = self.labels[labelled[0]], frozenset[tuple[str, int]]()
        if name == "select" and labelled[0].dim() == 3 and args[1] == 0:
            for weight, axis in first[0]:
                if self.dims[weight] == 2 and axis == 0:
                    self.chosen_of.setdefault(weight, set()).add(labelled[0].shape[0])
        if name in _VIEWS:
            return _through_view(function, labelled[0], args, kwargs, first)
        if name in _COPIES:
            return [first]
        if name in _REDUCTIONS and len(outputs) == 1 and outputs[0].dim() == len(first):
            return [tuple(axis if size > 1 else none for axis, size in zip(first, outputs[0].shape))]
        if name == "cat" and len(labelled) == len(args[0]):
            return [tuple(none.union(*axes) for axes in zip(*(self.labels[tensor] for tensor in labelled)))]
        if name == "stack" and len(labelled) == len(args[0]):
            axes = [none.union(*of) for of in zip(*(self.labels[tensor] for tensor in labelled))]
            axes.insert((args[1] if len(args) > 1 else 0) % outputs[0].dim(), none)
            return [tuple(axes)]
        if name == "index_select" and args[0] is labelled[0]:
            return [tuple(none if axis == args[1] % len(first) else of for axis, of in enumerate(first))]
        if name == "index" and args[0] is labelled[0] and args[1][0] is not None and len(args[1]) == 1:
            return [(*[none] * (outputs[0].dim() - len(first) + 1), *first[1:])]
        if torch.Tag.pointwise in function.tags:  # as a weight times a scale that is made of it
            axes = [none] * outputs[0].dim()
            for tensor in labelled:
                for axis in range(-tensor.dim(), 0):
                    axes[axis] |= self.labels[tensor][axis] if tensor.shape[axis] > 1 else none
            return [tuple(axes)]
        return None


def _through_view(
    function: Any, tensor: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any], labels: Labels
) -> list[Labels]:
    """The labels of views, by what the same view of a contiguous tensor does to its strides."""
    probe = torch.empty(tensor.shape, device="meta")
    views = function(probe, *args[1:], **kwargs)

    def labels_of(view: Tensor) -> Labels:
        of_view = []
        for size, stride in zip(view.shape, view.stride()):
            inside = frozenset[tuple[str, int]]()
            for of_axis, length, step in zip(labels, probe.shape, probe.stride()):
                # The axis of the view runs over offsets from `stride` on to `stride * size`; the tensor's, likewise.
                if min(size, length) > 1 and stride and step < stride * size and stride < step * length:
                    inside |= of_axis
            of_view.append(inside)
        return tuple(of_view)

    return [labels_of(view) for view in views] if isinstance(views, list | tuple) else [labels_of(views)]


# ---- operations without the values of weights


def _run(function: Any, name: str, args: Any, kwargs: dict[str, Any], tensors: Sequence[Tensor]) -> Any:
    """The result of an operation: with values, on the CPU, unless one of its tensors has none, on the meta device.

    Integers and booleans that depend on such a tensor get values that any other would do for: choices are the first
    ones, in order, comparisons are true, and other integers are zeros.
    """
    has_values = not any(tensor.is_meta for tensor in tensors)
    if kwargs.get("device") is not None or not tensors:  # a factory, such as torch.zeros, takes torch's default device
        kwargs["device"] = torch.device("cpu" if has_values else "meta")
    if has_values:
        return function(*args, **kwargs)
    if name == "_local_scalar_dense":
        return 1.0
    if name == "equal":
        return True
    if name == "nonzero":
        return torch.ones(args[0].shape, dtype=torch.bool, device="cpu").nonzero()
    if name == "masked_select":
        chosen = args[1].expand(torch.broadcast_shapes(args[0].shape, args[1].shape))
        return torch.empty(int(chosen.sum()), dtype=args[0].dtype, device="meta")
    if name == "_grouped_mm":
        return torch.empty(*args[0].shape[:-1], args[1].shape[-1], dtype=args[0].dtype, device="meta")
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        args = (args[0], _positions(args[1]), *args[2:])
    on_meta = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, (args, kwargs))
    result = function(*on_meta[0], **on_meta[1])
    if name.endswith("_") and isinstance(args[0], Tensor):  # in place
        return args[0]
    if name in ("topk", "sort", "argsort") and isinstance(result, tuple | list | Tensor):
        axis = args[2] if name == "topk" and len(args) > 2 else kwargs.get("dim", -1)
        return tree_map(lambda leaf: _with_values(leaf, axis), result)
    return tree_map(_with_values, result)


def _with_values(leaf: Any, axis: int | None = None) -> Any:
    """An integer or boolean tensor with values: true, or zeros; along `axis` 0, 1, 2, ..."""
    if not isinstance(leaf, Tensor) or not leaf.is_meta or leaf.is_floating_point() or leaf.is_complex():
        return leaf
    if leaf.dtype == torch.bool:
        return torch.ones(leaf.shape, dtype=torch.bool, device="cpu")
    values = torch.zeros(leaf.shape, dtype=leaf.dtype, device="cpu")
    if axis is not None and leaf.dim():
        size = leaf.shape[axis]
        values.movedim(axis, -1).copy_(torch.arange(size, device="cpu"))
    return values


def _positions(indices: Sequence[Any]) -> list[Any]:
    """Indices of a tensor with the positions of True in place of each mask, which the meta device cannot find."""
    found: list[Any] = []
    for index in indices:
        is_mask = isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
        found += list(index.nonzero().unbind(1)) if is_mask else [index]
    return found
