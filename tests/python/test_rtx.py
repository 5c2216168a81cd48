"""The graph under a TensorRT parser and builder that need no GPU: those of TensorRT-RTX, which
compiles engines ahead of time. It has no plugins, so attention is left out: each StarAttention is
its queries."""

import onnx
import pytest
from onnx import helper, numpy_helper

from helpers import MODELS, save_tiny_model
from star_attention.engines.tensorrt.build import limits_for, profiles
from star_attention.engines.tensorrt.onnx import export_graph
from star_attention.models.checkpoint import open_checkpoint

trt = pytest.importorskip("tensorrt_rtx", reason="needs pip install tensorrt-rtx-cu13")


def without_attention(graph):
    """The graph beside it."""
    model = onnx.load(graph, load_external_data=False)
    cut = 0
    for node in model.graph.node:
        if node.op_type == "StarAttention":
            sizes = {each.name: each.i for each in node.attribute}
            end = sizes["num_q_heads"] * sizes["head_dim"]
            slices = {"from": 0, "to": end, "axis": 1}
            names = [f"{part} of {node.output[0]}" for part in slices]
            for name, value in zip(names, slices.values(), strict=True):
                tensor = helper.make_tensor(name, onnx.TensorProto.INT64, [1], [value])
                model.graph.initializer.append(tensor)
            node.CopyFrom(helper.make_node("Slice", [node.input[0], *names], node.output))
            cut += 1
    path = graph.with_name("without_attention.onnx")
    onnx.save(model, path)
    return path, cut


class Log(trt.ILogger):
    def __init__(self):
        super().__init__()
        self.errors = []

    def log(self, severity, message):
        if severity <= trt.ILogger.ERROR:
            self.errors.append(message)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("gemm_plugin", [True, False], ids=["plugin", "gemm"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_parses_and_builds(tmp_path, name, gemm_plugin, dtype):
    architecture, overrides = MODELS[name]
    save_tiny_model(tmp_path / "model", architecture, **overrides)
    graph = export_graph(tmp_path / "model", tmp_path / "graph", dtype, gemm_plugin=gemm_plugin)
    config = open_checkpoint(tmp_path / "model").config
    path, cut = without_attention(graph)
    assert cut == config.num_layers

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(str(path)), log.errors
    options = builder.create_builder_config()
    options.num_compute_capabilities = 1
    options.set_compute_capability(trt.ComputeCapability.SM89, 0)
    limits = limits_for(config, max_seq_len=256, max_num_tokens=64, max_batch_size=4)
    for ranges in profiles(config, limits):
        profile = builder.create_optimization_profile()
        for tensor, shapes in ranges.items():
            profile.set_shape(tensor, *shapes)
        options.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, options)
    assert plan is not None, log.errors
    assert not log.errors
    weights = sum(numpy_helper.to_array(w).nbytes for w in onnx.load(graph).graph.initializer)
    assert plan.nbytes > 0.9 * weights
    [logits] = (network.get_output(i) for i in range(network.num_outputs))
    assert (logits.name, logits.dtype, tuple(logits.shape)) == ("logits", trt.float32, (-1, 97))
