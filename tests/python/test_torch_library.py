"""The torch.library operators on the CPU: what PyTorch asks of an operator, and torch.compile."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from star_attention import ops
from star_attention.ops import torch_library
from test_ops import random_case

ROOT = Path(__file__).parents[2]
star = torch.ops.star_attention


def attention_arguments():
    q, pool, table, starts, kv_lens, _ = random_case(0, (5, 3), (40, 17), 8, (6, 2), 16)
    return q, pool, table, starts, kv_lens, True, 0.25, 5, 40


def rope_arguments(tokens=11, page=8):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(tokens, (6 + 2 * 2) * 16, generator=generator)
    pool = torch.randn(3, 2, 2, page, 16, generator=generator)
    positions = torch.arange(tokens, dtype=torch.int32)
    slots = torch.randperm(3 * page, generator=generator)[:tokens].int()
    slots[3:4] = -1
    angles = torch.randn(tokens, 8, generator=generator)
    rotary = torch.cat((angles.cos(), angles.sin()), dim=-1)
    return qkv, positions, rotary, pool, slots, torch.empty(tokens, 6, 16)


def merge_arguments():
    generator = torch.Generator().manual_seed(0)
    o = torch.randn(3, 7, 6, 16, generator=generator)
    lse = torch.randn(3, 7, 6, generator=generator)
    lse[1] = -torch.inf
    return o, lse


CASES = {
    "paged_attention": [attention_arguments()],
    "rope_append": [rope_arguments(), rope_arguments(tokens=0)],
    "merge_lse": [
        merge_arguments(),
        (*merge_arguments(), torch.bfloat16),
        tuple(tensor.transpose(1, 2) for tensor in merge_arguments()),
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    for arguments in CASES[name]:
        torch.library.opcheck(getattr(star, name).default, arguments)


def test_what_they_mutate():
    mutated = {
        name: [a.name for a in getattr(star, name).default._schema.arguments if a.is_write]
        for name in CASES
    }
    assert mutated == {"paged_attention": [], "rope_append": ["kv_pool", "q"], "merge_lse": []}


def test_attention_compiled_is_attention():
    *tensors, causal, scale, rows, length = attention_arguments()
    compiled = torch.compile(torch_library.paged_attention, backend="aot_eager", fullgraph=True)
    got = compiled(*tensors, causal, scale, rows, length)
    options = {"causal": causal, "scale": scale, "max_q_len": rows, "max_kv_len": length}
    for tensor, expected in zip(got, ops.paged_attention(*tensors, **options), strict=True):
        assert torch.equal(tensor, expected)


def test_compiled_code_sees_what_rope_append_wrote():
    qkv, positions, rotary, pool, slots, q = rope_arguments()
    expected_pool, expected_q = pool.clone(), q.clone()
    ops.rope_append(qkv, positions, rotary, expected_pool, slots, expected_q)

    def append(pool, q):
        star.rope_append(qkv, positions, rotary, pool, slots, q)
        return pool + 1, q * 2

    compiled = torch.compile(append, backend="aot_eager", fullgraph=True)
    got_pool, got_q = compiled(pool, q)
    assert torch.equal(pool, expected_pool)
    assert torch.equal(q, expected_q)
    assert torch.equal(got_pool, pool + 1)
    assert torch.equal(got_q, q * 2)


def test_example():
    script = ROOT / "scripts/torch_operators.py"
    run = subprocess.run(
        [sys.executable, script, "--backend", "aot_eager"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "cpu, torch.float32, aot_eager: off by at most" in run.stdout
