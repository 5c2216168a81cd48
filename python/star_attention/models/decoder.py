"""The Llama-family decoder, written once over the operators that an engine gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from star_attention.models.weights import LayerWeights, ModelWeights, W


class Operators(Protocol[W]):
    """What the decoder computes with. Values are an engine's own: tensors of some rows, which
    operators may overwrite, or names in a graph."""

    def embed(self, embedding: W) -> W:
        """The tokens' rows, [T, hidden_size]."""

    def attend(self, layer: int, x: W, project: Callable[[W], W]) -> W | None:
        """Stores the KV of `project`(rows of x), the fused Q, K and V, in the layer's pages, and
        gives what the rows attend to, [T, Hq * D]; None in the last layer of a pass of which no
        logits are wanted."""

    def by_rows(self, finish: Callable[[W, W], W], x: W, attended: W) -> W:
        """`finish` of the rows of x and `attended`, as many at a time as the engine likes."""

    def wanted_rows(self, x: W) -> W:
        """The rows whose logits are wanted."""

    def rms_norm(self, x: W, weight: W, reader: W | None = None) -> W:
        """`reader` is the projection that all that reads it multiplies it with, if there is one:
        the values may be what that takes only."""

    def linear(self, x: W, weight: W, bias: W | None = None) -> W:
        """x weight^T + bias."""

    def norm_heads(self, qkv: W, q_norm: W, k_norm: W) -> W:
        """The fused Q, K and V, with each head of Q and K normalised, weights [D]."""

    def add_linear(self, x: W, inputs: W, weight: W, bias: W | None = None) -> W:
        """x + inputs weight^T + bias, where tensor-parallel parts of the product are summed up."""

    def add_experts(self, x: W, inputs: W, layer: LayerWeights[W]) -> W:
        """x + what each row of `inputs` gets from its experts, where tensor-parallel parts of it
        are summed up."""

    def add_normed(self, x: W, inputs: W, weight: W, norm: W) -> W:
        """x + the rows of inputs weight^T, normalised with `norm`; parts as in `add_linear`."""

    def activate(self, gate_up: W, reader: W) -> W:
        """The activation of the gates, times the rest. For `reader`, as in `rms_norm`."""

    def logits(self, x: W, lm_head: W) -> W:
        """float32 x lm_head^T."""


def decode(
    ops: Operators[W],
    weights: ModelWeights[W],
    on_layer: Callable[[int], None] = lambda layer: None,
) -> W | None:
    """One forward pass; the wanted rows' logits, [R, vocab_size], if there are any.

    Args:
        on_layer: called with each layer's index when it is done.
    """

    def add(x: W, inputs: W, weight: W, bias: W | None, norm: W | None) -> W:
        if norm is None:
            return ops.add_linear(x, inputs, weight, bias)
        return ops.add_normed(x, inputs, weight, norm)

    x = ops.embed(weights.embedding)
    last = len(weights.layers) - 1
    for index, layer in enumerate(weights.layers):

        def project(rows: W, layer=layer) -> W:
            normed = ops.rms_norm(rows, layer.input_norm, layer.qkv)
            qkv = ops.linear(normed, layer.qkv, layer.qkv_bias)
            return qkv if layer.q_norm is None else ops.norm_heads(qkv, layer.q_norm, layer.k_norm)

        def finish(rows: W, attended: W, layer=layer) -> W:
            rows = add(rows, attended, layer.out, layer.out_bias, layer.out_norm)
            if layer.router is not None:
                return ops.add_experts(rows, ops.rms_norm(rows, layer.post_norm), layer)
            normed = ops.rms_norm(rows, layer.post_norm, layer.gate_up)
            gate_up = ops.linear(normed, layer.gate_up, layer.gate_up_bias)
            inner = ops.activate(gate_up, layer.down)
            return add(rows, inner, layer.down, layer.down_bias, layer.down_norm)

        attended = ops.attend(index, x, project)
        if attended is None:
            return None
        if index == last:  # from here on nobody wants the other rows
            x, attended = ops.wanted_rows(x), ops.wanted_rows(attended)
        x = ops.by_rows(finish, x, attended)
        del attended  # before the next layer's is made
        on_layer(index)
    return ops.logits(ops.rms_norm(x, weights.norm), weights.lm_head)
