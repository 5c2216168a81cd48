"""FP8 in the kernels: bits of the reference rule, products near those of float64."""

import pytest
import torch
from test_layers import TOLERANCE

from star_attention.ops.quantized import FP8, QuantizedRows
from star_attention.ops.quantized import quantize_rows as reference_rows

cuda = pytest.importorskip("star_attention.ops.cuda", exc_type=ImportError)

DTYPES = [torch.float16, torch.bfloat16]
WIDTHS = [8, 16, 576, 2056, 4096, 8200, 14336, 32768]
# Of a product whose operands are given in FP8: rounding of the result, and of cuBLAS's sums.
PRODUCT_ERROR = 1e-2


@pytest.fixture(autouse=True)
def _has_fp8():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the GPU does not compute in FP8")


def same_bits(rows, wanted):
    assert rows.scales.equal(wanted.scales)
    assert rows.values.view(torch.uint8).equal(wanted.values.view(torch.uint8))
    assert rows.dtype == wanted.dtype


def randn(*shape, dtype):
    return torch.randn(*shape, dtype=dtype, device="cuda")


def relative_error(out, wanted):
    return ((out.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_quantize_rows(dtype, width):
    x = randn(37, width + 8, dtype=dtype)[:, 8:]
    x[1], x[2], x[3] = 0, x[2] * 1e-3, x[3] * 1e3
    same_bits(cuda.quantize_rows(x, "fp8"), reference_rows(x, "fp8"))
    x = x[:2].contiguous()
    for value in (torch.nan, -torch.inf):
        x[1, width // 2] = value
        rows = cuda.quantize_rows(x, "fp8")
        assert rows.widened()[0].isfinite().all()
        assert rows.widened()[1].isnan().any()
    assert len(cuda.quantize_rows(x[:0], "fp8")) == 0


def test_widths_that_are_refused():
    with pytest.raises(ValueError, match=r"x\.shape\[1\]: got 12, expected a multiple of 8"):
        cuda.quantize_rows(torch.zeros(2, 12, dtype=torch.float16, device="cuda"), "fp8")
    with pytest.raises(ValueError, match=r"x\.shape\[1\]: got 32776, expected .* at most 32768"):
        cuda.quantize_rows(torch.zeros(2, 32776, dtype=torch.float16, device="cuda"), "fp8")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(dtype, width):
    x, weight = randn(33, width + 8, dtype=dtype)[:, 8:], randn(width, dtype=dtype)
    rows = cuda.rms_norm(x, weight, 1e-5, kind="fp8")
    same_bits(rows, reference_rows(cuda.rms_norm(x, weight, 1e-5), "fp8"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_silu_mul(dtype, width):
    gate_up = 4 * randn(17, 2 * width, dtype=dtype)
    same_bits(cuda.silu_mul(gate_up, kind="fp8"), reference_rows(cuda.silu_mul(gate_up), "fp8"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(16, 16), (576, 1536), (4096, 6144), (14336, 4096)]
)
@pytest.mark.parametrize("tokens", [1, 9, 16, 130, 1000])
def test_linear(dtype, inputs, outputs, tokens):
    x = cuda.quantize_rows(randn(tokens, inputs, dtype=dtype), "fp8")
    weight = cuda.quantize_rows(randn(outputs, inputs, dtype=dtype) / inputs**0.5, "fp8")
    # The scales differ, so that one of another row or column would show.
    x.scales.mul_(torch.rand_like(x.scales) + 0.5)
    weight.scales.mul_(torch.rand_like(weight.scales) + 0.5)
    product = (x.values.double() * x.scales[:, None].double()) @ (
        weight.values.double() * weight.scales[:, None].double()
    ).T
    bias = randn(outputs, dtype=dtype)
    out = cuda.linear(x, weight)
    assert out.dtype == dtype
    error = relative_error(out, product)
    print(f"{dtype}, {tokens} x {inputs} x {outputs}: {error:.1e}")
    assert error < PRODUCT_ERROR
    out = cuda.linear(x, weight, bias)
    assert relative_error(out, product + bias.double()) < PRODUCT_ERROR
    expected = out.double() + product
    assert cuda.linear(x, weight, out, out=out) is out
    assert relative_error(out, expected) < PRODUCT_ERROR
    assert cuda.linear(x, weight, out=out) is out
    assert relative_error(out, product) < PRODUCT_ERROR


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        *((16, 1), (80, 17), (576, 1537), (1040, 16), (3584, 512), (4096, 6144)),
        *((5120, 130), (14336, 4096), (28672, 33)),
    ],
)
def test_few_rows(dtype, inputs, outputs):
    """Of 1 to as many rows as the kernel takes."""
    weight = cuda.quantize_rows(randn(outputs, inputs, dtype=dtype) / inputs**0.5, "fp8")
    wide = weight.values.double() * weight.scales[:, None].double()
    bias = randn(outputs, dtype=dtype)
    most = cuda._C.max_skinny_tokens_fp8(inputs)
    assert most >= 3
    for tokens in range(most + 1):
        assert not cuda.kind_of_rows(tokens, weight)
        x = randn(tokens, inputs + 8, dtype=dtype)[:, 8:]
        product = x.double() @ wide.T
        torch.testing.assert_close(cuda.linear(x, weight).double(), product, **TOLERANCE[dtype])
        out = cuda.linear(x, weight, bias)
        torch.testing.assert_close(out.double(), product + bias.double(), **TOLERANCE[dtype])
        expected = out.double() + product
        assert cuda.linear(x, weight, out, out=out) is out
        torch.testing.assert_close(out.double(), expected, **TOLERANCE[dtype])
    assert cuda.kind_of_rows(most + 1, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_e4m3_is_widened_exactly(dtype):
    codes = torch.arange(256, dtype=torch.uint8, device="cuda")
    codes[codes % 128 == 127] = 0  # NaN
    weight = torch.zeros(256, 64, dtype=torch.uint8, device="cuda")
    columns = torch.arange(256, device="cuda") % 64
    weight[torch.arange(256, device="cuda"), columns] = codes
    weight = QuantizedRows(weight.view(FP8), torch.ones(256, device="cuda"), dtype)
    x = torch.ones(2, 64, dtype=dtype, device="cuda")
    out = cuda.linear(x, weight)
    wanted = codes.view(FP8).to(dtype).expand(2, -1)
    assert out.equal(wanted)


def test_columns_meet_their_own():
    """A row of the weights with one 1 picks that element of x."""
    width = 14336
    places = torch.randint(width, (4096,), device="cuda")
    weight = torch.zeros(4096, width, dtype=torch.uint8, device="cuda")
    weight[torch.arange(4096, device="cuda"), places] = 0x38  # 1
    weight = QuantizedRows(weight.view(FP8), torch.ones(4096, device="cuda"), torch.bfloat16)
    x = randn(5, width, dtype=torch.bfloat16)
    assert cuda.linear(x, weight).equal(x[:, places])


@pytest.mark.parametrize("tokens", [1, 7, 16])
def test_products_that_start_early(tokens):
    """A kernel reads its weights before the one in front has ended, but not its output."""
    x = randn(tokens, 4096, dtype=torch.bfloat16)
    weights = [
        cuda.quantize_rows(randn(4096, 4096, dtype=torch.bfloat16) / 64, "fp8") for _ in range(2)
    ]

    def product(rows, weight):
        is_fp8 = cuda.kind_of_rows(len(rows), weight)
        return cuda.linear(cuda.quantize_rows(rows, "fp8") if is_fp8 else rows, weight)

    def chain():
        return product(product(x, weights[0]), weights[1])

    outputs = torch.stack([chain() for _ in range(200)])
    assert (outputs == outputs[0]).all()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    graph.replay()
    assert captured.equal(outputs[0])
