"""The ONNX graph, run by ONNX's reference evaluator, computes what the torch engine does."""

import json
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from safetensors.torch import load_file, save_file

from fp8_files import quantize_folder
from helpers import MODELS, forced_logits, save_tiny_model
from star_attention.config import StarConfig
from star_attention.distributed import SingleProcess
from star_attention.engines.base import Limits
from star_attention.engines.loader import load_engine
from star_attention.engines.options import EngineOptions
from star_attention.engines.tensorrt.onnx import GRAPH, export_graph, write_graph
from star_attention.errors import UserError
from star_attention.models.checkpoint import open_checkpoint
from star_attention.models.rotary import rotary_table
from star_attention.ops import reference
from star_attention.ops.quantized import FP8, QuantizedRows, quantize_rows
from star_attention.runtime.leader import lead_together

PAGE = 8
STEPS = {}  # by the address that a step's runtime context would have


class StarAttention(OpRun):
    """The plugin's operator on one rank; the runtime context holds pools and what a step adds."""

    op_domain = "star_attention"

    def _run(self, qkv, positions, starts, kv_lens, table, slots, rotary, address, **attributes):
        pools, causal, prefix = STEPS[int(address.view(np.int64)[0])]
        tensors = [
            torch.from_numpy(array.copy())
            for array in (qkv, positions, rotary, slots, table, starts, kv_lens)
        ]
        qkv, positions, rotary, slots, table, starts, kv_lens = tensors
        pool = pools[attributes["layer"]]
        q = qkv.new_empty(len(qkv), attributes["num_q_heads"], attributes["head_dim"])
        reference.rope_append(qkv, positions, rotary, pool, slots, q)
        options = {"scale": attributes["head_dim"] ** -0.5, "max_q_len": 0, "max_kv_len": 0}
        seen = [(pool, table, starts, kv_lens, {"causal": causal})]
        if prefix:
            codes, scales, table, kv_lens = prefix
            scales = scales[attributes["layer"]]
            more = {"causal": False, "kv_scales": scales}
            seen.append((codes[attributes["layer"]], table, starts, kv_lens, more))
        parts = [reference.paged_attention(q, *each, **more, **options) for *each, more in seen]
        o, _ = reference.merge_lse(*map(torch.stack, zip(*parts, strict=True)))
        return (o.flatten(1).numpy(),)


class StarLinearFp8(OpRun):
    op_domain = "star_attention"

    def _run(self, x, weight, scales, addend=None, **attributes):
        values = torch.from_numpy(weight.copy()).view(FP8)
        rows = QuantizedRows(
            values, torch.from_numpy(scales.copy()).view(torch.float32), torch.float32
        )
        quantized = quantize_rows(torch.from_numpy(x.copy()), "fp8")
        added = None if addend is None else torch.from_numpy(addend.copy())
        return (reference.linear(quantized, rows, added).numpy(),)


class StarLinearFp8Add(StarLinearFp8):
    pass


PLUGINS = [StarAttention, StarLinearFp8, StarLinearFp8Add]  # nodes without a definition


class OnnxEngine:
    """`ModelEngine` over the evaluator."""

    limits = Limits()
    has_exchanges = has_hops = has_prefix = has_selection = False
    kv_dtype, kv_packing = "auto", 1
    wait_seconds = 0.0
    peak_memory_bytes = graph_steps = 0

    def __init__(self, graph, config):
        self.config, self.tokens_per_block = config, PAGE
        self._evaluator = ReferenceEvaluator(str(graph), new_ops=PLUGINS)
        self._rotary = rotary_table(config.rope, config.head_dim, 512, torch.device("cpu")).numpy()
        self._pools = None

    def reserve_positions(self, positions):
        assert positions <= 512

    def reserve_pages(self, num_pages):
        grown = torch.zeros(self.config.kv_shape(num_pages, PAGE))
        if self._pools is not None:
            grown[:, : self._pools.shape[1]] = self._pools
        self._pools = grown

    def copy_page(self, source, target):
        self._pools[:, target] = self._pools[:, source]

    def step(self, token_ids, positions, attention, logit_rows, on_layer=None):
        STEPS[7 << 32] = self._pools, attention.causal, None
        feeds = {
            "input_ids": token_ids,
            "position_ids": positions,
            "slot_mapping": attention.slot_mapping,
            "cu_seqlens_q": attention.cu_seqlens_q,
            "kv_lens": attention.kv_lens,
            "page_table": attention.page_table,
            "rotary": self._rotary,
            "logit_rows": logit_rows,
            "runtime_context": np.array([7 << 32]).view(np.int32),
        }
        return self._evaluator.run(None, feeds)[0]

    def finish_steps(self):
        pass


@pytest.mark.parametrize("gemm_plugin", [True, False], ids=["plugin", "gemm"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "qwen3-moe"])
def test_same_logits_as_torch(tmp_path, name, gemm_plugin):
    architecture, overrides = MODELS[name]
    save_tiny_model(tmp_path / "model", architecture, **overrides)
    graph = export_graph(tmp_path / "model", tmp_path / "graph", "float32", gemm_plugin=gemm_plugin)
    onnx.checker.check_model(str(graph))
    projections = {node.op_type for node in onnx.load(graph).graph.node}
    assert ("Gemm" in projections) == (not gemm_plugin)
    engine = load_engine(tmp_path / "model", SingleProcess(), PAGE, EngineOptions())
    found = logits_of(OnnxEngine(graph, engine.config))
    np.testing.assert_allclose(found, logits_of(engine), atol=2e-5)


def logits_of(engine):
    tokens = np.random.default_rng(6).integers(0, 97, 80).astype(np.int32)
    context, question, answer = np.split(tokens, [70, 76])
    leader, _ = lead_together(engine, SingleProcess())
    encoded = leader.encode(context, StarConfig(16, 8, "local", tokens_per_block=PAGE))
    return forced_logits(leader, encoded, question, answer)


@pytest.mark.parametrize("is_stored", [False, True], ids=["quantised", "stored"])
@pytest.mark.parametrize("name", ["llama", "biases", "qwen3"])
def test_projections_in_fp8(tmp_path, name, is_stored):
    """Those of 16 bits quantised, those that are stored in FP8 as they are."""
    architecture, overrides = MODELS[name]
    save_tiny_model(tmp_path, architecture, **overrides)
    if is_stored:
        quantize_folder(tmp_path, "compressed-dynamic")
    checkpoint, folder = open_checkpoint(tmp_path), tmp_path / "graph"
    folder.mkdir()
    write_graph(checkpoint, folder, folder, "float32", gemm_plugin=True, fp8=True)
    onnx.checker.check_model(str(folder / GRAPH))
    layers = checkpoint.config.num_layers
    operators = Counter(node.op_type for node in onnx.load(folder / GRAPH).graph.node)
    assert operators["StarLinearFp8"] + operators["StarLinearFp8Add"] == 4 * layers
    assert operators["StarLinear"] == 1  # the last
    engine = load_engine(tmp_path, SingleProcess(), PAGE, EngineOptions(quantization="fp8"))
    found = logits_of(OnnxEngine(folder / GRAPH, engine.config))
    np.testing.assert_allclose(found, logits_of(engine), atol=2e-5)


def test_projections_that_fp8_does_not_take(tmp_path):
    save_tiny_model(tmp_path, intermediate_size=72)
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(UserError, match="FP8 on a GPU needs multiples of 16"):
        write_graph(checkpoint, tmp_path, tmp_path, "float16", gemm_plugin=True, fp8=True)


def test_experts_are_refused(tmp_path):
    save_tiny_model(tmp_path / "model", "qwen3_moe")
    with pytest.raises(UserError, match="mixture of experts, which TensorRT engines do not have"):
        export_graph(tmp_path / "model", tmp_path / "graph")
    assert not any((tmp_path / "graph").iterdir())


def weights_by_file(graph):
    files = {}
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                files.setdefault(entry.value, set()).add(tensor.name)
    return files


FUSED = {
    "qkv": [f"self_attn.{part}_proj.weight" for part in "qkv"],
    "qkv_bias": [f"self_attn.{part}_proj.bias" for part in "qkv"],
    "gate_up": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
}


def parts_of(name):
    """Names in the checkpoint of what a weight of the graph holds."""
    layer, _, field = name.rpartition(".")
    return [f"{layer}.{part}" for part in FUSED[field]] if field in FUSED else [name]


def check_weights(graph, hf_model):
    parameters = hf_model.state_dict()
    for tensor in onnx.load(graph).graph.initializer:
        parts = [parameters.pop(part) for part in parts_of(tensor.name)]
        stored = onnx.numpy_helper.to_array(tensor)
        np.testing.assert_array_equal(stored, torch.cat(parts).to(torch.float16).numpy())
    assert not parameters


def test_weights_stay_where_they_are(tmp_path):
    hf_model = save_tiny_model(tmp_path, dtype=torch.float16, shards=True)
    graph = export_graph(tmp_path, tmp_path, "float16")
    onnx.checker.check_model(str(graph))
    check_weights(graph, hf_model)
    files = weights_by_file(graph)
    fused = files.pop("model.data")
    assert all(len(parts_of(name)) > 1 for name in fused)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    expected = {}
    for name, file in index["weight_map"].items():
        if not any(name in parts_of(whole) for whole in fused):
            expected.setdefault(file, set()).add(name)
    assert files == expected
    assert len(files) > 1


def test_other_dtypes_are_converted(tmp_path):
    hf_model = save_tiny_model(tmp_path / "model")
    graph = export_graph(tmp_path / "model", tmp_path / "graph", "float16")
    assert set(weights_by_file(graph)) == {"model.data"}
    check_weights(graph, hf_model)


def test_nothing_is_left_of_a_failure(tmp_path):
    save_tiny_model(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(UserError, match=r"norm\.weight is stored as I8"):
        export_graph(tmp_path / "model", tmp_path / "graph", "float32")
    assert [path.name for path in tmp_path.iterdir() if path.name != "model"] in ([], ["graph"])
    assert not any((tmp_path / "graph").iterdir())
