"""A mixture of experts: each row goes through the few that its router chooses.

Weights of experts lie one behind the other, as in `LayerWeights`. Source: Shazeer et al., arXiv
1701.06538, with the router of Qwen3, arXiv 2505.09388.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from star_attention import ops
from star_attention.models.config import ExpertsConfig
from star_attention.models.weights import LayerWeights

# To read, write and read again what is copied.
_COPY = 3


def route(
    inputs: torch.Tensor, router: torch.Tensor, experts: ExpertsConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's experts, int64 [T, K], and how much they count, in the dtype of `inputs`."""
    logits = ops.linear(inputs, router)
    shares, chosen = logits.softmax(-1, dtype=torch.float32).topk(experts.per_token, dim=-1)
    if experts.normalises:
        shares = shares / shares.sum(-1, keepdim=True)
    return chosen, shares.to(inputs.dtype)


def mix_by_expert(
    inputs: torch.Tensor, layer: LayerWeights[torch.Tensor], experts: ExpertsConfig
) -> torch.Tensor:
    """What the rows get, [T, hidden_size]: rows are sorted by expert, and each expert that has some
    computes them together. The host waits for their numbers."""
    chosen, shares = route(inputs, layer.router, experts)
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    rows, shares = order // experts.per_token, shares.flatten()[order, None]
    counts = flat.bincount(minlength=experts.count).tolist()
    gate_up, down = (w.view(experts.count, -1, w.shape[1]) for w in (layer.gate_up, layer.down))
    mixed = torch.zeros_like(inputs)
    for expert, (its_rows, its_shares) in enumerate(
        zip(rows.split(counts), shares.split(counts), strict=True)
    ):
        if len(its_rows):
            inner = ops.silu_mul(ops.linear(inputs[its_rows], gate_up[expert]))
            mixed.index_add_(0, its_rows, ops.linear(inner, down[expert]) * its_shares)
    return mixed


def mix_captured(
    inputs: torch.Tensor, layer: LayerWeights[torch.Tensor], experts: ExpertsConfig
) -> torch.Tensor:
    """The same for a CUDA graph, of which the host sees no numbers. Few rows copy the weights of
    their own experts; where that takes longer than to read all of them, all rows go through all."""
    chosen, shares = route(inputs, layer.router, experts)
    gate_up, down = (w.view(experts.count, -1, w.shape[1]) for w in (layer.gate_up, layer.down))
    if _COPY * chosen.numel() < experts.count:
        each = chosen.flatten()
        repeated = inputs.repeat_interleave(experts.per_token, 0)[:, None]
        out = _through(repeated, gate_up[each], down[each])
        return (out.view(*chosen.shape, inputs.shape[1]) * shares[..., None]).sum(1)
    out = _through(inputs.expand(experts.count, -1, -1), gate_up, down)
    weights = shares.new_zeros(len(inputs), experts.count).scatter_(1, chosen, shares)
    return (out * weights.t()[..., None]).sum(0)


def _through(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """x [B, n, hidden_size] through gate_up [B, 2 I, hidden_size] and down [B, hidden_size, I]."""
    gate, up = torch.bmm(x, gate_up.transpose(1, 2)).chunk(2, dim=-1)
    return torch.bmm(F.silu(gate) * up, down.transpose(1, 2))
