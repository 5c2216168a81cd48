"""The sm_90 context kernel: many query rows a sequence (that of sm_80: test_query_attention.py)."""

import pytest
import torch
from paged import (
    NAN_LENGTHS,
    NAN_PLACES,
    Problem,
    assert_close,
    check_blind_rows,
    check_nan_surfaces,
    check_overflow_surfaces,
    float32_out,
)

cuda = pytest.importorskip("star_attention.ops.cuda", exc_type=ImportError)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0",
)


def attend(problem: Problem, **options):
    return cuda.paged_attention(**problem.arguments(), kernel="context_sm90", **options)


@pytest.mark.parametrize("anchor", [0, 128, 512])
@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 127, 128, 129, 191, 193, 383, 512])
def test_block_after_anchor(anchor, rows):
    problem = Problem([(rows, anchor + rows)], num_q_heads=4)
    assert_close(*attend(problem), problem)


LENGTHS = {
    "one token": [(1, 1)],
    "one row": [(1, 2049)],
    "own tokens only": [(1000, 1000)],
    "more rows than cached tokens": [(500, 130)],
    "two lengths": [(300, 777), (1000, 3000)],
    "empty sequence and empty cache": [(300, 777), (0, 130), (77, 0), (130, 100), (513, 513)],
    "only empty caches": [(200, 0), (1, 0)],
    "many sequences": [(1 + 9 * i, 1 + 31 * i) for i in range(70)],
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_lengths(lengths, causal):
    problem = Problem(lengths, num_q_heads=4, causal=causal)
    assert_close(*attend(problem), problem)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page", [64, 128])
def test_formats(page, head_dim, dtype, causal):
    problem = Problem(
        [(300, 777), (129, 1090)], head_dim=head_dim, page=page, dtype=dtype, causal=causal
    )
    assert_close(*attend(problem), problem)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8])
def test_groups(group):
    problem = Problem([(257, 1023), (64, 64)], num_q_heads=3 * group, num_kv_heads=3)
    assert_close(*attend(problem), problem)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_scores(dtype):
    problem = Problem([(500, 2000)], score_scale=3000.0, dtype=dtype)
    _, lse = problem.reference()
    assert lse.abs().max() > 1e4
    # float32 resolves 1e-3 at 1e4.
    assert_close(*attend(problem), problem, lse_tolerance=1e-6 * float(lse.abs().max()))


WINDOWS = [1, 2, 63, 64, 65, 128, 129, 500, 4000]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("causal", [True, False])
def test_windows(window, causal):
    """Of a token, within a KV tile, over several, and of more than there are."""
    lengths = [(1, 2000), (300, 1500), (129, 129), (1030, 3000)]
    for page, head_dim in ((128, 128), (64, 64)):
        problem = Problem(lengths, page=page, head_dim=head_dim, causal=causal, window=window)
        assert_close(*attend(problem), problem)


def test_windows_of_empty_sequences():
    problem = Problem([(3, 200), (0, 500), (2, 0), (40, 17), (1, 64)], window=20)
    assert_close(*attend(problem), problem)


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_windows_of_groups(group, dtype):
    """Blocks alone and in clusters."""
    problem = Problem([(257, 1023), (640, 640)], 3 * group, 3, dtype=dtype, window=200)
    assert_close(*attend(problem), problem)


@pytest.mark.parametrize("place", NAN_PLACES)
@pytest.mark.parametrize("lengths", NAN_LENGTHS.values(), ids=NAN_LENGTHS.keys())
def test_nan_surfaces(lengths, place):
    check_nan_surfaces(attend, lengths, place)


def test_blind_rows():
    check_blind_rows(attend)


def test_overflow_surfaces():
    check_overflow_surfaces(attend)


def test_growing_scores():
    """Scores that rise from the last KV tile to the first: the maximum moves at every step."""
    problem = Problem([(200, 2000)], causal=False)
    factors = torch.linspace(40, 1, problem.page_table.shape[1] - 2, device="cuda")
    pages = problem.page_table[0, :-2].long()
    problem.kv_pool[pages, 0] *= factors[:, None, None, None].to(problem.dtype)
    assert_close(*attend(problem), problem)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_float32_output(head_dim):
    problem = Problem([(400, 900), (3, 1), (2, 0)], head_dim=head_dim)
    o, lse = attend(problem, out=float32_out(problem))
    assert o.dtype == torch.float32
    assert_close(o, lse, problem)


def test_strided_q():
    problem = Problem([(300, 500)])
    heads, dim = problem.num_q_heads, problem.head_dim
    fused = torch.randn(300, 2 * heads * dim, dtype=problem.dtype, device="cuda")
    problem.q = fused[:, : heads * dim].view(300, heads, dim)
    assert_close(*attend(problem), problem)


def test_same_bits():
    problem = Problem([(3000, 9000), (700, 701)], num_q_heads=16, num_kv_heads=4)
    first, first_lse = attend(problem)
    for _ in range(3):
        o, lse = attend(problem)
        assert torch.equal(o, first)
        assert torch.equal(lse, first_lse)


def test_graph_replay_with_growing_lengths():
    problem = Problem([(256, 2048)], num_q_heads=4)
    arguments = problem.arguments()
    attend(problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = cuda.paged_attention(**arguments, kernel="context_sm90")
    for kv_len in (300, 1024, 2048):
        problem.kv_lens.fill_(kv_len)
        problem.lengths = [(256, kv_len)]
        graph.replay()
        assert_close(o, lse, problem)


@pytest.mark.parametrize("rows", [8192, 40960])
def test_long(rows):
    """Against the float64 reference of some rows, by way of their own sequences."""
    problem = Problem([(rows, rows + 4096)], num_q_heads=4, num_kv_heads=1)
    o, lse = attend(problem)
    for first in (0, rows // 2 - 100, rows - 256):
        last = first + 256
        part = Problem([(256, last + 4096)], num_q_heads=4, num_kv_heads=1)
        part.kv_pool, part.page_table = problem.kv_pool, problem.page_table
        part.q = problem.q[first:last]
        assert_close(o[first:last], lse[first:last], part)


def test_pool_beyond_int32_elements():
    page_elements = 2 * 8 * 128 * 128
    pages = torch.arange(2**31 // page_elements, 2**31 // page_elements + 12)
    if torch.cuda.mem_get_info()[0] < 2.2 * 2**32:
        pytest.skip("needs 10 GB of free GPU memory")
    problem = Problem([(300, 1400)], num_kv_heads=8, pages=pages)
    assert problem.kv_pool.numel() > 2**31
    assert_close(*attend(problem), problem)
