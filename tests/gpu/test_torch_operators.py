import pytest
import torch
from paged import Problem

from star_attention import ops
from star_attention.ops import torch_library

pytest.importorskip("star_attention.ops.cuda", exc_type=ImportError)

star = torch.ops.star_attention


def attention_arguments():
    problem = Problem([(7, 300), (130, 130)], head_dim=64, page=64)
    problem.kv_pool.nan_to_num_()  # opcheck takes NaN for a change
    arguments = problem.arguments()
    names = ("q", "kv_pool", "page_table", "cu_seqlens_q", "kv_lens")
    names += ("causal", "scale", "max_q_len", "max_kv_len")
    return tuple(arguments[name] for name in names)


def rope_arguments():
    tokens, q_heads, kv_heads, head_dim, page = 33, 8, 2, 64, 64
    qkv = torch.randn(tokens, (q_heads + 2 * kv_heads) * head_dim, device="cuda").half()
    positions = torch.arange(tokens, dtype=torch.int32, device="cuda")
    pool = torch.zeros(2, 2, kv_heads, page, head_dim, dtype=torch.float16, device="cuda")
    q = qkv.new_empty(tokens, q_heads, head_dim)
    angles = torch.randn(tokens, head_dim // 2, device="cuda")
    rotary = torch.cat((angles.cos(), angles.sin()), dim=-1)
    return qkv, positions, rotary, pool, positions.clone(), q


def merge_arguments():
    o = torch.randn(3, 7, 8, 64, dtype=torch.bfloat16, device="cuda")
    return o, torch.randn(3, 7, 8, device="cuda"), torch.float32


CASES = {
    "paged_attention": attention_arguments,
    "rope_append": rope_arguments,
    "merge_lse": merge_arguments,
}


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    torch.library.opcheck(getattr(star, name).default, CASES[name]())


def test_compiled():
    *tensors, causal, scale, rows, length = attention_arguments()
    compiled = torch.compile(torch_library.paged_attention, fullgraph=True)
    got = compiled(*tensors, causal, scale, rows, length)
    options = {"causal": causal, "scale": scale, "max_q_len": rows, "max_kv_len": length}
    for tensor, expected in zip(got, ops.paged_attention(*tensors, **options), strict=True):
        assert torch.equal(tensor, expected)
