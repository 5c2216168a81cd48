"""Attention kernels that run in several shapes: query attention on both paths and the sm_80 context
kernel (that of sm_90: test_context_attention.py)."""

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
_C = pytest.importorskip("star_attention._C", exc_type=ImportError)

SM90 = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
KERNELS = ["query_sm80", "context_sm80", *(["query_sm90"] if SM90 else [])]

LENGTHS = {
    "one token": [(1, 1000)],
    "one cached token": [(1, 1)],
    "whole pages": [(4, 1024)],
    "own tokens only": [(70, 70)],
    "more rows than cached tokens": [(40, 17)],
    "16 rows": [(16, 3000)],
    "many rows": [(300, 5003)],
    "512 rows": [(512, 4097)],
    "600 rows": [(600, 5000)],
    "1500 rows, own tokens only": [(1500, 1500)],
    "1030 rows and few": [(1, 700), (1030, 3000), (129, 129), (1030, 500)],
    "several": [(1, 4000), (33, 33), (5, 129), (100, 2500)],
    "empty sequence and empty cache": [(3, 200), (0, 500), (2, 0), (1, 64)],
    "only empty caches": [(2, 0), (1, 0)],
    "many sequences": [(1 + i % 3, 37 * i) for i in range(70)],
    "many short sequences": [(1, 50 + i % 14) for i in range(300)],
}


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_lengths(kernel, lengths, causal):
    problem = Problem(lengths, causal=causal)
    assert_close(*cuda.paged_attention(**problem.arguments(), kernel=kernel), problem)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page", [64, 128])
def test_formats(kernel, dtype, head_dim, page):
    problem = Problem([(1, 700), (50, 1111)], head_dim=head_dim, page=page, dtype=dtype)
    assert_close(*cuda.paged_attention(**problem.arguments(), kernel=kernel), problem)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("rows", [1, 9, 40, 150])
def test_groups(kernel, group, rows):
    problem = Problem([(rows, 1500), (rows, 300)], num_q_heads=3 * group, num_kv_heads=3)
    assert_close(*cuda.paged_attention(**problem.arguments(), kernel=kernel), problem)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page", [64, 128])
def test_formats_of_many_rows(kernel, dtype, head_dim, page):
    """More than a tile of rows, with clusters of blocks and without."""
    for rows in (100, 129, 300):
        lengths = [(rows, 1111), (1, 700)]
        problem = Problem(lengths, head_dim=head_dim, page=page, dtype=dtype)
        assert_close(*cuda.paged_attention(**problem.arguments(), kernel=kernel), problem)


WINDOWS = [1, 2, 63, 64, 65, 128, 129, 500, 4000]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("causal", [True, False])
def test_windows(kernel, window, causal):
    """Of a token, within a KV tile, over several, and of more than there are."""
    lengths = [(1, 2000), (16, 3000), (300, 1500), (40, 40), (1030, 3000)]
    for page, head_dim in ((128, 128), (64, 64)):
        problem = Problem(lengths, page=page, head_dim=head_dim, causal=causal, window=window)
        assert_close(*cuda.paged_attention(**problem.arguments(), kernel=kernel), problem)


def test_windows_of_empty_sequences(kernel):
    problem = Problem([(3, 200), (0, 500), (2, 0), (40, 17), (1, 64)], window=20)
    assert_close(*cuda.paged_attention(**problem.arguments(), kernel=kernel), problem)


@pytest.mark.parametrize("group", [1, 3, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_windows_of_groups(kernel, group, dtype):
    """Rows of one tile are of several tokens, whose windows differ."""
    lengths = [(9, 1500), (150, 700)]
    problem = Problem(lengths, 3 * group, 3, dtype=dtype, window=70)
    assert_close(*cuda.paged_attention(**problem.arguments(), kernel=kernel), problem)


@pytest.mark.parametrize("rows", [1, 16, 300, 2000])
def test_windows_in_the_kernel_that_is_chosen(rows):
    problem = Problem([(rows, 6000)], num_q_heads=32, num_kv_heads=8, window=1000)
    assert_close(*cuda.paged_attention(**problem.arguments()), problem)


@pytest.mark.parametrize("place", NAN_PLACES)
@pytest.mark.parametrize("lengths", NAN_LENGTHS.values(), ids=NAN_LENGTHS.keys())
def test_nan_surfaces(kernel, lengths, place):
    def attend(problem):
        return cuda.paged_attention(**problem.arguments(), kernel=kernel)

    check_nan_surfaces(attend, lengths, place)


def test_blind_rows(kernel):
    check_blind_rows(lambda problem: cuda.paged_attention(**problem.arguments(), kernel=kernel))


def test_overflow_surfaces(kernel):
    check_overflow_surfaces(
        lambda problem: cuda.paged_attention(**problem.arguments(), kernel=kernel)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_scores(kernel, dtype):
    problem = Problem([(20, 2000)], score_scale=3000.0, dtype=dtype)
    _, lse = problem.reference()
    assert lse.abs().max() > 1e4
    # float32 resolves 1e-3 at 1e4.
    tolerance = 1e-6 * float(lse.abs().max())
    assert_close(*cuda.paged_attention(**problem.arguments(), kernel=kernel), problem, tolerance)


def test_float32_output(kernel):
    problem = Problem([(7, 3000), (1, 100)])
    o, lse = cuda.paged_attention(**problem.arguments(), kernel=kernel, out=float32_out(problem))
    assert o.dtype == torch.float32
    assert_close(o, lse, problem)


def test_strided_q(kernel):
    problem = Problem([(9, 500)])
    fused = torch.randn(9, 3 * problem.num_q_heads * 128, dtype=problem.dtype, device="cuda")
    problem.q = fused[:, : problem.num_q_heads * 128].view(9, problem.num_q_heads, 128)
    assert_close(*cuda.paged_attention(**problem.arguments(), kernel=kernel), problem)


def test_same_bits(kernel):
    arguments = Problem([(20, 5000), (3, 9000)]).arguments()
    first = cuda.paged_attention(**arguments, kernel=kernel)
    for _ in range(5):
        again = cuda.paged_attention(**arguments, kernel=kernel)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_shards_merge_to_the_whole(kernel):
    whole = Problem([(5, 4000)], causal=False)
    parts = []
    for first, last in [(0, 10), (10, 32)]:  # pages
        shard = whole.arguments()
        shard["page_table"] = whole.page_table[:, first:].contiguous()
        tokens = min(last * whole.page, 4000) - first * whole.page
        shard["kv_lens"] = torch.tensor([tokens], dtype=torch.int32, device="cuda")
        shard["max_kv_len"] = tokens
        out = float32_out(whole)
        parts.append(cuda.paged_attention(**shard, kernel=kernel, out=out))
    o, lse = (torch.stack(x) for x in zip(*parts, strict=True))
    assert_close(*cuda.merge_lse(o, lse, out_dtype=whole.dtype), whole)


# Rows and query heads (four a KV head), and whether a GPU of 132 multiprocessors has to split KV.
QUESTIONS = {
    "600 of 8 heads": (600, 8, True),
    "600 of 32 heads": (600, 32, True),
    "1024 of 8 heads": (1024, 8, True),
    "512 of 32 heads": (512, 32, False),
    "2048 of 32 heads": (2048, 32, False),
}


@pytest.mark.parametrize(("rows", "heads", "split"), QUESTIONS.values(), ids=QUESTIONS.keys())
def test_long_questions_split_the_cache(rows, heads, split):
    problem = Problem([(rows, 8000)], num_q_heads=heads, num_kv_heads=heads // 4)
    workspace = []

    def allocate(size):
        workspace.append(size)
        return torch.empty(size, dtype=torch.uint8, device="cuda")

    o, lse = torch.empty_like(problem.q), problem.q.new_empty(rows, heads, dtype=torch.float32)
    arguments = problem.arguments()
    tensors = [arguments.pop(name) for name in ("q", "kv_pool", "page_table")]
    tensors += [arguments.pop(name) for name in ("cu_seqlens_q", "kv_lens")]
    stream = torch.cuda.current_stream().cuda_stream
    _C.paged_attention(
        *tensors,
        *(None, None, None, o, lse, allocate),
        **arguments,
        kernel="auto",
        stream=stream,
    )
    assert_close(o, lse, problem)
    if torch.cuda.get_device_properties(0).multi_processor_count == 132:
        assert (workspace[0] > 4) == split


LATE_LENGTHS = r"""
extern "C" __global__ void late_lengths(int* kv_lens, int kv_len) {
  asm volatile("griddepcontrol.launch_dependents;");
  for (const long long began = clock64(); clock64() - began < 1000000;) {}
  *kv_lens = kv_len;
}
"""


@pytest.mark.skipif(not SM90, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("rows", [1, 16, 1440])
def test_lengths_written_by_the_kernel_in_front(kernel, rows):
    """That kernel lets this one start early, and only then writes the lengths."""
    cupy = pytest.importorskip("cupy")
    late_lengths = cupy.RawKernel(LATE_LENGTHS, "late_lengths")
    problem = Problem([(rows, 5000)])
    out = float32_out(problem)
    arguments = problem.arguments()

    def attend():
        with cupy.cuda.Stream.from_external(torch.cuda.current_stream()):
            late_lengths((1,), (1,), (problem.kv_lens.data_ptr(), 5000))
        cuda.paged_attention(**arguments, kernel=kernel, out=out)

    attend()  # loads the kernels
    for x in out:
        x.fill_(torch.nan)
    problem.kv_lens.zero_()
    torch.cuda.synchronize()
    attend()
    assert_close(*out, problem)


@pytest.mark.parametrize("rows", [1, 48])
def test_graph_replay_with_growing_cache(rows):
    longest = 3000
    problem = Problem([(rows, longest)])
    full = problem.kv_pool.clone()
    arguments = problem.arguments()
    cuda.paged_attention(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = cuda.paged_attention(**arguments)
    for kv_len in (rows, 100, 777, 1024, longest):
        problem.lengths = [(rows, kv_len)]
        problem.kv_lens.fill_(kv_len)
        _poison_behind(problem, full, kv_len)
        graph.replay()
        assert_close(o, lse, problem)


def _poison_behind(problem: Problem, full: torch.Tensor, kv_len: int) -> None:
    problem.kv_pool.copy_(full)
    for i, page in enumerate(problem.pages.tolist()):
        problem.kv_pool[page, :, :, max(0, kv_len - i * problem.page) :] = torch.nan


def test_pool_of_more_than_2_to_the_31_elements(kernel):
    pages = torch.tensor([70000, 3, 69999, 35001])  # 32768 elements a page and KV head
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    problem = Problem([(2, 500)], num_q_heads=2, num_kv_heads=1, pages=pages)
    assert problem.kv_pool.numel() > 2**31
    assert_close(*cuda.paged_attention(**problem.arguments(), kernel=kernel), problem)
