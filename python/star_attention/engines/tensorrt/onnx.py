"""A Llama-family model as an ONNX graph, with one node `StarAttention` a layer.

The node takes what a step of `ModelEngine` describes (tables of pages and slots) and the address of
the step's runtime context, which knows the KV pools and the other ranks; a TensorRT plugin of that
name computes it. What else a layer does are nodes of the same domain, whose definition by standard
operators is in the graph (ONNX's functions): TensorRT 8 has plugins of their names, newer versions
and other runtimes read the definitions. Inputs of the graph, in tokens T, sequences S, pages P,
rows M of the rotary table and rows R whose logits are wanted:

    input_ids, position_ids, slot_mapping  int32 [T]
    cu_seqlens_q int32 [S + 1], kv_lens int32 [S], page_table int32 [S, P]
    rotary float32 [M, head_dim], logit_rows int32 [R]
    runtime_context int32 [2], in host memory: a 64-bit address, low half first

Output: logits float32 [R, vocab_size]. Weights are outside the graph. Those that a layer reads as
one (Q, K and V; gate and up) lie one behind the other in a file of their own, with all others that
are not of the graph's type; what remains stays in the model's safetensors files if the graph is
written beside them (ONNX follows no path out of the graph's folder, and no links).

Projections in FP8 are nodes without a definition, for the plugins StarLinearFp8 and
StarLinearFp8Add: weights are int32 [out, in / 4], four e4m3 each, behind which come the bits of
their rows' float32 scales, int32 [out].
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from star_attention.errors import UserError
from star_attention.models.checkpoint import open_checkpoint
from star_attention.models.config import ModelConfig
from star_attention.models.decoder import decode
from star_attention.models.weights import Checkpoint, LayerWeights, Weight, assemble, weight_table

if TYPE_CHECKING:
    import onnx
    import torch

DOMAIN = "star_attention"
GRAPH, WEIGHTS = "model.onnx", "model.data"
EXPORT_DTYPES = ("float16", "bfloat16", "float32")
PLUGIN, PLUGIN_VERSION = "StarAttention", "1"
# Nodes that standard operators define.
GATHER_ROWS, RMS_NORM, SILU_MUL = "StarGatherRows", "StarRmsNorm", "StarSiluMul"
LINEAR, LINEAR_ADD = "StarLinear", "StarLinearAdd"
# Nodes that only plugins compute, as PLUGIN.
LINEAR_FP8, LINEAR_FP8_ADD = "StarLinearFp8", "StarLinearFp8Add"
_AS_PLUGIN = {"plugin_version": PLUGIN_VERSION, "plugin_namespace": ""}
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


def export_graph(
    path: Path, folder: Path, dtype: str = "float16", *, gemm_plugin: bool = True
) -> Path:
    """Writes the graph of the model at `path` into `folder`; returns the graph's path.

    Projections are nodes for TensorRT 8's plugin with `gemm_plugin`, and Gemm without.

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
        write_graph(checkpoint, unfinished, folder, dtype, gemm_plugin=gemm_plugin)
        for file in unfinished.iterdir():
            os.replace(file, folder / file.name)
    except OSError as error:
        raise UserError(f"--output-dir {folder} cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder / GRAPH


def write_graph(
    checkpoint: Checkpoint,
    folder: Path,
    final: Path,
    dtype: str,
    *,
    gemm_plugin: bool,
    fp8: bool = False,
) -> None:
    """Writes graph and weights into `folder`, to be moved to `final`.

    Args:
        fp8: of projections; they are quantised as for the torch engine, if they are not in it.

    Raises:
        UserError: the model is a Gemma, or has experts, windows, or weights in FP8 without `fp8`,
            or one that cannot be read or quantised.
    """
    if importlib.util.find_spec("onnx") is None:
        raise UserError("ONNX graphs need onnx: pip install 'star-attention-trt[trt]'")
    checkpoint.config.check_no_gemma("by TensorRT engines: run it with --device cpu")
    checkpoint.config.check_no_window("by TensorRT engines: run it with --device cuda or cpu")
    if checkpoint.config.experts:
        raise UserError(
            "the model has a mixture of experts, which TensorRT engines do not have: run it with "
            "--model and --device cuda"
        )
    if not fp8 and any(map(checkpoint.is_fp8, weight_table(checkpoint.config))):
        raise UserError(
            "the model's weights are in FP8: use star-attn build with --quantization fp8, or a "
            "model with 16-bit weights"
        )
    _Graph(checkpoint, folder, final, dtype, gemm_plugin, fp8).save()


class _Graph:
    """The decoder's operators on names of values: collects nodes and weights in `folder`, to be
    moved to `final`. See `models.decoder.Operators`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        final: Path,
        dtype: str,
        gemm_plugin: bool,
        fp8: bool,
    ) -> None:
        self._config = checkpoint.config
        self._gemm_plugin = gemm_plugin
        self._weights = _Weights(checkpoint, folder, final, dtype, fp8)
        self._folder = folder
        self._type = _ONNX_TYPES[dtype]
        self._nodes: list[onnx.NodeProto] = []

    def save(self) -> None:
        import onnx
        from onnx import TensorProto, helper

        logits = decode(self, assemble(self._config, self._weights.add))
        infos = [
            helper.make_tensor_value_info(name, getattr(TensorProto, dtype.upper()), dims)
            for name, (dtype, dims) in graph_inputs(self._config).items()
        ]
        output = helper.make_tensor_value_info(
            logits, TensorProto.FLOAT, ["R", self._config.vocab_size]
        )
        graph = helper.make_graph(self._nodes, "decoder", infos, [output], self._weights.finish())
        used = {node.op_type for node in self._nodes}
        model = helper.make_model(
            graph,
            producer_name="star-attention-trt",
            opset_imports=[helper.make_opsetid("", _OPSET), helper.make_opsetid(DOMAIN, 1)],
            functions=[each for each in _definitions(self._type) if each.name in used],
        )
        model.ir_version = 9  # what TensorRT 8.6 and the runtimes of its time read
        onnx.save(model, self._folder / GRAPH)

    def embed(self, embedding: str) -> str:
        return self._node(GATHER_ROWS, [embedding, "input_ids"])

    def attend(self, layer: int, x: str, project: Callable[[str], str]) -> str:
        return self._node(
            PLUGIN,
            [project(x), *PLUGIN_INPUTS],
            **_AS_PLUGIN,
            **plugin_fields(self._config, layer),
        )

    def by_rows(self, finish: Callable[[str, str], str], x: str, attended: str) -> str:
        return finish(x, attended)

    def wanted_rows(self, x: str) -> str:
        return self._node(GATHER_ROWS, [x, "logit_rows"])

    def rms_norm(self, x: str, weight: str, reader: str | None = None) -> str:
        return self._node(RMS_NORM, [x, weight], eps=self._config.rms_norm_eps)

    def linear(self, x: str, weight: str, bias: str | None = None) -> str:
        return self._linear(x, weight, bias)

    def norm_heads(self, qkv: str, q_norm: str, k_norm: str) -> str:
        config = self._config
        heads = config.num_q_heads, config.num_kv_heads, config.num_kv_heads
        sizes = self._constant([count * config.head_dim for count in heads])
        name = self._new_name("Split")
        q, k, v = parts = [f"{name}_{part}" for part in "qkv"]
        self._append("Split", [qkv, sizes], parts, "", axis=-1)
        q, k = self._norm_each(q, heads[0], q_norm), self._norm_each(k, heads[1], k_norm)
        return self._node("Concat", [q, k, v], domain="", axis=-1)

    def _norm_each(self, part: str, heads: int, weight: str) -> str:
        size = self._config.head_dim
        rows = self._node("Reshape", [part, self._constant([-1, size])], domain="")
        normed = self.rms_norm(rows, weight)
        return self._node("Reshape", [normed, self._constant([-1, heads * size])], domain="")

    def add_linear(self, x: str, inputs: str, weight: str, bias: str | None = None) -> str:
        if bias is not None:
            x = self._node("Add", [x, bias], domain="")
        return self._linear(inputs, weight, x)

    def add_experts(self, x: str, inputs: str, layer: LayerWeights[str]) -> str:
        raise NotImplementedError("write_graph refuses models with experts")

    def add_normed(self, x: str, inputs: str, weight: str, norm: str) -> str:
        raise NotImplementedError("write_graph refuses Gemma")

    def activate(self, gate_up: str, reader: str) -> str:
        return self._node(SILU_MUL, [gate_up])

    def logits(self, x: str, lm_head: str) -> str:
        return self._node("Cast", [self.linear(x, lm_head)], "logits", domain="", to=_FLOAT)

    def _linear(self, x: str, weight: str, addend: str | None) -> str:
        """x weight^T, weight [out, in] as checkpoints have it, and what is added to it."""
        added = [addend] if addend else []
        if scales := self._weights.scales.get(weight):
            operator = LINEAR_FP8_ADD if addend else LINEAR_FP8
            return self._node(operator, [x, weight, scales, *added], **_AS_PLUGIN)
        if not self._gemm_plugin:
            return self._node("Gemm", [x, weight, *added], domain="", transB=1)
        return self._node(LINEAR_ADD if addend else LINEAR, [x, weight, *added])

    def _constant(self, values: Sequence[int]) -> str:
        """int64 [len(values)]."""
        from onnx import TensorProto, helper

        tensor = helper.make_tensor("", TensorProto.INT64, [len(values)], values)
        return self._node("Constant", [], domain="", value=tensor)

    def _node(
        self,
        operator: str,
        inputs: Sequence[str],
        name: str | None = None,
        domain: str = DOMAIN,
        **attributes: Any,
    ) -> str:
        name = name or self._new_name(operator)
        self._append(operator, inputs, [name], domain, **attributes)
        return name

    def _append(
        self,
        operator: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        domain: str,
        **attributes: Any,
    ) -> None:
        from onnx import helper

        self._nodes.append(
            helper.make_node(operator, inputs, outputs, outputs[0], domain=domain, **attributes)
        )

    def _new_name(self, operator: str) -> str:
        return f"{operator.lower()}_{len(self._nodes)}"


def _definitions(dtype: int) -> list[onnx.FunctionProto]:
    """What the nodes of our domain compute, for a graph of that type."""
    from onnx import AttributeProto, helper

    standard = [helper.make_opsetid("", _OPSET)]

    def define(
        name: str, inputs: Sequence[str], *nodes: onnx.NodeProto, attributes: Sequence[str] = ()
    ) -> onnx.FunctionProto:
        return helper.make_function(DOMAIN, name, inputs, ["out"], nodes, standard, attributes)

    node = helper.make_node
    eps = node("Constant", [], ["eps"])
    eps.attribute.add(name="value_float", type=AttributeProto.FLOAT, ref_attr_name="eps")
    rms_norm = (
        eps,
        node("Cast", ["x"], ["wide"], to=_FLOAT),
        node("Mul", ["wide", "wide"], ["squares"]),
        node("ReduceMean", ["squares"], ["mean"], axes=[-1], keepdims=1),
        node("Add", ["mean", "eps"], ["sum"]),
        node("Sqrt", ["sum"], ["root"]),
        node("Div", ["wide", "root"], ["normed"]),
        node("Cast", ["normed"], ["narrow"], to=dtype),
        node("Mul", ["narrow", "weight"], ["out"]),
    )
    silu_mul = (
        node("Split", ["gate_up"], ["gate", "up"], axis=-1),
        node("Sigmoid", ["gate"], ["sigmoid"]),
        node("Mul", ["gate", "sigmoid"], ["silu"]),
        node("Mul", ["silu", "up"], ["out"]),
    )
    linear, addend = ["x", "weight"], ["x", "weight", "addend"]
    return [
        define(GATHER_ROWS, ["x", "rows"], node("Gather", ["x", "rows"], ["out"], axis=0)),
        define(RMS_NORM, ["x", "weight"], *rms_norm, attributes=["eps"]),
        define(SILU_MUL, ["gate_up"], *silu_mul),
        define(LINEAR, linear, node("Gemm", linear, ["out"], transB=1)),
        define(LINEAR_ADD, addend, node("Gemm", addend, ["out"], transB=1)),
    ]


class _Weights:
    """Initialisers whose data is outside the graph.

    Attributes:
        scales: by the weights in FP8 that they are of.
    """

    def __init__(
        self, checkpoint: Checkpoint, folder: Path, final: Path, dtype: str, fp8: bool
    ) -> None:
        self._checkpoint = checkpoint
        self._folder = folder
        self._dtype = dtype
        self._fp8 = fp8
        self.scales: dict[str, str] = {}
        self._tensors: dict[str, onnx.TensorProto] = {}
        in_place = final.resolve() == checkpoint.path.resolve()
        self._places = _safetensors_places(checkpoint.path) if in_place else {}
        self._own = (folder / WEIGHTS).open("wb")

    def add(self, weights: Sequence[Weight]) -> str:
        """One weight, or several stacked, as a value of the graph."""
        import torch

        from star_attention.models.loading import is_projection

        first = weights[0]
        is_one = len(weights) == 1
        name = first.name if is_one else f"model.layers.{first.layer}.{first.field}"
        dims = [sum(weight.shape[0] for weight in weights), *first.shape[1:]]
        if self._fp8 and is_projection(self._checkpoint.config, first):
            return self._add_fp8(name, weights, dims)
        place = self._places.get(first.name) if is_one else None
        if place and place.dtype == self._dtype and place.shape == dims:
            span = place.file.name, place.offset, place.length
            return self._declare(name, self._dtype, dims, *span)
        dtype = getattr(torch, self._dtype)
        stored = (self._checkpoint.tensor(weight).to(dtype) for weight in weights)
        return self._declare(name, self._dtype, dims, WEIGHTS, *self._write(stored))

    def _add_fp8(self, name: str, weights: Sequence[Weight], dims: Sequence[int]) -> str:
        import torch

        from star_attention.models.loading import check_fp8, quantized_rows

        rows, columns = dims
        check_fp8(weights[0].name, rows, columns, "another model")
        on, dtype = torch.device("cpu"), getattr(torch, self._dtype)
        made = quantized_rows(weights, self._checkpoint.tensor, "fp8", dtype, on)
        place = WEIGHTS, *self._write([made.scales])
        self.scales[name] = self._declare(f"{name}_scale", "int32", [rows], *place)
        place = WEIGHTS, *self._write([made.values])
        return self._declare(name, "int32", [rows, columns // 4], *place)

    def finish(self) -> list[onnx.TensorProto]:
        self._own.close()
        if not (self._folder / WEIGHTS).stat().st_size:
            (self._folder / WEIGHTS).unlink()
        return list(self._tensors.values())

    def _declare(
        self, name: str, dtype: str, dims: list[int], location: str, offset: int, length: int
    ) -> str:
        from onnx import TensorProto

        tensor = TensorProto(name=name, dims=dims, data_location=TensorProto.EXTERNAL)
        tensor.data_type = _ONNX_TYPES[dtype]
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self._tensors[name] = tensor
        return name

    def _write(self, tensors: Iterable[torch.Tensor]) -> tuple[int, int]:
        """One behind the other: offset and bytes."""
        import torch

        self._own.write(b"\0" * (-self._own.tell() % _ALIGNMENT))
        offset = self._own.tell()
        for tensor in tensors:
            self._own.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return offset, self._own.tell() - offset


class _Place:
    """Where a tensor's bytes are."""

    def __init__(self, file: Path, data_start: int, entry: dict) -> None:
        begin, end = entry["data_offsets"]
        self.file, self.offset, self.length = file, data_start + begin, end - begin
        self.shape = entry["shape"]
        self.dtype = _SAFETENSORS_TYPES.get(entry["dtype"])


_FLOAT = 1  # onnx.TensorProto.FLOAT; onnx itself is imported when a graph is written
_ONNX_TYPES = {"float32": _FLOAT, "float16": 10, "bfloat16": 16, "int32": 6}
_SAFETENSORS_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _safetensors_places(folder: Path) -> dict[str, _Place]:
    """The place of every weight in files that are no links. Source: the safetensors format, 8 bytes
    of length and a JSON header."""
    from star_attention.models.safetensors_folder import weight_files

    places = {}
    for file in weight_files(folder):
        if file.is_symlink() or file.stat().st_nlink > 1:
            continue
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            places[name] = _Place(file, 8 + size, entry)
    return places
