"""Selected pages on GPUs: kernels against the reference, and the engine against Hugging Face."""

import copy

import numpy as np
import pytest
import torch
from listed import PAGE, check_fetched, in_float32, listed_case, on_device, selecting
from test_engine import relative_error

from star_attention import ops
from star_attention.ops import reference
from test_selected_pages import check_lists, hf_logits, masks_of, read_selected

cuda = pytest.importorskip("star_attention.ops.cuda", exc_type=ImportError)

DTYPES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_means(dtype, head_dim):
    pool = torch.randn(9, 2, 3, PAGE, head_dim).to(dtype)
    pages, rows = (torch.tensor(x, dtype=torch.int32) for x in ([7, 2, 3, 0], [4, 1, 0, 5]))
    expected = torch.full((7, 3, 8, head_dim), -1.0, dtype=dtype)
    means = expected.cuda()
    reference.page_means(pool, pages, rows, expected)
    cuda.page_means(pool.cuda(), pages.cuda(), rows.cuda(), means)
    torch.testing.assert_close(means.cpu(), expected, rtol=1e-2, atol=1e-3)


def both(case):
    found = [x.cpu() for x in cuda.select_pages(**on_device(case))]
    return found, reference.select_pages(**case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("count", [1, 5, 16, 256])
def test_lists_are_those_of_the_reference(dtype, head_dim, count):
    """On whole numbers, where sums are exact and many scores are equal."""
    tiles = [0, 128, 256, 300, 428, 556, 684, 812, 940, 1068, 1069]
    candidates = [0, 1, 7, 9, 64, 65, 130, 300, 300, 299]
    found, expected = both(selecting(dtype, head_dim, tiles, candidates, count, 300))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_special_scores():
    """A NaN is above all; what is -inf is not chosen; -0 is 0."""
    case = selecting(torch.bfloat16, 128, [0, 128], [40], 4, 40)
    case["means"][17, 0, 3, 5] = torch.nan
    found, expected = both(case)
    assert 17 in found[0][0, 0]
    assert all(map(torch.equal, found, expected))
    case = selecting(torch.bfloat16, 128, [0, 128], [40], 4, 40)
    case["lse"].fill_(torch.inf)
    found, expected = both(case)
    assert not found[1].any()
    assert all(map(torch.equal, found, expected))
    case = selecting(torch.bfloat16, 128, [0, 128], [40], 4, 40)
    case["lse"].zero_()
    case["means"].zero_()
    case["means"][::2].neg_()
    found, expected = both(case)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("kernel", ["context_sm80", "context_sm90"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("page", "group"), [(128, 4), (128, 3), (64, 1)])
def test_lists_by_head(kernel, dtype, head_dim, page, group):
    if kernel == "context_sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    case = listed_case(dtype, head_dim, page, group=group)
    o, lse = cuda.paged_attention(**on_device(case), kernel=kernel)
    expected, expected_lse = reference.paged_attention(**in_float32(case))
    assert relative_error(o.cpu().float().numpy(), expected.numpy()) < 6e-3
    torch.testing.assert_close(lse.cpu(), expected_lse, rtol=0, atol=2e-3)


def test_query_kernels_take_no_lists_by_head():
    case = listed_case(torch.bfloat16, 128)
    with pytest.raises(ValueError, match="lists are by head"):
        cuda.paged_attention(**on_device(case), kernel="query_sm80")


@pytest.mark.parametrize("pages", [20, 3000])
def test_fetched_pages(pages):
    check_fetched(cuda, pages)


@pytest.mark.parametrize(
    ("num_ranks", "count", "peers"), [(1, 3, True), (2, 2, True), (2, 2, False), (3, 1, True)]
)
def test_logits_under_the_masks_that_were_used(tmp_path, num_ranks, count, peers):
    """Passes of other sizes round otherwise, so that lists may differ: each has its own masks."""
    context, sizes = 1285, {"block_size": 256, "anchor_size": 128, "tokens_per_block": PAGE}
    tokens = np.random.default_rng(1).integers(0, 97, context + 12).astype(np.int32)
    hf_model, model, results = read_selected(
        tmp_path,
        num_ranks,
        tokens,
        context,
        sizes,
        count,
        peers,
        hidden_size=256,
        max_position_embeddings=2048,
    )
    rounded = copy.deepcopy(hf_model).half()
    for logits, lists in results.values():
        check_lists(lists, model, context, sizes, count)
        masks = masks_of(lists, model, tokens, context, sizes)
        expected, theirs = (hf_logits(hf, tokens, masks, context) for hf in (hf_model, rounded))
        allowed = relative_error(theirs.astype(np.float32), expected)
        assert relative_error(logits, expected) <= 2 * allowed


def test_what_is_refused():
    case = selecting(torch.bfloat16, 128, [0, 128], [40], 4, 40)
    case["page"] = 64
    with pytest.raises(ValueError, match="page: got 64, expected 128"):
        cuda.select_pages(**case)
    assert ops.means_of_page(128) == 8
