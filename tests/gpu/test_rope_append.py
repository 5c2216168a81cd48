import pytest
import torch

from star_attention.ops import reference

cuda = pytest.importorskip("star_attention.ops.cuda", exc_type=ImportError)


def rotary_table(positions: int, head_dim: int) -> torch.Tensor:
    frequencies = 1e4 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page", [64, 128])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(8, 2), (7, 1), (9, 3), (32, 8), (5, 5)])
def test_matches_the_reference(dtype, head_dim, page, q_heads, kv_heads):
    tokens, pages = 301, 8
    rotary = rotary_table(10000, head_dim)
    fused = torch.randn(tokens, (q_heads + 2 * kv_heads) * head_dim + 8).to(dtype)
    qkv = fused[:, :-8]
    positions = torch.randint(0, 10000, (tokens,), dtype=torch.int32)
    slots = torch.randperm(pages * page)[:tokens].int()
    slots[::7] = -1
    pool = torch.randn(pages, 2, kv_heads, page, head_dim).to(dtype)

    device_pool = pool.cuda()
    q = torch.full((tokens, q_heads, head_dim), torch.nan, dtype=dtype, device="cuda")
    cuda.rope_append(
        fused.cuda()[:, :-8], positions.cuda(), rotary.cuda(), device_pool, slots.cuda(), q
    )
    expected = torch.empty(q.shape, dtype=dtype)
    reference.rope_append(qkv.contiguous(), positions, rotary, pool, slots, expected)
    # The compiler may fuse a product into the sum: one rounding of the 16-bit result apart.
    torch.testing.assert_close(q.cpu(), expected, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(device_pool.cpu(), pool, rtol=1e-2, atol=1e-3)
    assert torch.equal(device_pool.cpu()[:, 1], pool[:, 1])


def test_no_tokens():
    pool = torch.zeros(1, 2, 2, 64, 64, dtype=torch.float16, device="cuda")
    empty = torch.empty(0, dtype=torch.int32, device="cuda")
    qkv = torch.empty(0, 6 * 64, dtype=torch.float16, device="cuda")
    rotary = rotary_table(4, 64).cuda()
    cuda.rope_append(qkv, empty, rotary, pool, empty, qkv.new_empty(0, 2, 64))
    assert not pool.any()


def test_pool_of_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of GPU memory")
    pool = torch.zeros(70000, 2, 1, 128, 128, dtype=torch.bfloat16, device="cuda")
    qkv = torch.randn(1, 3 * 128, dtype=torch.bfloat16, device="cuda")
    slot = torch.tensor([69999 * 128 + 5], dtype=torch.int32, device="cuda")
    position = torch.zeros(1, dtype=torch.int32, device="cuda")
    q = qkv.new_empty(1, 1, 128)
    cuda.rope_append(qkv, position, rotary_table(1, 128).cuda(), pool, slot, q)
    assert torch.equal(pool[69999, :, 0, 5].flatten(), qkv[0, 128:])
    assert int(pool.count_nonzero()) == int(qkv[0, 128:].count_nonzero())
