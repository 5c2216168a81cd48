"""A mixture of experts, against the definition, and what a CUDA graph needs of it."""

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.nn import functional as F

from star_attention.engines.torch.experts import mix_by_expert, mix_captured
from star_attention.models.config import ExpertsConfig
from star_attention.models.weights import LayerWeights

HIDDEN, INNER, COUNT = 16, 24, 7


def make_layer(generator=None):
    generator = generator or torch.Generator().manual_seed(3)
    draw = functools.partial(torch.randn, generator=generator)
    gate_up, down = draw(COUNT * 2 * INNER, HIDDEN), draw(COUNT * HIDDEN, INNER)
    return LayerWeights(*[None] * 4, gate_up, down, router=draw(COUNT, HIDDEN))


def by_definition(inputs, layer, experts):
    """Row by row, expert by expert."""
    gate, up = layer.gate_up.view(COUNT, 2, INNER, HIDDEN).unbind(1)
    down = layer.down.view(COUNT, HIDDEN, INNER)
    mixed = torch.zeros_like(inputs)
    for row, x in enumerate(inputs):
        shares = (layer.router @ x).softmax(0)
        best = shares.argsort(descending=True)[: experts.per_token]
        whole = shares[best].sum() if experts.normalises else 1
        for e in best:
            mixed[row] += shares[e] / whole * (down[e] @ (F.silu(gate[e] @ x) * (up[e] @ x)))
    return mixed


@pytest.mark.parametrize("mix", [mix_by_expert, mix_captured])
@pytest.mark.parametrize("normalises", [True, False])
@pytest.mark.parametrize(
    ("rows", "per_token"),
    # Also no rows; few enough to copy their experts, and not; experts without rows; all experts.
    [(0, 2), (1, 1), (1, 2), (2, 1), (3, 1), (1, 7), (3, 2), (40, 3)],
)
def test_rows_get_what_their_experts_give(mix, rows, per_token, normalises):
    layer, experts = make_layer(), ExpertsConfig(COUNT, per_token, INNER, normalises)
    inputs = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(rows))
    given = inputs.clone()
    mixed = mix(inputs, layer, experts)
    torch.testing.assert_close(mixed, by_definition(given, layer, experts), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(inputs, given, atol=0, rtol=0)


@pytest.mark.parametrize("rows", [1, 40])
def test_a_graph_needs_no_values_on_the_host(rows):
    """Tensors without values have all that is captured; the other way asks for some."""
    experts = ExpertsConfig(COUNT, 2, INNER, True)
    with FakeTensorMode():
        layer = LayerWeights(
            *[None] * 4,
            torch.empty(COUNT * 2 * INNER, HIDDEN),
            torch.empty(COUNT * HIDDEN, INNER),
            router=torch.empty(COUNT, HIDDEN),
        )
        inputs = torch.empty(rows, HIDDEN)
        assert mix_captured(inputs, layer, experts).shape == inputs.shape
        with pytest.raises(DynamicOutputShapeException):
            mix_by_expert(inputs, layer, experts)


def test_only_chosen_experts_are_read():
    """Others may hold anything."""
    layer, experts = make_layer(), ExpertsConfig(COUNT, 2, INNER, True)
    inputs = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(1))
    chosen = (inputs @ layer.router.t()).topk(2).indices[0].tolist()
    expected = by_definition(inputs, layer, experts)
    for expert in set(range(COUNT)) - set(chosen):
        layer.gate_up.view(COUNT, -1)[expert] = torch.nan
        layer.down.view(COUNT, -1)[expert] = torch.nan
    for mix in (mix_by_expert, mix_captured):
        torch.testing.assert_close(mix(inputs, layer, experts), expected, atol=1e-4, rtol=1e-5)
