"""A GPU that is not there: tensors that say they are on cuda:0, with their values in host memory.

Inside `pretend_gpu` torch reports a GPU. A tensor that is moved there becomes a `PretendTensor`, as does whatever is
computed from one. An operation on tensors of both devices raises the error that CUDA raises, and NumPy refuses a tensor
of the GPU. Kernels, dtypes and streams of a real GPU are not imitated. In a backward pass the pretence is off.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from castlm.oneshot import sparsegpt

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
_TAKES_BOTH = {"__getitem__", "__setitem__", "__set__", "copy_", "_foreach_copy_"}
"""Operations that CUDA allows on tensors of two devices."""


class PretendTensor(Tensor):
    """A tensor that says it is on cuda:0."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def on_gpu(tensor: Tensor) -> Tensor:
    return tensor if isinstance(tensor, PretendTensor) else tensor.as_subclass(PretendTensor)


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor) if isinstance(tensor, PretendTensor) else tensor


def _is_gpu(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


class _Mode(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            first = args[0] if args else None
            own = _OF_TENSOR.get(function) if isinstance(first, Tensor) else None
            return own(*args, **(kwargs or {})) if own is not None else _run(function, args, dict(kwargs or {}))


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    is_on_gpu = any(isinstance(tensor, PretendTensor) for tensor in inputs)
    name = getattr(function, "__name__", "")
    others = [t for t in inputs if t.dim() and not t.is_meta and not isinstance(t, PretendTensor)]
    if is_on_gpu and others and name not in _TAKES_BOTH and torch._C._current_graph_task_id() == -1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device: {name} of cuda:0 and {others[0].shape} of cpu"
        )
    device = kwargs.get("device")
    if _is_gpu(device):
        kwargs["device"] = "cpu"
    kwargs.pop("pin_memory", None)
    wide = kwargs.pop("out_dtype", None)  # a product of narrow matrices, which a CPU's `mm` does not widen
    result = function(*(args if wide is None else [tensor.to(wide) for tensor in args]), **kwargs)
    if not (_is_gpu(device) or (is_on_gpu and device is None)):
        return result
    known = {id(tensor) for tensor in inputs}
    return tree_map_only(Tensor, lambda t: t if id(t) in known or t.is_meta else on_gpu(t), result)


def _device(tensor: Tensor) -> torch.device:
    return GPU if isinstance(tensor, PretendTensor) else _REAL_DEVICE(tensor)


def _grad(tensor: Tensor) -> Tensor | None:
    found = _REAL_GRAD(tensor)
    return on_gpu(found) if found is not None and isinstance(tensor, PretendTensor) else found


def _numpy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if isinstance(tensor, PretendTensor):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first")
    return _REAL_NUMPY(tensor, *args, **kwargs)


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to` without the pretended device."""
    asked = [a for a in (*args, *kwargs.values()) if isinstance(a, str | torch.device | Tensor)]
    device = _device(asked[0]) if asked and isinstance(asked[0], Tensor) else asked[0] if asked else _device(tensor)
    rest = [a for a in args if not (isinstance(a, str | torch.device))]
    rest = [a.dtype if isinstance(a, Tensor) else a for a in rest if a is not None]
    named = {key: value for key, value in kwargs.items() if key != "device" and value is not None}
    if torch.device(device).type == "meta":
        return _REAL_TO(tensor, "meta", *rest, **named)
    result = _REAL_TO(tensor, *rest, **named) if rest or named else tensor
    if _is_gpu(device) == isinstance(tensor, PretendTensor):
        return on_gpu(result) if _is_gpu(device) else result
    return (on_gpu if _is_gpu(device) else _on_cpu)(result.clone() if result is tensor else result)


def _deepcopy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    if id(tensor) not in memo:
        copied = _on_cpu(tensor).detach().clone()
        memo[id(tensor)] = _like(tensor, on_gpu(copied) if isinstance(tensor, PretendTensor) else copied)
    found: Tensor = memo[id(tensor)]
    return found


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """`values` as a parameter where `tensor` is one."""
    values.requires_grad_(tensor.requires_grad)
    if not isinstance(tensor, nn.Parameter):
        return values
    if not isinstance(values, PretendTensor):
        return nn.Parameter(values, requires_grad=tensor.requires_grad)
    values._is_param = True  # type: ignore[attr-defined]  # as torch marks parameters of a subclass
    return values


_REAL_DEVICE, _REAL_GRAD = Tensor.device.__get__, Tensor.grad.__get__  # type: ignore[attr-defined]
_REAL_TO, _REAL_NUMPY = Tensor.to, Tensor.numpy
_OF_TENSOR = {
    _REAL_DEVICE: _device,
    _REAL_GRAD: _grad,
    Tensor.is_cuda.__get__: lambda tensor: isinstance(tensor, PretendTensor),  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: lambda tensor: not isinstance(tensor, PretendTensor),  # type: ignore[attr-defined]
    _REAL_NUMPY: _numpy,
    _REAL_TO: _to,
    Tensor.cpu: lambda tensor: _to(tensor, "cpu"),
    Tensor.cuda: lambda tensor: _to(tensor, "cuda"),
    Tensor.__deepcopy__: _deepcopy,
    Tensor.pin_memory: lambda tensor: tensor,
}


def _module_to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """`Module.to`: parameters that are tied stay so."""
    device = next((a for a in (*args, *kwargs.values()) if isinstance(a, str | torch.device)), None)
    dtype = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)), None)
    if dtype is not None:
        _REAL_MODULE_TO(module, dtype)
    moved: dict[Tensor, Tensor] = {}
    for part in module.modules() if device is not None else ():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None and _is_gpu(device) != isinstance(tensor, PretendTensor):
                    if tensor not in moved:
                        moved[tensor] = _like(tensor, _to(tensor.detach(), device))
                    held[name] = moved[tensor]  # type: ignore[assignment]
    return module


_REAL_MODULE_TO = nn.Module.to


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


_CUDA = {
    "is_available": lambda: True,
    "current_device": lambda: 0,
    "device_count": lambda: 1,
    "set_device": lambda device: None,
    "get_device_name": lambda device=None: "NVIDIA H100 80GB HBM3",
    "get_device_capability": lambda device=None: (9, 0),
    "is_bf16_supported": lambda including_emulation=True: True,
    "max_memory_allocated": lambda device=None: 1 << 30,
    "empty_cache": lambda: None,
    "manual_seed_all": lambda seed: None,
    "Stream": lambda device=None: mock.MagicMock(),
    "stream": lambda stream: contextlib.nullcontext(),
    "current_stream": lambda device=None: mock.MagicMock(),
}


@contextlib.contextmanager
def pretend_gpu() -> Iterator[None]:
    """Has torch see one GPU inside the block."""
    is_enabled, dtype_of = torch.is_autocast_enabled, torch.get_autocast_dtype
    with contextlib.ExitStack() as stack:
        for name, value in _CUDA.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for owner, name, value in (
            (nn.Module, "to", _module_to),
            (nn.Module, "cpu", lambda module: _module_to(module, "cpu")),
            (torch.accelerator, "current_accelerator", lambda check_available=False: None),  # whose stream Adam reads
            (Tensor, "record_stream", lambda tensor, stream: None),
            (torch, "autocast", _Autocast),
            (sparsegpt, "captured", lambda step, device: step),
            (torch, "is_autocast_enabled", lambda device="cuda": is_enabled("cpu")),
            (torch, "get_autocast_dtype", lambda device: dtype_of("cpu")),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(_Mode())
        yield
