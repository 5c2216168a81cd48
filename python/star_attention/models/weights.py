"""The weights of a model: one table of what a checkpoint holds and what the decoder makes of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from star_attention.errors import UserError, counted
from star_attention.models.config import LayerConfig, ModelConfig

if TYPE_CHECKING:
    import torch

W = TypeVar("W")  # a tensor, or the name of a value of a graph


@dataclass(frozen=True)
class Weight:
    """A tensor of a checkpoint.

    Attributes:
        field: of `LayerWeights` or `ModelWeights`. Weights of one field are stacked in order.
        layer: the layer's index; None: the weight is the model's.
        name, gguf: what Hugging Face's and GGUF's files call it.
        shape: of the whole; projections are [out, in].
        split: the dimension in which tensor-parallel parts share it; None: each has all of it.
        rotary_heads: heads whose rows are rotated, which llama.cpp stores in another order; or 0.
    """

    field: str
    layer: int | None
    name: str
    gguf: str
    shape: tuple[int, ...]
    split: int | None = None
    rotary_heads: int = 0


@dataclass(frozen=True)
class LayerWeights(Generic[W]):
    """One decoder layer, fused as it computes. Projections are [out, in], norms [hidden_size].

    Attributes:
        qkv: Q, K and V stacked, [(Hq + 2 Hkv) * D, hidden_size]; `qkv_bias` likewise, or None.
        gate_up: gate over up, [2 * intermediate_size, hidden_size].
    """

    input_norm: W
    qkv: W
    out: W
    post_norm: W
    gate_up: W
    down: W
    qkv_bias: W | None = None


@dataclass(frozen=True)
class ModelWeights(Generic[W]):
    """All weights; `lm_head` is `embedding` itself, or rows of it, where the model ties them."""

    embedding: W
    layers: tuple[LayerWeights[W], ...]
    norm: W
    lm_head: W


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    Attributes:
        path: the folder or the GGUF file.
        config: its shape.
        tensor: reads one weight by its Hugging Face name, of the shape that the config asks for,
            in its stored or dequantised dtype; raises UserError if it cannot be read.
    """

    path: Path
    config: ModelConfig
    tensor: Callable[[str], torch.Tensor]


def check_stored(path: Path, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> None:
    """Raises UserError if a checkpoint lacks weights, has one of another shape than the config asks
    for, or has some that would not be read.

    Args:
        shapes: of what it has, by Hugging Face's names.
    """
    unread = set(shapes)
    for weight in weight_table(config):
        if weight.name not in shapes:
            raise UserError(f"{path}: the weights lack {weight.name}")
        if shapes[weight.name] != weight.shape:
            raise UserError(
                f"{path}: {weight.name} has shape {list(shapes[weight.name])}, "
                f"the config asks for {list(weight.shape)}"
            )
        unread.remove(weight.name)
    if unread:
        some = ", ".join(map(repr, sorted(unread)[:3])) + (" ..." if len(unread) > 3 else "")
        raise UserError(
            f"{path}: {counted(len(unread), 'weight')} of another architecture, or quantised: "
            f"{some}"
        )


def weight_table(config: ModelConfig) -> Iterator[Weight]:
    """Every tensor that a checkpoint of the model holds; a tied lm_head is none."""
    vocabulary = config.vocab_size, config.hidden_size
    yield Weight("embedding", None, "model.embed_tokens.weight", "token_embd.weight", vocabulary)
    for index, layer in enumerate(config.layers):
        yield from _layer_table(config, layer, index)
    yield Weight("norm", None, "model.norm.weight", "output_norm.weight", (config.hidden_size,))
    if not config.tie_embeddings:
        yield Weight("lm_head", None, "lm_head.weight", "output.weight", vocabulary, split=0)


def _layer_table(config: ModelConfig, layer: LayerConfig, index: int) -> Iterator[Weight]:
    hidden, inner = config.hidden_size, config.intermediate_size
    q_heads, kv_heads = config.num_q_heads, config.num_kv_heads
    q, kv = q_heads * config.head_dim, kv_heads * config.head_dim

    def weight(
        field: str,
        name: str,
        gguf: str,
        *shape: int,
        split: int | None = None,
        heads: int = 0,
    ) -> Weight:
        full_name, full_gguf = f"model.layers.{index}.{name}", f"blk.{index}.{gguf}"
        return Weight(field, index, full_name, full_gguf, shape, split, heads)

    yield weight("input_norm", "input_layernorm.weight", "attn_norm.weight", hidden)
    for kind, field, columns in (("weight", "qkv", (hidden,)), ("bias", "qkv_bias", ())):
        if kind == "bias" and not layer.qkv_bias:
            continue
        for part, rows, heads in (("q", q, q_heads), ("k", kv, kv_heads), ("v", kv, 0)):
            names = f"self_attn.{part}_proj.{kind}", f"attn_{part}.{kind}"
            yield weight(field, *names, rows, *columns, split=0, heads=heads)
    yield weight("out", "self_attn.o_proj.weight", "attn_output.weight", hidden, q, split=1)
    yield weight("post_norm", "post_attention_layernorm.weight", "ffn_norm.weight", hidden)
    yield weight("gate_up", "mlp.gate_proj.weight", "ffn_gate.weight", inner, hidden, split=0)
    yield weight("gate_up", "mlp.up_proj.weight", "ffn_up.weight", inner, hidden, split=0)
    yield weight("down", "mlp.down_proj.weight", "ffn_down.weight", hidden, inner, split=1)


def assemble(
    config: ModelConfig,
    make: Callable[[Sequence[Weight]], W],
    tied_lm_head: Callable[[W], W] = lambda embedding: embedding,
) -> ModelWeights[W]:
    """All weights, each made of the checkpoint's tensors of its field.

    Args:
        make: called in the table's order.
        tied_lm_head: from the embedding to the lm_head of a model that ties them.
    """
    made: dict[int | None, dict[str, W]] = {}
    for (layer, field), parts in itertools.groupby(
        weight_table(config), key=lambda weight: (weight.layer, weight.field)
    ):
        made.setdefault(layer, {})[field] = make(list(parts))
    model = made.pop(None)
    model.setdefault("lm_head", tied_lm_head(model["embedding"]))
    return ModelWeights(layers=tuple(LayerWeights(**layer) for layer in made.values()), **model)
