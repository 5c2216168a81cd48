"""How a context is spread over blocks and ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from star_attention.errors import UserError

AnchorMode = Literal["recompute", "local", "broadcast"]
KvPlacement = Literal["tail", "round_robin"]
AttentionMethod = Literal["star", "ring", "dense"]
MergePath = Literal["auto", "peer", "nccl"]
KvDtype = Literal["auto", "fp8", "int8"]
Preset = Literal["paper"]

ANCHOR_MODES: tuple[AnchorMode, ...] = ("recompute", "local", "broadcast")
KV_PLACEMENTS: tuple[KvPlacement, ...] = ("tail", "round_robin")
MERGE_PATHS: tuple[MergePath, ...] = ("auto", "peer", "nccl")
KV_DTYPES: tuple[KvDtype, ...] = ("auto", "fp8", "int8")
PRESETS: tuple[Preset, ...] = ("paper",)
MAX_SELECTED_PAGES = 256  # what the kernels choose at most
ATTENTION_METHODS: tuple[AttentionMethod, ...] = ("star", "ring", "dense")


@dataclass(frozen=True)
class StarConfig:
    """How a context is cut into blocks, what the blocks share, and where new KV goes.

    Sizes are in tokens and multiples of `tokens_per_block`; others raise UserError.

    Attributes:
        block_size: tokens a block holds; None: the context over max(4, ranks), rounded up.
        anchor_size: leading context tokens that every block sees, at most `block_size`;
            None: `block_size`, as in the paper; 0: no anchor (ablation).
        anchor_mode: who computes the anchor's KV in phase 1: every block anew (`recompute`, the
            paper's formulation), every rank once (`local`), or all ranks together, once, whose
            pages are exchanged (`broadcast`; so are those of blocks that are left when each rank
            has as many). Same results.
        kv_placement: where the KV of generated tokens is kept: on the last rank (`tail`), or page
            by page over all ranks (`round_robin`). Same results.
        tokens_per_block: tokens a page of the KV cache holds (TensorRT-LLM's name).
        selected_pages: pages of earlier blocks that a page of rows sees besides, chosen for it in
            each KV head and layer; 0: none, the paper's method.
        attention: `star`; or an exact baseline: `ring`, whose KV passes by, or `dense`, one block
            of all ranks.
        kv_dtype: what contexts are kept in once they are read: `auto`, as they were computed, or 8
            bits, `fp8` (e4m3) or `int8`, with a scale for K and V of each page and KV head. One for
            all contexts of an `LLM`.
        preset: `paper`: the paper's setting, blocks of a quarter of the context on any number of
            ranks, anchor = block, no selected pages, which are not given beside it.

    Source: Star Attention, arXiv 2411.17116, section 2.
    """

    block_size: int | None = None
    anchor_size: int | None = None
    anchor_mode: AnchorMode = "broadcast"
    kv_placement: KvPlacement = "tail"
    tokens_per_block: int = 128
    attention: AttentionMethod = "star"
    selected_pages: int = 0
    preset: Preset | None = None
    kv_dtype: KvDtype = "auto"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("anchor_mode", ANCHOR_MODES),
            ("kv_placement", KV_PLACEMENTS),
            ("attention", ATTENTION_METHODS),
            ("preset", (None, *PRESETS)),
            ("kv_dtype", KV_DTYPES),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name} is {getattr(self, name)!r}: use one of {', '.join(map(str, allowed))}"
                )
        page = self.tokens_per_block
        if page < 1:
            raise UserError(f"tokens_per_block is {page}: use 1 or more")
        for name, size, least in (
            ("block size", self.block_size, page),
            ("anchor size", self.anchor_size, 0),
        ):
            if size is not None and size % page:
                raise UserError(
                    f"the {name} {size} is not a multiple of the page of {page} tokens "
                    f"(tokens_per_block): use {-(-size // page) * page}"
                )
            if size is not None and size < least:
                raise UserError(f"the {name} is {size}: use {least} tokens or more")
        if not 0 <= self.selected_pages <= MAX_SELECTED_PAGES:
            raise UserError(
                f"selected_pages is {self.selected_pages}: use 0 to {MAX_SELECTED_PAGES}"
            )
        if self.selected_pages and self.anchor_mode != "broadcast":
            raise UserError(
                f"selected pages go with the anchor mode broadcast, not {self.anchor_mode}"
            )
        if self.preset:
            self._check_preset()
        if self.block_size is not None:
            self.check_anchor(self.block_size)

    def _check_preset(self) -> None:
        for name, value, default in (
            ("block size", self.block_size, None),
            ("anchor size", self.anchor_size, None),
            ("number of selected pages", self.selected_pages, 0),
            ("attention", self.attention, "star"),
        ):
            if value != default:
                raise UserError(
                    f"the {name} {value} is not the preset {self.preset}'s: leave one of them away"
                )

    def default_blocks(self, num_ranks: int) -> int:
        """Blocks of a context if no block size is given."""
        if self.attention != "star":
            return 1
        return 4 if self.preset == "paper" else max(4, num_ranks)

    def check_anchor(self, block_size: int) -> None:
        """Raises UserError if the anchor does not fit into blocks of `block_size` tokens."""
        if self.anchor_size is not None and self.anchor_size > block_size:
            raise UserError(
                f"the anchor size is {self.anchor_size}: use 0 to {block_size} tokens "
                "(the block size)"
            )
