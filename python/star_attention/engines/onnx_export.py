"""A Llama-family model as an ONNX graph, with one node `StarAttention` a layer.

The node takes what a step of `ModelEngine` describes (tables of pages and slots) and the address of
the step's runtime context, which knows the KV pools and the other ranks; a TensorRT plugin of that
name computes it. Everything else is standard operators. Inputs of the graph, in tokens T,
sequences S, pages P, rotary positions M and rows R whose logits are wanted:

    input_ids, position_ids, slot_mapping  int32 [T]
    cu_seqlens_q int32 [S + 1], kv_lens int32 [S], page_table int32 [S, P]
    rotary float32 [M, head_dim], logit_rows int32 [R]
    runtime_context int32 [2], in host memory: a 64-bit address, low half first

Output: logits float32 [R, vocab_size]. Weights are outside the graph: if it is written into the
model's own folder, those that have its dtype stay where they are, in the safetensors files (ONNX
follows no path out of the graph's folder, and no links); others go into one file of their own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from star_attention.config import ModelConfig
from star_attention.errors import UserError
from star_attention.models.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    import onnx

DOMAIN = "star_attention"
GRAPH, WEIGHTS = "model.onnx", "model.data"
EXPORT_DTYPES = ("float16", "bfloat16", "float32")
PLUGIN, PLUGIN_VERSION = "StarAttention", "1"
# What the plugin takes behind the fused QKV projection.
PLUGIN_INPUTS = (
    "position_ids",
    "cu_seqlens_q",
    "kv_lens",
    "page_table",
    "slot_mapping",
    "rotary",
    "runtime_context",
)
_OPSET = 17
_ALIGNMENT = 64  # of weights in the file of their own


def graph_inputs(config: ModelConfig) -> dict[str, tuple[str, list[str | int]]]:
    """Type and dimensions of the graph's inputs."""
    return {
        "input_ids": ("int32", ["T"]),
        "position_ids": ("int32", ["T"]),
        "slot_mapping": ("int32", ["T"]),
        "cu_seqlens_q": ("int32", ["S + 1"]),
        "kv_lens": ("int32", ["S"]),
        "page_table": ("int32", ["S", "P"]),
        "logit_rows": ("int32", ["R"]),
        "runtime_context": ("int32", [2]),
        "rotary": ("float", ["M", config.head_dim]),
    }


def plugin_fields(config: ModelConfig, layer: int) -> dict[str, int]:
    """The plugin's attributes."""
    return {
        "layer": layer,
        "num_q_heads": config.num_q_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
    }


def export_graph(path: Path, folder: Path, dtype: str = "float16") -> Path:
    """Writes the graph of the model at `path` into `folder`; returns the graph's path.

    Nothing is left in `folder` if it fails: the files are written elsewhere and moved at the end.

    Raises:
        UserError: the model cannot be read, or the folder not be written.
    """
    if dtype not in EXPORT_DTYPES:
        raise UserError(f"--dtype is {dtype!r}: use {', '.join(EXPORT_DTYPES)}")
    checkpoint = open_checkpoint(path)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_graph(checkpoint, unfinished, folder, dtype)
        for file in unfinished.iterdir():
            os.replace(file, folder / file.name)
    except OSError as error:
        raise UserError(f"--output-dir {folder} cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder / GRAPH


def write_graph(checkpoint: Checkpoint, folder: Path, final: Path, dtype: str) -> None:
    """Writes graph and weights into `folder`, to be moved to `final`.

    Raises:
        UserError: a weight is missing or has another shape than the config asks for.
    """
    if importlib.util.find_spec("onnx") is None:
        raise UserError("ONNX graphs need onnx: pip install 'star-attention-trt[trt]'")
    _Graph(checkpoint, folder, final, dtype).save()


class _Graph:
    """Collects nodes and weights in `folder`, to be moved to `final`. Methods that add nodes take
    and return names of values."""

    def __init__(self, checkpoint: Checkpoint, folder: Path, final: Path, dtype: str) -> None:
        self._config = checkpoint.config
        self._weights = _Weights(checkpoint, folder, final, dtype)
        self._folder = folder
        self._type = _ONNX_TYPES[dtype]
        self._nodes: list[onnx.NodeProto] = []
        self._small: list[onnx.TensorProto] = []

    def save(self) -> None:
        import onnx
        from onnx import TensorProto, helper

        logits = self._decoder()
        infos = [
            helper.make_tensor_value_info(name, getattr(TensorProto, dtype.upper()), dims)
            for name, (dtype, dims) in graph_inputs(self._config).items()
        ]
        output = helper.make_tensor_value_info(
            logits, TensorProto.FLOAT, ["R", self._config.vocab_size]
        )
        weights = self._weights.finish()
        graph = helper.make_graph(self._nodes, "llama", infos, [output], [*weights, *self._small])
        model = helper.make_model(
            graph,
            producer_name="star-attention-trt",
            opset_imports=[helper.make_opsetid("", _OPSET), helper.make_opsetid(DOMAIN, 1)],
        )
        model.ir_version = 9  # what TensorRT 8.6 and the runtimes of its time read
        onnx.save(model, self._folder / GRAPH)

    def _decoder(self) -> str:
        config = self._config
        embedding = self._weights.add("model.embed_tokens.weight", config.vocab_size, None)
        x = self._node("Gather", [embedding, "input_ids"], axis=0)
        for index in range(config.num_layers):
            x = self._layer(x, index, f"model.layers.{index}.")
        x = self._norm(x, "model.norm.weight")
        lm_head = embedding
        if not config.tie_embeddings:
            lm_head = self._weights.add("lm_head.weight", config.vocab_size, None)
        return self._cast(self._linear(x, lm_head), _FLOAT, "logits")

    def _layer(self, x: str, index: int, prefix: str) -> str:
        config = self._config
        q_rows = config.num_q_heads * config.head_dim
        kv_rows = config.num_kv_heads * config.head_dim
        projections = {"q": q_rows, "k": kv_rows, "v": kv_rows}
        attention = prefix + "self_attn."

        def fused(kind: str, columns: Sequence[None]) -> str:
            parts = [
                self._weights.add(f"{attention}{name}_proj.{kind}", rows, *columns)
                for name, rows in projections.items()
            ]
            return self._node("Concat", parts, axis=0)  # of constants: done when an engine is built

        bias = fused("bias", ()) if config.qkv_bias else None
        normed = self._norm(x, prefix + "input_layernorm.weight")
        qkv = self._linear(normed, fused("weight", (None,)), bias)
        attended = self._attend(qkv, index)
        if index == config.num_layers - 1:  # from here on nobody wants the other rows
            x, attended = (
                self._node("Gather", [rows, "logit_rows"], axis=0) for rows in (x, attended)
            )
        out = self._weights.add(attention + "o_proj.weight", None, q_rows)
        x = self._node("Add", [x, self._linear(attended, out)])

        normed = self._norm(x, prefix + "post_attention_layernorm.weight")
        inner = config.intermediate_size
        gate, up = (
            self._linear(normed, self._weights.add(f"{prefix}mlp.{name}_proj.weight", inner, None))
            for name in ("gate", "up")
        )
        silu = self._node("Mul", [gate, self._node("Sigmoid", [gate])])
        down = self._weights.add(prefix + "mlp.down_proj.weight", None, inner)
        return self._node("Add", [x, self._linear(self._node("Mul", [silu, up]), down)])

    def _attend(self, qkv: str, layer: int) -> str:
        return self._node(
            PLUGIN,
            [qkv, *PLUGIN_INPUTS],
            domain=DOMAIN,
            plugin_version=PLUGIN_VERSION,
            plugin_namespace="",
            **plugin_fields(self._config, layer),
        )

    def _norm(self, x: str, weight: str) -> str:
        """RMSNorm, in float32 up to the product with the weight."""
        wide = self._cast(x, _FLOAT)
        mean = self._node("ReduceMean", [self._node("Mul", [wide, wide])], axes=[-1], keepdims=1)
        eps = self._constant(np.array(self._config.rms_norm_eps, np.float32))
        root = self._node("Sqrt", [self._node("Add", [mean, eps])])
        normed = self._node("Div", [wide, root])
        name = self._weights.add(weight, None)
        if self._type != _FLOAT:
            normed = self._cast(normed, self._type)
        return self._node("Mul", [normed, name])

    def _linear(self, x: str, weight: str, bias: str | None = None) -> str:
        """x weight^T + bias, weight [out, in] as checkpoints have it."""
        return self._node("Gemm", [x, weight] + ([bias] if bias else []), transB=1)

    def _cast(self, x: str, to: int, name: str | None = None) -> str:
        return self._node("Cast", [x], name, to=to)

    def _constant(self, value: np.ndarray) -> str:
        from onnx import numpy_helper

        name = f"constant_{len(self._small)}"
        self._small.append(numpy_helper.from_array(value, name))
        return name

    def _node(
        self,
        operator: str,
        inputs: Sequence[str],
        name: str | None = None,
        domain: str = "",
        **attributes: int | str | list[int],
    ) -> str:
        from onnx import helper

        name = name or f"{operator.lower()}_{len(self._nodes)}"
        self._nodes.append(
            helper.make_node(operator, inputs, [name], name=name, domain=domain, **attributes)
        )
        return name


class _Weights:
    """Initialisers whose data is outside the graph."""

    def __init__(self, checkpoint: Checkpoint, folder: Path, final: Path, dtype: str) -> None:
        self._checkpoint = checkpoint
        self._folder = folder
        self._dtype = dtype
        self._tensors: dict[str, onnx.TensorProto] = {}
        in_place = final.resolve() == checkpoint.path.resolve()
        self._places = _safetensors_places(checkpoint.path) if in_place else {}
        self._own = (folder / WEIGHTS).open("wb")

    def add(self, name: str, *shape: int | None) -> str:
        """The weight as a value of the graph; `None` in shape stands for the hidden size."""
        from onnx import TensorProto

        if name in self._tensors:
            return name
        hidden = self._checkpoint.config.hidden_size
        dims = [hidden if size is None else size for size in shape]
        tensor = TensorProto(name=name, dims=dims, data_location=TensorProto.EXTERNAL)
        tensor.data_type = _ONNX_TYPES[self._dtype]
        location, offset, length = self._place(name, dims)
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self._tensors[name] = tensor
        return name

    def finish(self) -> list[onnx.TensorProto]:
        self._own.close()
        if not (self._folder / WEIGHTS).stat().st_size:
            (self._folder / WEIGHTS).unlink()
        return list(self._tensors.values())

    def _place(self, name: str, dims: list[int]) -> tuple[str, int, int]:
        """File, offset and bytes of a weight; checks its shape."""
        import torch

        place = self._places.get(name)
        if place and place.dtype == self._dtype and place.shape == dims:
            return place.file.name, place.offset, place.length
        weight = self._checkpoint.tensor(name)
        if list(weight.shape) != dims:
            raise UserError(
                f"{self._checkpoint.path}: {name} has shape {list(weight.shape)}, "
                f"the config asks for {dims}"
            )
        data = weight.to(getattr(torch, self._dtype)).contiguous().view(torch.uint8).numpy()
        self._own.write(b"\0" * (-self._own.tell() % _ALIGNMENT))
        offset = self._own.tell()
        self._own.write(data.tobytes())
        return WEIGHTS, offset, data.nbytes


class _Place:
    """Where a tensor's bytes are."""

    def __init__(self, file: Path, data_start: int, entry: dict) -> None:
        begin, end = entry["data_offsets"]
        self.file, self.offset, self.length = file, data_start + begin, end - begin
        self.shape = entry["shape"]
        self.dtype = _SAFETENSORS_TYPES.get(entry["dtype"])


_FLOAT = 1  # onnx.TensorProto.FLOAT; onnx itself is imported when a graph is written
_ONNX_TYPES = {"float32": _FLOAT, "float16": 10, "bfloat16": 16}
_SAFETENSORS_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _safetensors_places(folder: Path) -> dict[str, _Place]:
    """The place of every tensor in files that are no links. Source: the safetensors format, 8 bytes
    of length and a JSON header."""
    places = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.is_symlink() or file.stat().st_nlink > 1:
            continue
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            places[name] = _Place(file, 8 + size, entry)
    return places
