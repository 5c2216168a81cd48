import pytest
import torch

cuda = pytest.importorskip("star_attention.ops.cuda", exc_type=ImportError)

TOLERANCE = {
    torch.float16: {"rtol": 2e-3, "atol": 1e-3},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2},
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hidden", [8, 576, 4096, 8192, 32768])
def test_rms_norm(dtype, hidden):
    x = torch.randn(33, hidden + 8, dtype=dtype, device="cuda")[:, 8:]
    weight = torch.randn(hidden, dtype=dtype, device="cuda")
    out = cuda.rms_norm(x, weight, 1e-5)
    wide = x.double()
    expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("intermediate", [8, 1536, 14336])
def test_silu_mul(dtype, intermediate):
    gate_up = 4 * torch.randn(17, 2 * intermediate, dtype=dtype, device="cuda")
    gate, up = gate_up.double().chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(cuda.silu_mul(gate_up).double(), expected, **TOLERANCE[dtype])
