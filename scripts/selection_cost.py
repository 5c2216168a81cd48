"""What choosing pages costs beside phase 1: the tables of docs/selection.md, by arithmetic.

    python scripts/selection_cost.py [--tflops 650] [--read-tbps 3.0]

Llama-3.1-8B, blocks of 8K, an anchor of 512 tokens, 16 pages of 128 tokens for each tile of 128
rows and KV head; FLOPs of the plan (`star_attention.plan`), of the chosen pages' attention, and of
each score. Times are FLOPs and bytes at a rate: no measurement.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from star_attention.config import StarConfig
from star_attention.models.config import LLAMA_3_1_8B, ModelConfig
from star_attention.plan import Cost, make_plan

PAGE, TILE, PAGES, ANCHOR = 128, 128, 16, 512


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
        """Of (row, earlier key) pairs of one head, in all layers and heads."""
        pooled = self.rows * (model.num_q_heads // model.num_kv_heads if self.heads else 1)
        return pairs * model.num_layers * self.products(model) // (self.keys * pooled)

    def products(self, model: ModelConfig) -> int:
        return 2 * model.num_q_heads * model.head_dim * self.width

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tflops", type=float, default=650, help="of GEMMs and attention")
    parser.add_argument("--read-tbps", type=float, default=3.0)
    options = parser.parse_args()
    model = LLAMA_3_1_8B
    print(
        "| tokens | block / anchor | GEMMs | anchor, block | pages | phase 1 | s | of the first |"
    )
    print("|---|---|---|---|---|---|---|---|")
    wholes = {}
    for tokens in (1 << 17, 1 << 20):
        for block, anchor in ((1 << 15, 1 << 15), (1 << 14, ANCHOR), (1 << 13, ANCHOR)):
            plan = make_plan(tokens, StarConfig(block_size=block, anchor_size=anchor), 1, model)
            local = sum((each.cost for each in plan.blocks), Cost())
            gemms = Cost(tokens=local.tokens).flops(model)
            chosen = chosen_pairs(tokens, block) if anchor == ANCHOR else 0
            parts = gemms, Cost(pairs=local.pairs).flops(model), Cost(pairs=chosen).flops(model)
            wholes[tokens, block] = whole = sum(parts)
            cells = [f"{part / 1e15:.3g}" for part in (*parts, whole)]
            seconds = whole / options.tflops / 1e12
            share = whole / wholes[tokens, 1 << 15]
            print(
                f"| {tokens >> 10}K | {block} / {anchor} | "
                + " | ".join(cells)
                + f" | {seconds:.2f} | {share:.2f} |"
            )
    print()
    print("| score | of QKᵀ | 128K: PFLOP | s | of phase 1 | 1M: PFLOP | s | of phase 1 | MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for score in SCORES:
        share = score.flops(model, 1 << 30) / SCORES[0].flops(model, 1 << 30)
        line = f"| {score.name} | 1/{1 / share:.0f} |"
        for tokens in (1 << 17, 1 << 20):
            flops = score.flops(model, candidate_pairs(tokens, 1 << 13))
            seconds = flops / options.tflops / 1e12
            share = flops / wholes[tokens, 1 << 13]
            line += f" {flops / 1e15:.2g} | {seconds:.2g} | {100 * share:.1f} % |"
        print(line + f" {score.summary_bytes(model, 1 << 20) / 2**20:.0f} |")
    print()
    print("| tokens | lists, MiB a layer | scores, MiB a layer | write and read scores, s |")
    print("|---|---|---|---|")
    for tokens in (1 << 17, 1 << 20):
        tiles = tokens // TILE * model.num_kv_heads
        lists = tiles * (PAGES + 1) * 4
        scores = candidate_pairs(tokens, 1 << 13) // (TILE * PAGE) * model.num_kv_heads * 4
        seconds = 2 * scores * model.num_layers / options.read_tbps / 1e12
        print(f"| {tokens >> 10}K | {lists / 2**20:.1f} | {scores / 2**20:.0f} | {seconds:.3f} |")


if __name__ == "__main__":
    main()
