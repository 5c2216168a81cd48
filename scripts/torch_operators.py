#!/usr/bin/env python3
"""Star Attention's operators in plain torch, compiled: one attention layer reads a context in two
blocks with an anchor, then answers a question, and is compared with dense attention under the
block-sparse mask. A start for an attention backend of your own.

python scripts/torch_operators.py [--device cuda] [--backend inductor]
"""

import argparse

import torch
from torch.nn import functional as F

import star_attention.ops.torch_library  # noqa: F401  defines torch.ops.star_attention

HEADS, KV_HEADS, HEAD_DIM, PAGE = 8, 2, 64, 64
BLOCK, ANCHOR, QUESTION = 256, 128, 10
CONTEXT = 2 * BLOCK
SCALE = HEAD_DIM**-0.5
star = torch.ops.star_attention


def attention_layer(qkv, positions, rotary, kv_pool, slots, page_table, cu_seqlens_q, kv_lens):
    """From the fused projection [T, (HEADS + 2 KV_HEADS) * HEAD_DIM] to the heads' outputs."""
    q = qkv.new_empty(qkv.shape[0], HEADS, HEAD_DIM)
    star.rope_append(qkv, positions, rotary, kv_pool, slots, q)
    o, _ = star.paged_attention(
        q, kv_pool, page_table, cu_seqlens_q, kv_lens, True, SCALE, BLOCK, CONTEXT + QUESTION
    )
    return o


def dense(qkv, rotary):
    """The same in float32 under the mask of docs/architecture.md."""
    heads = qkv.float().view(len(qkv), -1, HEAD_DIM).transpose(0, 1)
    q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS])
    cos, sin = rotary[: len(qkv)].chunk(2, dim=-1)

    def rotated(x):
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    i, j = (torch.arange(len(qkv), device=qkv.device).view(shape) for shape in ((-1, 1), (1, -1)))
    seen = (j <= i) & ((i >= CONTEXT) | (i // BLOCK == j // BLOCK) | (j < ANCHOR))
    o = F.scaled_dot_product_attention(
        rotated(q)[None], rotated(k)[None], v[None], seen, scale=SCALE, enable_gqa=True
    )
    return o[0].transpose(0, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    options = parser.parse_args()
    torch.manual_seed(0)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    total = CONTEXT + QUESTION
    frequencies = 1e4 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.outer(torch.arange(total), frequencies)
    rotary = torch.cat((angles.cos(), angles.sin()), dim=-1).to(options.device)
    qkv = torch.randn(total, (HEADS + 2 * KV_HEADS) * HEAD_DIM, device=options.device).to(dtype)
    num_pages = -(-total // PAGE)
    kv_pool = torch.zeros(num_pages, 2, KV_HEADS, PAGE, HEAD_DIM, device=qkv.device).to(dtype)
    layer = torch.compile(attention_layer, backend=options.backend, fullgraph=True, dynamic=True)

    def step(begin, end, *page_lists):
        """Tokens begin to end, as many sequences of equal length as there are page lists."""

        def ints(values):
            return torch.tensor(values, dtype=torch.int32, device=qkv.device)

        each = (end - begin) // len(page_lists)
        width = max(map(len, page_lists))
        tokens = torch.arange(begin, end, dtype=torch.int32, device=qkv.device)  # slot = position
        table = ints([[*pages, *[0] * (width - len(pages))] for pages in page_lists])
        kv_lens = ints([min(len(pages) * PAGE, total) for pages in page_lists])
        starts = ints([each * i for i in range(len(page_lists) + 1)])
        return layer(qkv[begin:end], tokens, rotary, kv_pool, tokens, table, starts, kv_lens)

    pages = list(range(num_pages))
    anchor, first, second, question = (
        pages[a // PAGE : -(-b // PAGE)]
        for a, b in ((0, ANCHOR), (0, BLOCK), (BLOCK, CONTEXT), (CONTEXT, total))
    )
    context = step(0, CONTEXT, first, anchor + second)  # phase 1: both blocks in one batch
    answer = step(CONTEXT, total, first + second + question)  # phase 2: sees everything
    error = (torch.cat((context, answer)).float() - dense(qkv, rotary)).abs().max().item()
    print(f"{options.device}, {dtype}, {options.backend}: off by at most {error:.1e}")
    if error > (2e-2 if options.device == "cuda" else 1e-4):
        raise SystemExit("the operators and dense attention disagree")


if __name__ == "__main__":
    main()
