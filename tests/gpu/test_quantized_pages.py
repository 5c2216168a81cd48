"""Pages in 8 bits: how they are quantised, and attention to them, against float64."""

from dataclasses import dataclass

import pytest
import torch
from paged import Problem, assert_close, float32_out

from star_attention import ops
from star_attention.ops import reference

cuda = pytest.importorskip("star_attention.ops.cuda", exc_type=ImportError)

KV_DTYPES = ["fp8", "int8"]


@pytest.fixture(params=KV_DTYPES)
def kv_dtype(request):
    return request.param


def make_pool(layers, num_pages, heads=2, page=128, head_dim=128, dtype=torch.bfloat16):
    shape = layers, num_pages, 2, heads, page, head_dim
    spread = torch.rand(*shape[:4], 1, 1) * 3 + 0.01  # of pages and heads
    return (torch.randn(shape) * spread).to(dtype).cuda()


def quantize(pool, kv_dtype, pages, tokens, device="cuda"):
    """Codes and scales after quantising pages of the pool."""
    pool = pool.to(device, copy=True)
    codes = ops.codes_of(pool, ops.code_dtype(kv_dtype))
    scales = torch.full((*codes.shape[:2], *codes.shape[2:4]), torch.nan, device=device)
    numbers = (torch.tensor(x, dtype=torch.int32, device=device) for x in (pages, tokens))
    ops.quantize_pages(pool, codes, scales, *numbers)
    return pool, codes, scales


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("page", "head_dim"), [(64, 64), (64, 128), (128, 64), (128, 128)])
def test_quantised_as_the_reference_does(kv_dtype, dtype, page, head_dim):
    pool = make_pool(3, 9, page=page, head_dim=head_dim, dtype=dtype)
    pool[1, 4, 0, 1] = 0
    pages, tokens = [7, 2, 4, 8, 0], [page, page, page, 1, page - 3]
    pool[:, 8, :, :, 1:] = torch.nan
    ours, codes, scales = quantize(pool, kv_dtype, pages, tokens)
    theirs, expected, expected_scales = quantize(pool, kv_dtype, pages, tokens, "cpu")
    listed = torch.tensor([14, 15, 8, 9, 0])
    assert torch.equal(scales[:, listed].cpu(), expected_scales[:, listed])
    bits = [x.view(torch.uint8)[:, listed] for x in (codes.cpu(), expected)]
    assert torch.equal(*bits)
    untouched = [1, 3, 5, 6]
    assert torch.equal(ours[:, untouched], pool[:, untouched])

    targets = torch.tensor([1, 3, 5, 6, 8], dtype=torch.int32)
    cuda.dequantize_pages(ours, codes, scales, listed.int().cuda(), targets.cuda())
    reference.dequantize_pages(theirs, expected, expected_scales, listed.int(), targets)
    assert torch.equal(ours[:, targets.long()].cpu(), theirs[:, targets.long()])


def test_nan_makes_the_scale_one(kv_dtype):
    pool = make_pool(1, 2)
    pool[0, 1, 1, 0, 5, 7] = torch.nan
    _, _, scales = quantize(pool, kv_dtype, [0, 1], [128, 128])
    expected = torch.zeros(2, 2, 2, dtype=torch.bool)
    expected[1, 1, 0] = True
    assert torch.equal(scales[0, :2].isnan().cpu(), expected)


def test_large_blocks_of_pages(kv_dtype):
    pool = make_pool(4, 300, heads=4)
    pages = torch.randperm(300).tolist()
    _, codes, scales = quantize(pool, kv_dtype, pages, [128] * 300)
    values = codes.float() * scales[..., None, None]
    for i in (0, 1, 150, 298, 299):
        place = pages[i - i % 2] * 2 + i % 2
        off = (values[:, place] - pool[:, pages[i]].float()).norm() / pool[
            :, pages[i]
        ].float().norm()
        assert off < 0.04


@dataclass
class QuantizedProblem(Problem):
    """A `Problem` whose pages are quantised, and what they stand for its pool in the reference."""

    kv_dtype: str = "fp8"

    def __post_init__(self):
        super().__post_init__()
        whole = self.kv_pool.nan_to_num(0.0)
        spread = torch.rand(*whole.shape[:3], 1, 1, device="cuda") * 3 + 0.01
        largest = reference._largest_code(ops.code_dtype(self.kv_dtype))
        values = whole.float() * spread
        scales = values.abs().amax((-2, -1)) / largest
        scales[scales == 0] = torch.nan  # what is in no list
        quotients = values / scales[..., None, None]
        if self.kv_dtype == "int8":
            quotients = quotients.nan_to_num(99.0).round_()
        self.codes = quotients.to(ops.code_dtype(self.kv_dtype))
        self.scales = scales
        self.kv_pool = self.codes.double() * scales.double()[..., None, None]

    def arguments(self):
        return {**super().arguments(), "kv_pool": self.codes, "kv_scales": self.scales}


LENGTHS = {
    "one token": [(1, 1000)],
    "one cached token": [(1, 1)],
    "whole pages": [(4, 1024)],
    "more rows than cached tokens": [(40, 17)],
    "16 rows": [(16, 3000)],
    "many rows": [(300, 5003)],
    "512 rows": [(512, 4097)],
    "several": [(1, 4000), (33, 33), (5, 129), (100, 2500)],
    "empty sequence and empty cache": [(3, 200), (0, 500), (2, 0), (1, 64)],
    "only empty caches": [(2, 0), (1, 0)],
    "many sequences": [(1 + i % 3, 37 * i) for i in range(70)],
    "long": [(1, 131072)],
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_lengths(kv_dtype, lengths, causal):
    problem = QuantizedProblem(lengths, causal=causal, kv_dtype=kv_dtype)
    assert_close(*cuda.paged_attention(**problem.arguments()), problem)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page", [64, 128])
@pytest.mark.parametrize("rows", [1, 12, 30, 129, 300])
def test_formats(kv_dtype, dtype, head_dim, page, rows):
    lengths = [(rows, 1111), (1, 700)]
    problem = QuantizedProblem(
        lengths, head_dim=head_dim, page=page, dtype=dtype, kv_dtype=kv_dtype
    )
    assert_close(*cuda.paged_attention(**problem.arguments()), problem)


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("rows", [1, 9, 40, 150])
def test_groups(kv_dtype, group, rows):
    lengths = [(rows, 1500), (rows, 300)]
    problem = QuantizedProblem(lengths, num_q_heads=3 * group, num_kv_heads=3, kv_dtype=kv_dtype)
    assert_close(*cuda.paged_attention(**problem.arguments()), problem)


def test_float32_output_and_same_bits(kv_dtype):
    problem = QuantizedProblem([(7, 3000), (1, 100)], kv_dtype=kv_dtype)
    first = cuda.paged_attention(**problem.arguments(), out=float32_out(problem))
    assert_close(*first, problem)
    for _ in range(3):
        again = cuda.paged_attention(**problem.arguments(), out=float32_out(problem))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_large_scores(kv_dtype):
    problem = QuantizedProblem([(20, 2000)], score_scale=300.0, kv_dtype=kv_dtype)
    _, lse = problem.reference()
    tolerance = 1e-6 * float(lse.abs().max())
    assert_close(*cuda.paged_attention(**problem.arguments()), problem, max(1e-3, tolerance))


@pytest.mark.parametrize("which", [0, 1], ids=["k", "v"])
@pytest.mark.parametrize("rows", [1, 20, 200])
def test_nan_scale_surfaces(kv_dtype, which, rows):
    problem = QuantizedProblem([(rows, 3000), (rows, 500)], causal=False, kv_dtype=kv_dtype)
    problem.scales[problem.page_table[0, 3].long(), which, 1] = torch.nan
    o, lse = cuda.paged_attention(**problem.arguments())
    expected = torch.zeros_like(o, dtype=torch.bool)
    expected[:rows, 4:8] = True
    assert torch.equal(o.isnan(), expected)
    assert torch.equal(lse.isnan(), expected.any(-1) & (which == 0))


@pytest.mark.parametrize("rows", [1, 48])
def test_graph_replay_with_growing_cache(kv_dtype, rows):
    problem = QuantizedProblem([(rows, 3000)], causal=False, kv_dtype=kv_dtype)
    arguments = problem.arguments()
    cuda.paged_attention(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = cuda.paged_attention(**arguments)
    for kv_len in (1, 100, 777, 1024, 3000):
        problem.lengths = [(rows, kv_len)]
        problem.kv_lens.fill_(kv_len)
        graph.replay()
        assert_close(o, lse, problem)


def test_other_kernels_refuse():
    problem = QuantizedProblem([(300, 500)])
    for kernel in ("context_sm80", "query_sm90", "context_sm90"):
        with pytest.raises(ValueError, match="8 bits"):
            cuda.paged_attention(**problem.arguments(), kernel=kernel)
