"""Loads a packed folder through transformers' `from_pretrained`, by its hooks for quantized models.

On a CPU the layers multiply by packed weights, with activations in fp32. On another device, or with `dequantize`, or
where the kernels were not built, weights are unpacked to the dense layers that the model was written with;
`castlm.to_semi_structured_` can convert these on an NVIDIA GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from castlm.core.blocks import in_block
from castlm.core.errors import InputError
from castlm.dtypes import FLOATS, STORED
from castlm.models.stored_layout import StoredLayout
from castlm.packed import native
from castlm.packed.experts import replace_experts_, take_stacks_apart_, unpack_experts_
from castlm.packed.layers import PackedEmbedding, PackedLinear, PackedModule, can_pack_tables, onto_kernels_
from castlm_runtime.packed import PackedSpec, read_specs
from castlm_runtime.stored import (
    PACKED_SINGLE,
    QUANT_METHOD,
    StoredTensor,
    check_weight_files,
    packed_weights,
    read_header,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.get_logger(__name__)


class CastlmConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed folder's config.json.

    Args:
        pattern: n:m, for people; the files record the pattern of each tensor.
        weights: the file with the weights, or the index of several.
        dequantize: unpack to dense layers while loading. Set it in the folder's config: transformers ignores a
            `quantization_config` argument of `from_pretrained`.

    Examples:
        >>> config = AutoConfig.from_pretrained(folder)  # doctest: +SKIP
        >>> config.quantization_config["dequantize"] = True  # doctest: +SKIP
        >>> model = AutoModelForCausalLM.from_pretrained(folder, config=config)  # doctest: +SKIP
    """

    def __init__(
        self,
        pattern: str = "",
        weights: str = PACKED_SINGLE,
        dequantize: bool = False,
        **_: Any,
    ):
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # their enum has the methods of transformers alone
        self.pattern, self.weights, self.dequantize = pattern, weights, dequantize


class CastlmQuantizer(HfQuantizer):
    """The hooks that transformers calls while it loads a packed folder, in the order of the calls."""

    requires_calibration = True  # no packing while loading: `castlm pack` writes the folder
    quantization_config: CastlmConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        packed_weights(self.quantization_config.to_dict(), "quantization_config")

    def update_device_map(self, device_map: Any) -> Any:
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        self.is_meta = all(str(device) == "meta" for device in devices)
        if not self.unpacks:
            on_cpu = all(_is_cpu(device) for device in devices)
            self.quantization_config.dequantize = not on_cpu or native.kernels() is None
            if on_cpu and self.unpacks:
                logger.warning(f"castlm unpacks the weights, for {native.NOT_BUILT}")
        return device_map

    @property
    def unpacks(self) -> bool:
        """Whether the weights are unpacked; transformers then treats the model as dense."""
        return self.quantization_config.dequantize

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        # The last hook before transformers looks for the weights. config.json has PACKED_NOTICE in place of their name,
        # so that a transformers without castlm fails with it, instead of filling the layers with random numbers.
        config.transformers_weights = self.quantization_config.weights
        return config

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """fp32 activations on a CPU: the kernels sum in fp32, and 16-bit operations of most CPUs are slower."""
        self.dtype = dtype if self.unpacks else torch.float32
        return self.dtype

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        files = checkpoint_files or []
        folder = Path(str(model.config.name_or_path))
        # transformers unpickles files of other names, and reads those outside the folder
        check_weight_files([Path(file) for file in files], folder if folder.is_dir() else None)
        tensors = {name: tensor for file in files for name, tensor in read_header(Path(file)).items()}
        specs = read_specs(tensors)
        if not specs:
            raise InputError(f"{', '.join(files)} holds no packed weights: run castlm pack again")
        _refuse_missing_weights(model)
        placed = replace_experts_(model, specs)
        for name, spec in specs.items():
            is_left_out = (  # the head of a model that is loaded without one, as by `AutoModel`
                not in_block(name) and model.get_output_embeddings() is None and _path_in(model, name) is None
            )
            if name not in placed and not is_left_out:
                placed[name] = self._replace(model, name, spec)
        if self.unpacks:
            return
        _keep_table_dtypes(model, tensors)
        # transformers does not load the packed tensors: each layer reads its own when it is prepared, so that memory
        # holds the stored tensors of one layer at a time.
        without = sorted({spec.pattern for spec in specs.values() if not native.has_kernels(spec.m)})
        if without:
            logger.warning(
                f"castlm has no fast CPU kernels for {', '.join(without)}: they take n:m with m = 2, 4, 8, 16, 32 or 64"
            )
        for name, path in placed.items():
            module = model.get_submodule(path)
            assert isinstance(module, PackedModule)
            module.read_from_({suffix: tensors[f"{name}.{suffix}"] for suffix in module.spec.tensors()})
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())  # `read_specs` has found all of them
        model._keys_to_ignore_on_load_unexpected = ignored | {r"\.(values|mask|scales)$"}

    def _replace(self, model: PreTrainedModel, name: str, spec: PackedSpec) -> str:
        """Replaces the dense layer by a packed one without values, and returns its path."""
        from transformers.pytorch_utils import Conv1D

        path = _path_in(model, StoredLayout(model).loaded_name(name))
        module = None if path is None else model.get_submodule(path)
        weight = getattr(module, "weight", None)
        is_alike = weight is not None and tuple(weight.shape) == spec.unpacked_shape
        if path is None or module is None or not is_alike or isinstance(module, Conv1D) != spec.transposed:
            order = "in, out" if spec.transposed else "out, in"
            raise InputError(
                f"{type(model).__name__} has no layer {name} of shape {spec.unpacked_shape} = ({order}): pack the "
                "model again"
            )
        if isinstance(module, nn.Embedding):
            assert type(module) is nn.Embedding, "castlm pack leaves tables that scale as they are"
            model.set_submodule(path, PackedEmbedding(spec, self.dtype))
            if f"{path}.weight" in model.all_tied_weights_keys.values():  # the head takes the table over after loading
                model.set_output_embeddings(nn.Identity())
                model.all_tied_weights_keys = {}
        else:
            model.set_submodule(path, PackedLinear(spec, dict(module.named_parameters(recurse=False)).get("bias")))
        return path

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.unpacks:
            take_stacks_apart_(model)
            onto_kernels_(model, self.dtype)
            return model
        if self.is_meta:  # `castlm verify` asks which weights are missing, and there are no values to unpack
            return model
        unpack_experts_(model, self.dtype)
        for path, module in [*model.named_modules()]:
            if isinstance(module, (PackedLinear, PackedEmbedding)):
                model.set_submodule(path, module.to_dense(self.dtype))
        if isinstance(model.get_output_embeddings(), nn.Identity):
            table = model.get_input_embeddings().get_parameter("weight")
            rows, columns = table.shape
            head = nn.Linear(columns, rows, bias=False, device="meta")
            head.weight = table
            model.set_output_embeddings(head)
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _refuse_missing_weights(model: PreTrainedModel) -> None:
    """Makes loading fail where transformers would warn of a missing weight and fill it with random numbers.

    A class that was not packed may have a new head, as `AutoModelForSequenceClassification` does.
    """

    def check(info: Any) -> None:
        del model.__dict__["_adjust_missing_and_unexpected_keys"]  # the class's own again
        model._adjust_missing_and_unexpected_keys(info)
        is_packed_class = type(model).__name__ in (model.config.architectures or ())
        if missing := sorted(name for name in info.missing_keys if is_packed_class or in_block(name)):
            raise InputError(f"the packed folder lacks {missing[0]}: fetch it again, or pack the model again")

    model.__dict__["_adjust_missing_and_unexpected_keys"] = check


def _is_cpu(device: Any) -> bool:
    if device in ("auto", "balanced", "balanced_low_0", "sequential"):
        return not torch.accelerator.is_available()
    return device is None or (device != "disk" and torch.device(device).type == "cpu")


def _path_in(model: PreTrainedModel, name: str) -> str | None:
    """The path of the module for a stored name."""
    for path in StoredLayout(model).possible_names(name):
        with contextlib.suppress(AttributeError):
            model.get_submodule(path)
            return path
    return None


def _keep_table_dtypes(model: PreTrainedModel, tensors: Mapping[str, StoredTensor]) -> None:
    """Makes transformers load embedding and head in their stored dtype instead of the activations': they are packed
    next.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not can_pack_tables(model):
        return
    for path, module in model.named_modules():
        if module not in (embedding, head):
            continue
        for name in StoredLayout(model).possible_names(path):
            stored = tensors.get(f"{name}.weight")
            dtype = None if stored is None else STORED.get(stored.dtype)
            if dtype in FLOATS.values():
                module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)
