"""Names of other libraries that begin with "_": each use stands in one table, with what to do when it breaks.

Such a name may go in any release. A search through the sources finds those that the table lacks, so that a new use is a
decision and not an accident.
"""

import ast
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import LlamaConfig

ROOT = Path(__file__).parent.parent
SOURCES = (ROOT / "src", ROOT / "runtime" / "src")


class Hook(NamedTuple):
    """A private name: who has it, and what to do in the release of the library that drops it."""

    owner: str | Callable[[], Any]
    """The path of the module or class, or a function that makes an object."""
    when_gone: str


OF_MODELS = "transformers.PreTrainedModel"
OF_QUANTIZERS = "transformers.quantizers.base.HfQuantizer"
CODE_OF_THE_HUB = "read where the config then keeps it: else a config.json runs the attention that it names"
IN_THE_DISPATCHER = "call the operator always: 2 us more for each packed layer"
FOREACH = Hook("torch", "loop over the tensors: the same bits, a launch for each tensor on a GPU")

HOOKS = {
    "_adjust_missing_and_unexpected_keys": Hook(
        OF_MODELS,
        "ask `from_pretrained(output_loading_info=True)` for missing weights; a caller of AutoModel gets none",
    ),
    "_apply_gate": Hook(
        "transformers.models.mixtral.modeling_mixtral.MixtralExperts",
        "write the gate of each family of experts into core/experts.py, `activate`",
    ),
    "_attn_implementation": Hook(
        LlamaConfig, "read the entry of what transformers then has for `set_attn_implementation`"
    ),
    "_attn_implementation_internal": Hook(LlamaConfig, CODE_OF_THE_HUB),
    "_auto_class": Hook(OF_MODELS, "save a model with code of its own by `save_pretrained`"),
    "_C": Hook("torch", IN_THE_DISPATCHER),
    "_compiled_call_impl": Hook("torch.nn.Module", "evaluate under `torch.compiler.set_stance('force_eager')`"),
    "_cslt_compress": Hook("torch", "let `to_sparse_semi_structured` choose, without a search"),
    "_cslt_sparse_mm_search": Hook("torch", "let `to_sparse_semi_structured` choose, without a search"),
    "_DTYPE_SHAPE_CONSTRAINTS": Hook(
        "torch.sparse.SparseSemiStructuredTensorCUSPARSELT", "convert a layer of each shape, and catch the error"
    ),
    "_experts_implementation_internal": Hook(LlamaConfig, CODE_OF_THE_HUB),
    "_foreach_add_": FOREACH,
    "_foreach_copy_": FOREACH,
    "_foreach_mul_": FOREACH,
    "_foreach_norm": FOREACH,
    "_fsdp_api": Hook(
        "torch.distributed.fsdp._fully_shard", "derive from nothing: FSDP only calls `allocate` and `__call__`"
    ),
    "_fully_shard": Hook("torch.distributed.fsdp", "as `_fsdp_api`"),
    "_functorch": Hook("torch._C", IN_THE_DISPATCHER),
    "_get_resolved_checkpoint_files": Hook(
        "transformers.modeling_utils", "choose the files as docs/reference says, by index, then by single file"
    ),
    "_get_tracing_state": Hook("torch._C", IN_THE_DISPATCHER),
    "_keys_to_ignore_on_load_unexpected": Hook(OF_MODELS, "filter transformers' warning of unexpected tensors"),
    "_keys_to_ignore_on_save": Hook(OF_MODELS, "write all tensors of the state dict"),
    "_len_torch_dispatch_stack": Hook("torch._C", IN_THE_DISPATCHER),
    "_load_pretrained_model": Hook(OF_MODELS, "load a folder that holds links to the counted files alone"),
    "_process_model_after_weight_loading": Hook(OF_QUANTIZERS, "what a quantizer of transformers then overrides"),
    "_process_model_before_weight_loading": Hook(OF_QUANTIZERS, "what a quantizer of transformers then overrides"),
    "_python_dispatch": Hook("torch.utils", "the public place of TorchDispatchMode"),
    "_pytree": Hook("torch.utils", "the package optree, or loops over arguments and results"),
    "_subclasses": Hook("torch", "the public place of FakeTensorMode; plan memory counts with it"),
    "_supports_sdpa": Hook(OF_MODELS, "build the model without a wish, and read what it attends by"),
    "_tied_weights_keys": Hook(OF_MODELS, "give the packed head a module of its own class, which `tie_weights` leaves"),
}
"""Beside these, training/attention.py reads with `inspect.getsource` which families ask for the name "sdpa"; they would
have to be listed."""


def resolve(owner: str | Callable[[], Any]) -> Any:
    """A module, what a module holds, or what a function returns."""
    if not isinstance(owner, str):
        return owner()
    try:
        return import_module(owner)
    except ModuleNotFoundError:
        module, _, name = owner.rpartition(".")
        return getattr(import_module(module), name)


def has(owner: str | Callable[[], Any], name: str) -> bool:
    if hasattr(resolve(owner), name):
        return True
    try:
        resolve(f"{owner}.{name}")  # a module that nothing has imported yet
    except (AttributeError, ImportError):
        return False
    return True


@pytest.mark.parametrize("name", HOOKS)
def test_the_installed_libraries_have_every_private_name(name):
    hook = HOOKS[name]
    assert has(hook.owner, name), f"{hook.owner} has no {name} any more: {hook.when_gone}"


@pytest.mark.parametrize("owner", ["torch", "transformers.PreTrainedModel", LlamaConfig])
def test_a_name_that_is_gone_is_noticed(owner):
    assert not has(owner, "_gone")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


NAMED_TUPLES = {"_asdict", "_fields", "_replace"}  # documented, whatever they begin with
STRUCTURES = {"_fields_"}  # of ctypes, as documented


class Sources:
    """The private names that some sources use and none of their classes defines."""

    def __init__(self, sources: dict[str, str]) -> None:
        self.trees = {place: ast.parse(source) for place, source in sources.items()}
        self.bases: dict[str, set[str]] = defaultdict(set)
        self.members: dict[str, set[str]] = defaultdict(set)
        self.in_file: dict[str, set[str]] = defaultdict(set)
        self.used: set[str] = set()
        for place, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    self.bases[node.name] |= {last_name(base) for base in node.bases}
                    self.members[node.name] |= members_of(node)
                    self.in_file[place] |= members_of(node)
                elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    self.used.add(node.attr)
                elif isinstance(node, ast.Call) and last_name(node.func) == "call_method":  # of Jinja
                    self.used |= set(strings_of(node.args[0]))

    def members_with_bases(self, name: str) -> set[str]:
        seen, ahead = set[str](), {name}
        while ahead:
            seen |= ahead
            ahead = set().union(*(self.bases.get(each, set()) for each in ahead)) - seen
        return set().union(*(self.members.get(each, set()) for each in seen))

    def foreign(self) -> Iterator[tuple[str, str]]:
        """The name and the place of each use."""
        for place, tree in self.trees.items():
            yield from self._below(tree, place, set())

    def _below(self, node: ast.AST, place: str, of_self: set[str]) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.ClassDef):
            of_self = self.members_with_bases(node.name)
            for child in node.body:  # a method that no source calls is called by the base class of a library
                if isinstance(child, ast.FunctionDef) and is_private(child.name) and child.name not in self.used:
                    yield child.name, f"{place}:{child.lineno}"
        for name in names_in(node):
            is_self = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
            ours = of_self if is_self else self.in_file[place] | of_self
            if is_private(name) and name not in ours | NAMED_TUPLES | STRUCTURES:
                yield name, f"{place}:{getattr(node, 'lineno', 0)}"
        for child in ast.iter_child_nodes(node):
            yield from self._below(child, place, of_self)


def last_name(node: ast.expr) -> str:
    return ast.unparse(node).partition("[")[0].rpartition(".")[2]


def members_of(definition: ast.ClassDef) -> set[str]:
    """The methods of a class, the names assigned in its body and those assigned to `self`."""
    names = {node.name for node in definition.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    for node in definition.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    for node in ast.walk(definition):
        is_stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if is_stored and isinstance(node.value, ast.Name) and node.value.id == "self":
            names.add(node.attr)
    return names


def names_in(node: ast.AST) -> list[str]:
    """The names by which a node reaches into an object or a module, strings among them."""
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.ImportFrom):
        of_ours = (node.module or "").startswith("castlm")
        return [] if of_ours else [*(node.module or "").split("."), *(alias.name for alias in node.names)]
    if isinstance(node, ast.Import):
        return [part for alias in node.names for part in alias.name.split(".")]
    if isinstance(node, ast.Call):
        keywords = [each.arg for each in node.keywords if each.arg]
        by_name = last_name(node.func) in ("getattr", "hasattr", "setattr", "delattr") and len(node.args) > 1
        return keywords + (strings_of(node.args[1]) if by_name else [])
    if isinstance(node, ast.For) and isinstance(node.iter, (ast.Tuple, ast.List)):  # of names for getattr
        return [name for each in node.iter.elts for name in strings_of(each)]
    if isinstance(node, ast.Subscript):
        return strings_of(node.slice) if last_name(node.value) == "__dict__" else []
    return []


def strings_of(node: ast.AST) -> list[str]:
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def uses() -> dict[str, list[str]]:
    files = sorted(path for folder in SOURCES for path in folder.rglob("*.py"))
    sources = Sources({str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files})
    places = defaultdict(list)
    for name, place in sources.foreign():
        places[name].append(place)
    return dict(places)


def test_every_private_name_of_a_library_stands_in_the_table():
    assert {name: places for name, places in uses().items() if name not in HOOKS} == {}


def test_the_table_has_no_name_that_nothing_uses():
    assert set(HOOKS) <= set(uses())


@pytest.mark.parametrize(
    "source",
    [
        "model._hidden",
        "from torch._hidden import x",
        "import torch._hidden",
        "from torch import _hidden",
        "getattr(model, '_hidden')",
        "model.__dict__['_hidden'] = 1",
        "for name in ('_hidden', 'shown'): getattr(model, name)",
        "f(_hidden=True)",
        "class A(nn.Module):\n    def _hidden(self): ...",
        "class A(nn.Module):\n    def f(self): return self._hidden",
    ],
)
def test_the_search_finds_a_private_name(source):
    elsewhere = "class Other:\n    def __init__(self):\n        self._hidden = 1"
    assert [name for name, _ in Sources({"a.py": source, "b.py": elsewhere}).foreign()] == ["_hidden"]


def test_the_search_leaves_names_of_ours():
    base = "class Base:\n    def __init__(self):\n        self._own = 1"
    derived = "from castlm.base import _x\nclass A(Base):\n    def f(self): return self._own, self.pair._replace(a=1)"
    assert list(Sources({"a.py": base, "b.py": derived}).foreign()) == []
