"""Experts on the GPU, in a CUDA graph and without, against the CPU in float32."""

import pytest
import torch

pytest.importorskip("star_attention.ops.cuda", exc_type=ImportError)

from star_attention.engines.torch.experts import mix_by_expert, mix_captured
from star_attention.models.config import ExpertsConfig
from star_attention.models.weights import LayerWeights

COUNT, INNER, HIDDEN = 16, 96, 256


def layer_of(gate_up, down, router):
    return LayerWeights(*[None] * 4, gate_up, down, router=router)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 9, 300])
def test_by_graph_and_without(rows, dtype):
    """Rows choose clearly, so that rounding does not choose for them."""
    generator = torch.Generator().manual_seed(5)
    shapes = (COUNT * 2 * INNER, HIDDEN), (COUNT * HIDDEN, INNER)
    drawn = [torch.randn(*each, generator=generator) * each[1] ** -0.5 for each in shapes]
    weights = [each.to(dtype) for each in (*drawn, torch.eye(COUNT, HIDDEN))]
    inputs = torch.randn(rows, HIDDEN, generator=generator).to(dtype)
    row = torch.arange(rows)
    inputs[:, :COUNT] = 0
    inputs[row, row % COUNT], inputs[row, (3 * row + 1) % COUNT] = 4, 2

    experts = ExpertsConfig(COUNT, 2, INNER, True)
    expected = mix_by_expert(inputs.float(), layer_of(*map(torch.Tensor.float, weights)), experts)
    layer, x = layer_of(*map(torch.Tensor.cuda, weights)), inputs.cuda()
    tolerance = {"rtol": 0, "atol": 2e-2 * expected.abs().max().item()}
    mixed = mix_by_expert(x, layer, experts)
    torch.testing.assert_close(mixed.cpu().float(), expected, **tolerance)
    mix_captured(x, layer, experts)  # prepares what kernels need
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mixed = mix_captured(x, layer, experts)
    graph.replay()
    torch.testing.assert_close(mixed.cpu().float(), expected, **tolerance)
