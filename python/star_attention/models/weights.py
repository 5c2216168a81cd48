"""The weights of a model: one table of what a checkpoint holds and what the decoder makes of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from star_attention.errors import UserError, counted
from star_attention.models.config import ExpertsConfig, LayerConfig, ModelConfig

if TYPE_CHECKING:
    import torch

    from star_attention.ops.quantized import QuantizedRows

W = TypeVar("W")  # a tensor, or the name of a value of a graph


@dataclass(frozen=True)
class Stored:
    """A tensor of a file, of which a weight may be some rows.

    Attributes:
        shape: of the whole tensor.
        begin, end: the weight's rows, of the first dimension; None: the weight is all of it.
        less_one: the file has the weight less one.
    """

    name: str
    shape: tuple[int, ...]
    begin: int | None = None
    end: int | None = None
    less_one: bool = False


@dataclass(frozen=True)
class Weight:
    """A tensor that the decoder asks for.

    Attributes:
        field: of `LayerWeights` or `ModelWeights`. Weights of one field are stacked in order.
        layer: the layer's index; None: the weight is the model's.
        name: Hugging Face's, also where its files have it in another tensor.
        shape: of the whole; projections are [out, in].
        hf, gguf: where Hugging Face's and GGUF's files have it.
        split: the dimension in which tensor-parallel parts share it; None: each has all of it.
        rotary_heads: heads whose rows are rotated, which files have in another order; or 0.
        rotated: how many rows of such a head turn.
    """

    field: str
    layer: int | None
    name: str
    shape: tuple[int, ...]
    hf: Stored
    gguf: Stored
    split: int | None = None
    rotary_heads: int = 0
    rotated: int = 0

    def arranged(self, values: torch.Tensor) -> torch.Tensor:
        """The weight as the decoder wants it, from what Hugging Face has, or a value for each of
        its rows: rows of a head that turn with one another are half a head apart, also where not
        all of them turn."""
        size = self.shape[0] // max(1, self.rotary_heads)
        if not self.rotary_heads or self.rotated == size:
            return values
        turning, others = range(self.rotated), range(self.rotated, size)
        halves = [(each[: len(each) // 2], each[len(each) // 2 :]) for each in (turning, others)]
        order = [row for half in zip(*halves, strict=True) for rows in half for row in rows]
        return values.view(self.rotary_heads, size, *values.shape[1:])[:, order].view(values.shape)


@dataclass(frozen=True)
class LayerWeights(Generic[W]):
    """One decoder layer, fused as it computes. Projections are [out, in], norms [hidden_size].
    What a model does not have is None.

    Attributes:
        qkv: Q, K and V stacked, [(Hq + 2 Hkv) * D, hidden_size]; `qkv_bias` likewise.
        q_norm, k_norm: of each head, [D].
        out_norm, down_norm: of what attention and the MLP give.
        gate_up: gate over up, [2 * intermediate_size, hidden_size]; `gate_up_bias` likewise. Of
            experts, one's behind the other's.
        down: of experts, likewise.
        router: of experts, [experts, hidden_size].
    """

    input_norm: W
    qkv: W
    out: W
    post_norm: W
    gate_up: W
    down: W
    qkv_bias: W | None = None
    out_bias: W | None = None
    gate_up_bias: W | None = None
    down_bias: W | None = None
    q_norm: W | None = None
    k_norm: W | None = None
    out_norm: W | None = None
    down_norm: W | None = None
    router: W | None = None


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
        tensor: reads one weight of the table, as the decoder wants it, in its stored or dequantised
            dtype, or in FP8; raises UserError if it cannot be read.
        is_fp8: whether a weight is stored in FP8.
    """

    path: Path
    config: ModelConfig
    tensor: Callable[[Weight], torch.Tensor | QuantizedRows]
    is_fp8: Callable[[Weight], bool] = lambda weight: False


def check_stored(
    path: Path, shapes: Mapping[str, tuple[int, ...]], wanted: Iterable[Stored]
) -> None:
    """Raises UserError if a checkpoint lacks weights, has one of another shape than is wanted, or
    has some that would not be read.

    Args:
        shapes: of what it has.
    """
    unread = set(shapes)
    for stored in wanted:
        if stored.name not in shapes:
            raise UserError(f"{path}: the weights lack {stored.name}")
        if shapes[stored.name] != stored.shape:
            raise UserError(
                f"{path}: {stored.name} has shape {list(shapes[stored.name])}, "
                f"the config asks for {list(stored.shape)}"
            )
        unread.discard(stored.name)
    if unread:
        some = ", ".join(map(repr, sorted(unread)[:3])) + (" ..." if len(unread) > 3 else "")
        raise UserError(
            f"{path}: {counted(len(unread), 'weight')} of another architecture, or quantised: "
            f"{some}"
        )


def weight_table(config: ModelConfig) -> Iterator[Weight]:
    """Every weight of the model, in the order of their fields; a tied lm_head is none."""

    def weight(field: str, name: str, gguf: str, *shape: int, split: int | None = None) -> Weight:
        stored = Stored(name, shape, less_one=config.norms_less_one and field == "norm")
        return Weight(field, None, name, shape, stored, Stored(gguf, shape), split)

    vocabulary = config.vocab_size, config.hidden_size
    yield weight("embedding", "model.embed_tokens.weight", "token_embd.weight", *vocabulary)
    for index, layer in enumerate(config.layers):
        yield from _Layer(config, layer, index).table()
    yield weight("norm", "model.norm.weight", "output_norm.weight", config.hidden_size)
    if not config.tie_embeddings:
        yield weight("lm_head", "lm_head.weight", "output.weight", *vocabulary, split=0)


class _Layer:
    """The weights of one layer."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, index: int) -> None:
        self._config, self._layer, self._index = config, layer, index

    def table(self) -> Iterator[Weight]:
        config, layer = self._config, self._layer
        hidden, q = config.hidden_size, config.num_q_heads * config.head_dim
        yield self._one("input_norm", "input_layernorm.weight", "attn_norm.weight", hidden)
        yield from self._qkv("weight", "qkv", hidden)
        if layer.qkv_bias:
            yield from self._qkv("bias", "qkv_bias")
        if layer.qk_norm:
            for part in ("q", "k"):
                names = f"self_attn.{part}_norm.weight", f"attn_{part}_norm.weight"
                yield self._one(f"{part}_norm", *names, config.head_dim)
        out = "self_attn.o_proj", "attn_output"
        yield self._one("out", *_each(out, "weight"), hidden, q, split=1)
        if layer.out_bias:
            yield self._one("out_bias", *_each(out, "bias"), hidden)
        if layer.output_norms:
            names = "post_attention_layernorm.weight", "post_attention_norm.weight"
            yield self._one("out_norm", *names, hidden)
        before = "pre_feedforward" if layer.output_norms else "post_attention"
        yield self._one("post_norm", f"{before}_layernorm.weight", "ffn_norm.weight", hidden)
        if layer.output_norms:
            names = "post_feedforward_layernorm.weight", "post_ffw_norm.weight"
            yield self._one("down_norm", *names, hidden)
        yield from self._mlp() if layer.experts is None else self._experts(layer.experts)

    def _qkv(self, kind: str, field: str, *columns: int) -> Iterator[Weight]:
        config = self._config
        heads = {"q": config.num_q_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
        parts = [
            (f"self_attn.{p}_proj", f"attn_{p}", n * config.head_dim) for p, n in heads.items()
        ]
        fused = "self_attn.qkv_proj", "attn_qkv"
        stacked = self._stacked(field, kind, parts, fused, *columns)
        for weight, (part, count) in zip(stacked, heads.items(), strict=True):
            rotated = config.rope.rotated or config.head_dim
            yield weight if part == "v" else replace(weight, rotary_heads=count, rotated=rotated)

    def _mlp(self) -> Iterator[Weight]:
        hidden, inner = self._config.hidden_size, self._config.intermediate_size
        parts = [(f"mlp.{part}_proj", f"ffn_{part}", inner) for part in ("gate", "up")]
        fused, down = ("mlp.gate_up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down")
        yield from self._stacked("gate_up", "weight", parts, fused, hidden)
        if self._layer.mlp_bias:
            yield from self._stacked("gate_up_bias", "bias", parts, fused)
        yield self._one("down", *_each(down, "weight"), hidden, inner, split=1)
        if self._layer.mlp_bias:
            yield self._one("down_bias", *_each(down, "bias"), hidden)

    def _experts(self, experts: ExpertsConfig) -> Iterator[Weight]:
        hidden, inner = self._config.hidden_size, experts.intermediate_size
        yield self._one("router", "mlp.gate.weight", "ffn_gate_inp.weight", experts.count, hidden)
        for index in range(experts.count):
            for part in ("gate", "up"):
                yield self._expert("gate_up", part, index, inner, hidden, split=0)
        for index in range(experts.count):
            yield self._expert("down", "down", index, hidden, inner, split=1)

    def _expert(self, field: str, part: str, index: int, *shape: int, split: int) -> Weight:
        """GGUF files have those of all experts as one tensor."""
        names = f"mlp.experts.{index}.{part}_proj.weight", f"ffn_{part}_exps.weight"
        weight = self._one(field, *names, *shape, split=split)
        shape = self._layer.experts.count, *shape
        return replace(weight, gguf=Stored(weight.gguf.name, shape, index, index + 1))

    def _stacked(
        self,
        field: str,
        kind: str,
        parts: Sequence[tuple[str, str, int]],
        fused: tuple[str, str],
        *columns: int,
    ) -> Iterator[Weight]:
        """Parts of a field by their names and rows; checkpoints may have them as one tensor."""
        whole = self._one(field, *_each(fused, kind), sum(rows for *_, rows in parts), *columns)
        end = 0
        for hf, gguf, rows in parts:
            weight = self._one(field, *_each((hf, gguf), kind), rows, *columns, split=0)
            begin, end = end, end + rows
            if self._config.is_fused:
                places = {"begin": begin, "end": end}
                weight = replace(
                    weight, hf=replace(whole.hf, **places), gguf=replace(whole.gguf, **places)
                )
            yield weight

    def _one(
        self, field: str, name: str, gguf: str, *shape: int, split: int | None = None
    ) -> Weight:
        name, gguf = f"model.layers.{self._index}.{name}", f"blk.{self._index}.{gguf}"
        less_one = self._config.norms_less_one and field.endswith("norm")
        hf, gguf = Stored(name, shape, less_one=less_one), Stored(gguf, shape)
        return Weight(field, self._index, name, shape, hf, gguf, split)


def _each(names: tuple[str, str], kind: str) -> tuple[str, ...]:
    return tuple(f"{name}.{kind}" for name in names)


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
