"""Bad arguments give a ValueError that names the argument, what it is and what was expected. Checks
of form come before the check of the device, so that all of this runs without a GPU."""

import pytest
import torch

cuda = pytest.importorskip("star_attention.ops.cuda", exc_type=ImportError)

pytestmark = pytest.mark.no_gpu


def attention_arguments(**changes):
    arguments = {
        "q": torch.zeros(3, 8, 128, dtype=torch.bfloat16),
        "kv_pool": torch.zeros(4, 2, 2, 128, 128, dtype=torch.bfloat16),
        "page_table": torch.zeros(1, 4, dtype=torch.int32),
        "cu_seqlens_q": torch.tensor([0, 3], dtype=torch.int32),
        "kv_lens": torch.tensor([400], dtype=torch.int32),
        "causal": True,
        "scale": 0.1,
        "max_q_len": 3,
        "max_kv_len": 400,
    }
    return arguments | changes


BAD_ATTENTION = {
    "dtype": (
        {"q": torch.zeros(3, 8, 128)},
        r"q\.dtype: got float32, expected float16 or bfloat16",
    ),
    "dtypes differ": (
        {"q": torch.zeros(3, 8, 128, dtype=torch.float16)},
        r"kv_pool\.dtype: got bfloat16, expected float16",
    ),
    "rank": (
        {"q": torch.zeros(3, 1024, dtype=torch.bfloat16)},
        r"q\.shape: got \[3, 1024\], expected 3 dimensions",
    ),
    "head_dim": (
        {
            "q": torch.zeros(3, 8, 96, dtype=torch.bfloat16),
            "kv_pool": torch.zeros(4, 2, 2, 128, 96, dtype=torch.bfloat16),
        },
        r"head_dim: got 96, expected 64 or 128",
    ),
    "head_dims differ": (
        {"q": torch.zeros(3, 8, 64, dtype=torch.bfloat16)},
        r"kv_pool\.shape: got \[4, 2, 2, 128, 128\], expected \[any, 2, any, any, 64\]",
    ),
    "page": (
        {"kv_pool": torch.zeros(13, 2, 2, 32, 128, dtype=torch.bfloat16)},
        r"tokens_per_block: got 32, expected 64 or 128",
    ),
    "heads": (
        {"q": torch.zeros(3, 7, 128, dtype=torch.bfloat16)},
        r"num_q_heads: got 7, expected a multiple of num_kv_heads = 2",
    ),
    "stride of heads": (
        {"q": torch.zeros(3, 128, 8, dtype=torch.bfloat16).transpose(1, 2)},
        r"q\.strides: got .*, expected the last 2 dimensions contiguous",
    ),
    "stride of tokens": (
        {"q": torch.zeros(3, 8 * 128 + 4, dtype=torch.bfloat16)[:, :-4].unflatten(1, (8, 128))},
        r"q\.stride\(0\): got 1028, expected a multiple of 8",
    ),
    "pool stride": (
        {"kv_pool": torch.zeros(8, 2, 2, 128, 128, dtype=torch.bfloat16)[::2]},
        r"kv_pool\.strides: got .*, expected a contiguous tensor",
    ),
    "alignment": (
        {"q": torch.zeros(3 * 1024 + 4, dtype=torch.bfloat16)[4:].view(3, 8, 128)},
        r"q: got .*, expected an address aligned to 16 bytes",
    ),
    "int64 table": (
        {"page_table": torch.zeros(1, 4, dtype=torch.int64)},
        r"page_table\.dtype: got int64, expected int32",
    ),
    "sequences": (
        {"kv_lens": torch.zeros(2, dtype=torch.int32)},
        r"kv_lens\.shape: got \[2\], expected \[1\]",
    ),
    "max_kv_len": (
        {"max_kv_len": 513},
        r"max_kv_len: got 513, expected at most the 512 tokens",
    ),
    "max_q_len": ({"max_q_len": 2}, r"max_q_len: got 2, expected a bound of"),
    "scale": ({"scale": 0.0}, r"scale: got 0, expected a positive number"),
    "scale is NaN": ({"scale": float("nan")}, r"scale: got -?nan, expected a positive number"),
    "starts": (
        {"starts": torch.zeros(1, dtype=torch.int32)},
        r"starts\.shape: got \[1\], expected \[3\]",
    ),
    "cap": ({"cap": 50.0}, r"cap: got 50.0, expected None"),
    "starts of 8-bit pages": (
        {
            "starts": torch.zeros(3, dtype=torch.int32),
            "kv_pool": torch.zeros(4, 2, 2, 128, 128, dtype=torch.int8),
            "kv_scales": torch.zeros(4, 2, 2),
        },
        r"starts: got given, expected none: lists are by head, or pages are of 8 bits",
    ),
    "kernel": ({"kernel": "fast"}, r"kernel: got fast, expected auto, "),
    "host memory": ({}, r"q\.device: got host memory, expected a CUDA device"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_ATTENTION.values(), ids=BAD_ATTENTION.keys())
def test_paged_attention(changes, message):
    with pytest.raises(ValueError, match=message):
        cuda.paged_attention(**attention_arguments(**changes))


def test_not_a_tensor():
    arguments = attention_arguments()
    with pytest.raises(TypeError, match="expected a tensor with __dlpack__"):
        cuda._C.merge_lse([1.0], arguments["q"], arguments["q"], None, 0)


def rope_arguments(**changes):
    arguments = {
        "qkv": torch.zeros(3, 6 * 64, dtype=torch.float16),
        "positions": torch.zeros(3, dtype=torch.int32),
        "rotary": torch.zeros(10, 64),
        "kv_pool": torch.zeros(1, 2, 2, 64, 64, dtype=torch.float16),
        "slot_mapping": torch.zeros(3, dtype=torch.int32),
        "q": torch.zeros(3, 2, 64, dtype=torch.float16),
    }
    return arguments | changes


BAD_ROPE = {
    "q": (
        {"q": torch.zeros(2, 2, 64, dtype=torch.float16)},
        r"q\.shape: got \[2, 2, 64\], expected \[3, any, 64\]",
    ),
    "width": (
        {"q": torch.zeros(3, 3, 64, dtype=torch.float16)},
        r"qkv\.shape: got \[3, 384\], expected \[3, 448\]",
    ),
    "dtype": ({"qkv": torch.zeros(3, 384)}, r"qkv\.dtype: got float32"),
    "positions": (
        {"positions": torch.zeros(3, dtype=torch.int64)},
        r"positions\.dtype: got int64, expected int32",
    ),
    "slots": (
        {"slot_mapping": torch.zeros(4, dtype=torch.int32)},
        r"slot_mapping\.shape: got \[4\], expected \[3\]",
    ),
    "rotary": (
        {"rotary": torch.zeros(10, 32)},
        r"rotary\.shape: got \[10, 32\], expected \[any, 64\]",
    ),
    "host memory": ({}, r"qkv\.device: got host memory, expected a CUDA device"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_ROPE.values(), ids=BAD_ROPE.keys())
def test_rope_append(changes, message):
    with pytest.raises(ValueError, match=message):
        cuda.rope_append(**rope_arguments(**changes))


@pytest.mark.parametrize(
    ("o", "lse", "message"),
    [
        (torch.zeros(2, 3, 4, 60), torch.zeros(2, 3, 4), r"head_dim: got 60, expected a multiple"),
        (torch.zeros(2, 3, 4, 64), torch.zeros(2, 3, 5), r"lse\.shape: got \[2, 3, 5\], expected"),
        (torch.zeros(3, 4, 64), torch.zeros(3, 4), r"o\.shape: got \[3, 4, 64\], expected 4 dim"),
        (torch.zeros(0, 3, 4, 64), torch.zeros(0, 3, 4), r"num_shards: got 0, expected at least 1"),
        (torch.zeros(2, 3, 4, 64), torch.zeros(2, 3, 4), r"o\.device: got host memory"),
    ],
)
def test_merge_lse(o, lse, message):
    with pytest.raises(ValueError, match=message):
        cuda.merge_lse(o, lse)


def test_layers():
    x = torch.zeros(2, 12, dtype=torch.float16)
    with pytest.raises(ValueError, match="hidden_size: got 12, expected a multiple of 8"):
        cuda.rms_norm(x, x[0], 1e-5)
    with pytest.raises(ValueError, match=r"weight\.shape: got \[4\], expected \[12\]"):
        cuda.rms_norm(x, x[0, :4], 1e-5)
    with pytest.raises(ValueError, match="intermediate_size: got 6, expected a multiple of 8"):
        cuda.silu_mul(x)
    with pytest.raises(ValueError, match=r"weight\.shape: got \[2, 12\], expected \[any, 16\]"):
        cuda._C.skinny_linear(torch.zeros(2, 16, dtype=torch.float16), x, None, None, x, 0)


def test_values_are_checked_on_request(monkeypatch):
    monkeypatch.setattr(cuda, "_DEBUG", True)
    table = torch.tensor([[0, 1, 2, 9]], dtype=torch.int32)
    with pytest.raises(ValueError, match="page_table: got 9, expected values from 0 to 3"):
        cuda.paged_attention(**attention_arguments(page_table=table))
    with pytest.raises(ValueError, match="kv_lens: got 401, expected values from 0 to 400"):
        cuda.paged_attention(**attention_arguments(kv_lens=torch.tensor([401], dtype=torch.int32)))
    with pytest.raises(ValueError, match="slot_mapping: got 64, expected values from -1 to 63"):
        cuda.rope_append(**rope_arguments(slot_mapping=torch.full((3,), 64, dtype=torch.int32)))
    with pytest.raises(ValueError, match="positions: got 10, expected values from 0 to 9"):
        cuda.rope_append(**rope_arguments(positions=torch.full((3,), 10, dtype=torch.int32)))
