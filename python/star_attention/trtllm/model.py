"""TensorRT-LLM's Llama and Qwen2 with Star Attention, for `trtllm-build --model_cls_file`: its own
layers and weights around the plugin. Inputs, outputs and profiles of the engine are those that
`star-attn build` gives (engines/tensorrt/onnx.py). names.py lists what is used of TensorRT-LLM."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt as trt
import tensorrt_llm
import torch
from tensorrt_llm._common import default_net, default_trtnet
from tensorrt_llm.functional import Tensor, _create_tensor, index_select
from tensorrt_llm.layers import KeyValueCacheParams
from tensorrt_llm.models import LLaMAForCausalLM, QWenForCausalLM
from tensorrt_llm.module import Module

from star_attention.engines.tensorrt.build import Range, profiles
from star_attention.engines.tensorrt.onnx import (
    PLUGIN,
    PLUGIN_INPUTS,
    PLUGIN_VERSION,
    graph_inputs,
    plugin_fields,
)
from star_attention.errors import UserError
from star_attention.trtllm.engine_folder import STAR
from star_attention.trtllm.settings import check_flags, check_model, check_version, limits_of


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """trtllm-build ends with the reason and exit code 2, not with a traceback."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _load_plugin() -> None:
    """Into the global registry, which trtllm-build's builder asks."""
    library = Path(__file__).parents[1] / "libstar_attention_plugin.so"
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        raise UserError(
            f"the plugin cannot be loaded: set TENSORRT_ROOT to TensorRT's folder and reinstall "
            f"star-attention-trt where nvcc is found ({error})"
        ) from None
    trt.get_plugin_registry().load_library(str(library))


with _one_line():
    check_version(tensorrt_llm.__version__)
    _load_plugin()


class StarAttention(Module):
    """Attention of a layer: TensorRT-LLM's projections around the plugin."""

    def __init__(self, attention: Module, fields: dict[str, int]) -> None:
        super().__init__()
        self.qkv, self.dense = attention.qkv, attention.dense
        self.fields = fields

    def forward(
        self, hidden_states: Tensor, attention_params: dict[str, Tensor], **_: Any
    ) -> Tensor:
        """`attention_params`: the engine's inputs, which the decoder hands on as they are."""
        inputs = [self.qkv(hidden_states), *(attention_params[name] for name in PLUGIN_INPUTS)]
        creator = trt.get_plugin_registry().get_creator(PLUGIN, PLUGIN_VERSION, "")
        fields = [
            trt.PluginField(name, np.array([value], np.int32), trt.PluginFieldType.INT32)
            for name, value in self.fields.items()
        ]
        collection, phase = trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD
        plugin = creator.create_plugin(PLUGIN, collection, phase)
        tensors = [tensor.trt_tensor for tensor in inputs]
        layer = default_trtnet().add_plugin_v3(tensors, [], plugin)
        return self.dense(_create_tensor(layer.get_output(0), layer))


class _StarDecoder:
    def __init__(self, config: Any) -> None:
        with _one_line():
            self.star_model = check_model(config.to_dict())
        super().__init__(config)
        for index, layer in enumerate(self.transformer.layers):
            layer.attention = StarAttention(layer.attention, plugin_fields(self.star_model, index))
        engine = {
            "tensorrt": ".".join(trt.__version__.split(".")[:3]),
            "gpu": torch.cuda.get_device_name(),
            "compute_capability": "{}.{}".format(*torch.cuda.get_device_capability()),
            "build_id": uuid.uuid4().hex,
        }
        setattr(config, STAR, engine)

    def prepare_inputs(
        self, max_batch_size: int, max_seq_len: int, max_num_tokens: int, **others: Any
    ) -> dict[str, Tensor]:
        """The arguments of `forward`."""
        switches = ("remove_input_padding", "paged_kv_cache", "lora_plugin", "streamingllm")
        switches += ("norm_quant_fusion", "manage_weights", "tokens_per_block")
        plugins = default_net().plugin_config
        build = {name: getattr(plugins, name, False) for name in switches}
        build |= {"max_batch_size": max_batch_size, "max_seq_len": max_seq_len}
        build |= {"max_num_tokens": max_num_tokens, "logits_dtype": self.config.logits_dtype}
        build["max_prompt_embedding_table_size"] = others["prompt_embedding_table_size"]
        with _one_line():
            check_flags({**others, **build})
            limits = limits_of(build, {})
        shapes = profiles(self.star_model, limits)
        return {
            name: _network_input(name, dtype, dims, [shape.get(name) for shape in shapes])
            for name, (dtype, dims) in graph_inputs(self.star_model).items()
        }

    def forward(self, input_ids: Tensor, logit_rows: Tensor, **inputs: Tensor) -> Tensor:
        hidden_states = self.transformer.forward(
            input_ids=input_ids,
            use_cache=False,
            kv_cache_params=KeyValueCacheParams(),
            attention_params=inputs,
        )
        logits = self.lm_head(index_select(hidden_states, 0, logit_rows))
        logits.mark_output("logits", "float32")
        return logits


class StarLlamaForCausalLM(_StarDecoder, LLaMAForCausalLM):
    """Checkpoints whose architecture is LlamaForCausalLM."""


class StarQwen2ForCausalLM(_StarDecoder, QWenForCausalLM):
    """Checkpoints whose architecture is Qwen2ForCausalLM."""


def _network_input(
    name: str, dtype: str, dims: list[str | int], shapes: list[Range | None]
) -> Tensor:
    """An input whose dimensions are numbers or names that it shares with others; `shapes` are its
    ranges in each profile, None where all dimensions are numbers."""
    ranges = OrderedDict()
    for axis, dim in enumerate(dims):
        if isinstance(dim, int):
            ranges[f"{name}_{axis}"] = [dim] * len(shapes)
        else:
            ranges[dim] = [[sizes[axis] for sizes in shape] for shape in shapes]
    return Tensor(
        name=name,
        dtype={"int32": trt.int32, "float": trt.float32}[dtype],
        shape=[dim if isinstance(dim, int) else -1 for dim in dims],
        dim_range=ranges,
    )
