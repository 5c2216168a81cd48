"""How the compiled module reads tensors, as far as that needs no GPU."""

import pytest
import torch

_C = pytest.importorskip("star_attention._C", exc_type=ImportError)


class Capsule:
    """A tensor that gives a DLPack capsule and nothing faster."""

    def __init__(self, tensor):
        self.__dlpack__ = lambda **_: tensor.__dlpack__()
        self.__dlpack_device__ = tensor.__dlpack_device__


@pytest.mark.parametrize("kind", [lambda x: x, Capsule, lambda x: x.numpy()])
@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ([4, 64], torch.float16, r"gate_up\.device: got host memory, expected a CUDA device"),
        ([4, 62], torch.float16, r"gate_up\.shape: got \[4, 62\], expected \[4, 64\]"),
        ([64], torch.float16, r"gate_up\.shape: got \[64\], expected 2 dimensions"),
        ([4, 64], torch.float32, r"gate_up\.dtype: got float32, expected float16 or bfloat16"),
    ],
)
def test_what_is_wrong(kind, shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        _C.silu_mul(kind(torch.zeros(shape, dtype=dtype)), torch.zeros(4, 32, dtype=dtype), None, 0)


def test_strides():
    x = torch.zeros(64, 4, dtype=torch.float16).t()
    with pytest.raises(ValueError, match=r"strides: got \[1, 4\], expected the last 1 dimensions"):
        _C.silu_mul(x, torch.zeros(4, 32, dtype=torch.float16), None, 0)


def test_no_tensor():
    out = torch.zeros(4, 32, dtype=torch.float16)
    with pytest.raises(TypeError, match="gate_up: got <class 'list'>, expected a tensor with"):
        _C.silu_mul([1.0], out, None, 0)
