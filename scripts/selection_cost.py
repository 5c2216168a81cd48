"""What choosing pages costs beside phase 1: the tables of docs/selection.md, by arithmetic.

    python scripts/selection_cost.py [--tflops 650] [--read-tbps 3.0]

Llama-3.1-8B, blocks of 8K, an anchor of 512 tokens, 16 pages of 128 tokens for each tile of 128
rows and KV head; FLOPs of the plan (`star_attention.plan`), of the chosen pages' attention, and of
each score. Times are FLOPs and bytes at a rate: no measurement.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from star_attention.config import StarConfig
from star_attention.models.config import LLAMA_3_1_8B, ModelConfig
from star_attention.plan import make_plan
from star_attention.spans import Cost

PAGE, TILE, PAGES, ANCHOR, BLOCK = 128, 128, 16, 512, 1 << 13
LENGTHS = 1 << 17, 1 << 20


@dataclass(frozen=True)
class Score:
    """A score: means of `keys` keys, twice as wide for bounds, and of `rows` rows and, perhaps, of
    a group's heads."""

    name: str
    keys: int = 16
    rows: int = 1
    heads: bool = False
    width: int = 1

    def flops(self, model: ModelConfig, pairs: int) -> int:
        """Of so many pairs of a row and an earlier key, in all layers and heads."""
        pooled = self.rows * (model.num_q_heads // model.num_kv_heads if self.heads else 1)
        a_pair = 2 * model.num_layers * model.num_q_heads * model.head_dim * self.width
        return pairs * a_pair // (self.keys * pooled)

    def summary_bytes(self, model: ModelConfig, tokens: int) -> int:
        """Of one layer, 16 bits an element."""
        return tokens // self.keys * model.num_kv_heads * model.head_dim * self.width * 2


SCORES = (
    Score("all.local (exact)", keys=1),
    Score("quest16", width=2),
    Score("mean8", keys=8),
    Score("mean16"),
    Score("mean32", keys=32),
    Score("mean16.rows4", rows=4),
    Score("mean32.rows4", keys=32, rows=4),
    Score("mean16.rows16", rows=16),
    Score("mean16.heads4", rows=4, heads=True),
    Score("mean16.heads16", rows=16, heads=True),
)


def candidate_pairs(tokens: int, block: int) -> int:
    """(Row, key) pairs of rows and the keys behind the anchor in blocks before theirs."""
    return sum(
        (min(start + block, tokens) - start) * (start - ANCHOR)
        for start in range(block, tokens, block)
    )


def chosen_pairs(tokens: int, block: int) -> int:
    """(Row, key) pairs of rows and their chosen pages."""
    return sum(
        (min(start + block, tokens) - start) * min(PAGES * PAGE, start - ANCHOR)
        for start in range(block, tokens, block)
    )


def phase1_table(model: ModelConfig, tflops: float) -> Iterator[str]:
    yield "| tokens | block / anchor | GEMMs | anchor, block | pages | phase 1 | s | of the first |"
    yield "|---|---|---|---|---|---|---|---|"
    for tokens in LENGTHS:
        sizes = (1 << 15, 1 << 15), (1 << 14, ANCHOR), (BLOCK, ANCHOR)
        first = sum(phase1_flops(model, tokens, *sizes[0]))
        for block, anchor in sizes:
            parts = phase1_flops(model, tokens, block, anchor)
            whole = sum(parts)
            cells = " | ".join(f"{part / 1e15:.3g}" for part in (*parts, whole))
            end = f"{whole / tflops / 1e12:.2f} | {whole / first:.2f} |"
            yield f"| {tokens >> 10}K | {block} / {anchor} | {cells} | {end}"


def phase1_flops(model: ModelConfig, tokens: int, block: int, anchor: int) -> tuple[int, int, int]:
    """Of GEMMs, of attention to anchor and own block, and, if the anchor is the short one, of
    attention to chosen pages."""
    plan = make_plan(tokens, StarConfig(block_size=block, anchor_size=anchor), 1, model)
    cost = plan.rank_costs[0]
    chosen = chosen_pairs(tokens, block) if anchor == ANCHOR else 0
    parts = Cost(tokens=cost.tokens), Cost(pairs=cost.pairs), Cost(pairs=chosen)
    gemms, local, pages = (part.flops(model) for part in parts)
    return gemms, local, pages


def score_table(model: ModelConfig, tflops: float) -> Iterator[str]:
    yield "| score | of QKᵀ | 128K: PFLOP | s | of phase 1 | 1M: PFLOP | s | of phase 1 | MiB |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for score in SCORES:
        share = SCORES[0].flops(model, 1 << 30) // score.flops(model, 1 << 30)
        line = f"| {score.name} | 1/{share} |"
        for tokens in LENGTHS:
            flops = score.flops(model, candidate_pairs(tokens, BLOCK))
            share = flops / sum(phase1_flops(model, tokens, BLOCK, ANCHOR))
            line += f" {flops / 1e15:.2g} | {flops / tflops / 1e12:.2g} | {100 * share:.1f} % |"
        yield line + f" {score.summary_bytes(model, LENGTHS[-1]) / 2**20:.0f} |"


def list_table(model: ModelConfig, read_tbps: float) -> Iterator[str]:
    yield "| tokens | lists, MiB a layer | scores, MiB a layer | write and read scores, s |"
    yield "|---|---|---|---|"
    for tokens in LENGTHS:
        lists = tokens // TILE * model.num_kv_heads * (PAGES + 1) * 4
        scores = candidate_pairs(tokens, BLOCK) // (TILE * PAGE) * model.num_kv_heads * 4
        seconds = 2 * scores * model.num_layers / read_tbps / 1e12
        sizes = f"{lists / 2**20:.1f} | {scores / 2**20:.0f}"
        yield f"| {tokens >> 10}K | {sizes} | {seconds:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tflops", type=float, default=650, help="of GEMMs and attention")
    parser.add_argument("--read-tbps", type=float, default=3.0)
    options = parser.parse_args()
    for table in (
        phase1_table(LLAMA_3_1_8B, options.tflops),
        score_table(LLAMA_3_1_8B, options.tflops),
        list_table(LLAMA_3_1_8B, options.read_tbps),
    ):
        print("\n".join(table), end="\n\n")


if __name__ == "__main__":
    main()
