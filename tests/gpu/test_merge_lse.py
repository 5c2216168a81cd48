import pytest
import torch

cuda = pytest.importorskip("star_attention.ops.cuda", exc_type=ImportError)

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 1e-6}


def merged(o: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = lse.double().logsumexp(0)
    weights = (lse.double() - total).exp().nan_to_num(nan=0.0)[..., None]
    return torch.where(weights > 0, weights * o.double(), 0.0).sum(0), total


def check(o, lse, out, out_lse):
    expected, expected_lse = merged(o, lse)
    error = float((out.double() - expected).norm() / expected.norm().clamp_min(1e-30))
    assert error <= TOLERANCE[out.dtype], f"o is off by {error:.2e}"
    torch.testing.assert_close(out_lse.double(), expected_lse, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shards", [1, 2, 3, 8, 17])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim"), [(1, 32, 128), (5, 3, 64), (1000, 7, 128)]
)
def test_matches_float64(dtype, out_dtype, shards, tokens, heads, head_dim):
    o = torch.randn(shards, tokens, heads, head_dim, device="cuda").to(dtype)
    lse = 10 * torch.randn(shards, tokens, heads, device="cuda")
    check(o, lse, *cuda.merge_lse(o, lse, out_dtype=out_dtype))


def test_empty_shards_and_rows():
    o = torch.randn(3, 4, 2, 64, dtype=torch.float16, device="cuda")
    lse = torch.randn(3, 4, 2, device="cuda")
    lse[1] = -torch.inf
    o[1] = torch.nan  # nothing of an empty shard counts
    lse[:, 2] = -torch.inf
    out, out_lse = cuda.merge_lse(o, lse)
    check(o, lse, out, out_lse)
    assert (out[2] == 0).all()
    assert (out_lse[2] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shards", [1, 3, 17])
def test_nan_surfaces(shards, dtype):
    o = torch.randn(shards, 5, 2, 64, dtype=dtype, device="cuda")
    lse = torch.randn(shards, 5, 2, device="cuda")
    lse[-1, 0, 0] = torch.nan
    lse[:, 1, 1] = torch.nan
    lse[0, 2, 0] = torch.inf
    o[0, 3, 1, 7] = torch.nan
    out, out_lse = cuda.merge_lse(o, lse)
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[0, 0] = expected[1, 1] = expected[2, 0] = expected[3, 1, 7] = True
    assert torch.equal(out.isnan(), expected)
    assert torch.equal(out_lse.isnan(), expected.all(dim=-1))


def test_strides():
    o = torch.randn(6, 4, 3, 2, 128, dtype=torch.bfloat16, device="cuda")[::2].transpose(1, 2)
    lse = torch.randn(6, 4, 3, 2, device="cuda")[::2].transpose(1, 2)
    o, lse = o[:, :, 1], lse[:, :, 1]
    assert not o.is_contiguous()
    check(o, lse, *cuda.merge_lse(o, lse))


def test_large_lse():
    o = torch.randn(4, 9, 2, 64, dtype=torch.bfloat16, device="cuda")
    lse = 1e4 + torch.randn(4, 9, 2, device="cuda")
    check(o, lse, *cuda.merge_lse(o, lse))


def test_no_tokens():
    o = torch.empty(2, 0, 4, 64, dtype=torch.bfloat16, device="cuda")
    out, out_lse = cuda.merge_lse(o, torch.empty(2, 0, 4, device="cuda"))
    assert out.shape == (0, 4, 64)
    assert out_lse.shape == (0, 4)
