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
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 1), (12, 5), (576, 1537), (14336, 4096)])
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_linear(dtype, inputs, outputs, tokens):
    x = torch.randn(tokens, inputs + 8, dtype=dtype, device="cuda")[:, 8:]
    weight = torch.randn(outputs, inputs, dtype=dtype, device="cuda")
    weight /= inputs**0.5
    bias = torch.randn(outputs, dtype=dtype, device="cuda")
    product = x.double() @ weight.double().T
    torch.testing.assert_close(cuda.linear(x, weight).double(), product, **TOLERANCE[dtype])
    out = cuda.linear(x, weight, bias)
    torch.testing.assert_close(out.double(), product + bias.double(), **TOLERANCE[dtype])
    expected = out.double() + product
    assert cuda.linear(x, weight, out, out=out) is out
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", [1, 2])
def test_linears_that_start_early(tokens):
    """A kernel reads its weights before the one in front has ended, but not its output."""
    x = torch.randn(tokens, 4096, dtype=torch.bfloat16, device="cuda")
    weights = torch.randn(2, 4096, 4096, dtype=torch.bfloat16, device="cuda") / 64
    expected = x.double()
    for weight in weights:
        expected = (expected @ weight.double().T).bfloat16().double()

    def chain():
        return cuda.linear(cuda.linear(x, weights[0]), weights[1])

    torch.testing.assert_close(chain().double(), expected, rtol=2e-2, atol=2e-2)
    outputs = torch.stack([chain() for _ in range(200)])
    assert (outputs == outputs[0]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("intermediate", [8, 1536, 14336])
def test_silu_mul(dtype, intermediate):
    gate_up = 4 * torch.randn(17, 2 * intermediate, dtype=dtype, device="cuda")
    gate, up = gate_up.double().chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(cuda.silu_mul(gate_up).double(), expected, **TOLERANCE[dtype])
