"""Projections in FP8: the rule, checkpoints that have them, and what they do to logits."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fp8_files import FORMS, quantize_folder
from helpers import run_oracle_job, save_tiny_model
from star_attention import ops
from star_attention.distributed import SingleProcess
from star_attention.engines.loader import load_engine
from star_attention.engines.options import EngineOptions
from star_attention.engines.tensorrt.onnx import export_graph
from star_attention.engines.torch import load as torch_load
from star_attention.engines.torch.memory import pass_limits
from star_attention.errors import UserError
from star_attention.models import loading
from star_attention.models.checkpoint import open_checkpoint
from star_attention.models.config import LLAMA_3_1_8B
from star_attention.models.loading import load_weights
from star_attention.ops.quantized import QuantizedRows, quantize_rows
from test_models import hf_causal_logits, logits_of

KINDS = "fp8", "int8"
CPU = torch.device("cpu")


def test_rule():
    """The largest magnitude becomes 448; others round to nearest, ties to even."""
    largest = 448 * 0.25
    row = [largest, -largest, 0.25 * 17, 0.25 * 19, -0.25 * 21, 0.25 * 2**-9, 0.25 * 2**-10, 0.0]
    rows = quantize_rows(torch.tensor([row, [0.0] * 8, [1e-20] + [0.0] * 7]), "fp8")
    assert rows.scales.tolist() == pytest.approx([0.25, 1e-12 / 448, 1e-12 / 448], rel=1e-6)
    assert rows.values[0].float().tolist() == [448, -448, 16, 20, -20, 2**-9, 0, 0]
    assert not rows.values[1:].float().any()
    assert rows.widened().dtype == torch.float32
    assert rows.widened()[0].tolist() == [112, -112, 4, 5, -5, 2**-11, 0, 0]


def test_rule_of_what_is_no_number():
    rows = quantize_rows(torch.tensor([[1.0, torch.nan], [torch.inf, 1.0], [2.0, 1.0]]), "fp8")
    assert rows.scales.isfinite().tolist() == [False, False, True]
    assert rows.widened()[:2].isnan().any(1).all()
    assert rows.widened()[2].tolist() == [2.0, 1.0]


def test_rule_of_int8():
    rows = quantize_rows(torch.tensor([[127.0, -127, 0.5, 1.5, -2.5, 3.4], [0.0] * 6]), "int8")
    assert rows.values.tolist() == [[127, -127, 0, 2, -2, 3], [0] * 6]
    assert rows.scales.tolist() == pytest.approx([1, 1e-12 / 127])
    with_nan = quantize_rows(torch.tensor([[1.0, torch.nan], [2.0, 1.0]]), "int8")
    assert with_nan.widened()[0].isnan().all()
    assert with_nan.scales[1].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 5, 40])
def test_int8_products_are_exact(dtype, rows):
    torch.manual_seed(0)
    x = ops.quantize_rows(torch.randn(rows, 80, dtype=dtype), "int8")
    weight = quantize_rows(torch.randn(49, 80, dtype=dtype), "int8")
    sums = x.values.double() @ weight.values.double().t()
    wanted = (sums.float() * x.scales[:, None] * weight.scales).to(dtype)
    assert ops.linear(x, weight).equal(wanted)
    assert ops.linear(x, weight, weight.scales.to(dtype)).equal(wanted + weight.scales.to(dtype))
    out = torch.ones_like(wanted)
    assert ops.linear(x, weight, out, out=out) is out
    assert out.equal(wanted + 1)
    assert ops.linear(x, weight, out=out).equal(wanted)
    assert ops.kind_of_rows(rows, weight) == "int8"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators(dtype):
    torch.manual_seed(0)
    x, weight = (
        torch.randn(5, 64, dtype=dtype),
        quantize_rows(torch.randn(48, 64, dtype=dtype), "fp8"),
    )
    norm, gate_up = torch.rand(64).to(dtype), torch.randn(5, 96, dtype=dtype)
    for rows, plain in (
        (ops.rms_norm(x, norm, 1e-5, kind="fp8"), ops.rms_norm(x, norm, 1e-5)),
        (ops.silu_mul(gate_up, kind="fp8"), ops.silu_mul(gate_up)),
        (ops.quantize_rows(x, "fp8"), x),
    ):
        wanted = quantize_rows(plain, "fp8")
        assert rows.values.view(torch.uint8).equal(wanted.values.view(torch.uint8))
        assert rows.scales.equal(wanted.scales)
        # A mantissa of three bits: 1/16 of a number at most, or half of the least step.
        error = (rows.widened() - plain).float().abs()
        assert (error <= plain.float().abs() / 15 + 2**-10 * rows.scales[:, None]).all()
    rows, bias = ops.quantize_rows(x, "fp8"), torch.randn(48, dtype=dtype)
    product = ops.linear(rows, weight, bias)
    assert product.equal(torch.addmm(bias, rows.widened(), weight.widened().t()))
    assert ops.kind_of_rows(1, weight) == "fp8"
    assert not ops.kind_of_rows(1, weight.widened())


def rows_of(weights, name):
    """A projection of layer 1, of its place in the fused one."""
    q, kv, inner = 64, 32, 96
    layer = weights.layers[1]
    field, begin, end = {
        "q": ("qkv", 0, q),
        "k": ("qkv", q, q + kv),
        "v": ("qkv", q + kv, q + 2 * kv),
        "o": ("out", 0, 64),
        "gate": ("gate_up", 0, inner),
        "up": ("gate_up", inner, 2 * inner),
        "down": ("down", 0, 64),
    }[name]
    fused = getattr(layer, field)
    if isinstance(fused, QuantizedRows):
        fused = fused.widened()
    return fused[begin:end]


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints(tmp_path, form):
    model = save_tiny_model(tmp_path)
    meant = quantize_folder(tmp_path, form)
    checkpoint = open_checkpoint(tmp_path)
    plain = load_weights(checkpoint, torch.float32, CPU)
    stored = load_weights(checkpoint, torch.float32, CPU, quantization="auto")
    is_block = FORMS[form][0] == "block"
    for name, wanted in meant.items():
        if ".layers.1." not in name:
            continue
        part = name.split(".")[-2].removesuffix("_proj")
        expected = quantize_rows(wanted, "fp8").widened() if is_block else wanted
        for weights in (plain, stored):
            torch.testing.assert_close(rows_of(weights, part), expected, rtol=1e-6, atol=1e-8)
    assert isinstance(stored.layers[0].down, QuantizedRows)
    assert isinstance(stored.lm_head, torch.Tensor)
    if not is_block:
        model.load_state_dict({**model.state_dict(), **meant})
        np.testing.assert_allclose(logits_of(tmp_path), hf_causal_logits(model), atol=2e-4)


def test_fused_and_reordered_rows(tmp_path):
    """A scale moves with its row."""
    model = save_tiny_model(tmp_path, "phi3", partial_rotary_factor=0.5)
    meant = quantize_folder(tmp_path, "compressed-dynamic")
    assert any("qkv_proj" in name for name in meant)
    model.load_state_dict({**model.state_dict(), **meant})
    np.testing.assert_allclose(logits_of(tmp_path), hf_causal_logits(model), atol=2e-4)
    checkpoint = open_checkpoint(tmp_path)
    plain = load_weights(checkpoint, torch.float32, CPU).layers[2].qkv
    stored = load_weights(checkpoint, torch.float32, CPU, quantization="auto").layers[2].qkv
    assert isinstance(stored, QuantizedRows)
    torch.testing.assert_close(stored.widened(), plain)


def test_layers_that_stay(tmp_path):
    """Those that are not stored in FP8 stay, with `auto`; with `fp8` they are quantised."""
    save_tiny_model(tmp_path)
    quantize_folder(tmp_path, "fp8-tensor", kept=("layers.0.", "v_proj"))
    checkpoint = open_checkpoint(tmp_path)
    kinds = {}
    for quantization in ("none", "auto", "fp8"):
        weights = load_weights(checkpoint, torch.float32, CPU, quantization=quantization)
        kinds[quantization] = [
            isinstance(getattr(weights.layers[layer], field), QuantizedRows)
            for layer in (0, 1)
            for field in ("qkv", "out", "gate_up", "down")
        ]
    assert kinds["none"] == [False] * 8
    assert kinds["auto"] == [False] * 5 + [True] * 3
    assert kinds["fp8"] == [True] * 8


def test_experts_stay_as_they_are(tmp_path):
    save_tiny_model(tmp_path, "qwen3_moe")
    layer = load_weights(open_checkpoint(tmp_path), torch.float32, CPU, quantization="fp8").layers[
        0
    ]
    assert isinstance(layer.qkv, QuantizedRows)
    assert isinstance(layer.gate_up, torch.Tensor)
    assert isinstance(layer.router, torch.Tensor)


@pytest.mark.parametrize("form", [None, "fp8-tensor"])
def test_parts_are_those_of_the_whole_in_fp8(tmp_path, form):
    save_tiny_model(tmp_path, vocab_size=98)
    if form:
        quantize_folder(tmp_path, form)
    checkpoint = open_checkpoint(tmp_path)
    whole = load_weights(checkpoint, torch.float32, CPU, quantization="fp8").layers[0]
    halves = [
        load_weights(checkpoint, torch.float32, CPU, part, 2, "fp8").layers[0] for part in range(2)
    ]
    joined = torch.cat([half.down.widened() for half in halves], 1)
    assert joined.equal(whole.down.widened())
    pieces = zip(*(half.gate_up.widened().chunk(2) for half in halves), strict=True)
    assert torch.cat([torch.cat(piece) for piece in pieces]).equal(whole.gate_up.widened())


def relative_error(logits, wanted):
    return np.linalg.norm(logits - wanted) / np.linalg.norm(wanted)


def test_logits(tmp_path):
    """Near those of float32, over two ranks, and with a model that two processes share: its weights
    are the same, its activations are scaled by parts of rows."""
    save_tiny_model(tmp_path, vocab_size=98, initializer_range=0.05)
    tokens = np.random.default_rng(1).integers(0, 98, 200).astype(np.int32)
    case = {"block_size": 64, "tokens_per_block": 16, "kv_placement": ["tail"]}

    def logits(**options):
        folder = tmp_path / "job"
        results = run_oracle_job(folder, 2, tmp_path, tokens, 8, [dict(case)], **options)
        return results[0, "tail"]

    plain = logits(quantization="none")
    errors = [relative_error(logits(quantization="fp8", tp=tp), plain) for tp in (1, 2)]
    assert all(1e-4 < error < 0.1 for error in errors), errors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_logits(tmp_path, dtype):
    """Nearer than those of FP8."""
    save_tiny_model(tmp_path, initializer_range=0.05)
    plain = logits_of(tmp_path)
    fp8, int8 = (
        relative_error(logits_of(tmp_path, dtype, quantization=kind), plain) for kind in KINDS
    )
    assert 1e-4 < int8 < 0.03
    assert int8 < fp8


def test_engine_says_what_it_has(tmp_path):
    save_tiny_model(tmp_path)
    quantize_folder(tmp_path, "fp8-tensor")
    for quantization, wanted in (("auto", None), ("none", None), *zip(KINDS, KINDS, strict=True)):
        options = EngineOptions(quantization=quantization)
        assert load_engine(tmp_path, SingleProcess(), 16, options).quantization == wanted


def remove(tensors, name):
    del tensors[f"{name}_scale"]


def widen(tensors, name):
    tensors[f"{name}_scale"] = torch.ones(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove, "q_proj.weight is in FP8, but the weights lack .*q_proj.weight_scale"),
        (widen, r"q_proj.weight_scale has shape \[3\], the config asks for \[\] or \[1\] or"),
        (lambda t, name: t.update({name: t[name].view(torch.int8)}), "1 weight of another arch"),
        (lambda t, name: t.update({f"{name}_shape": torch.ones(2)}), "or quantised: .*_shape"),
    ],
)
def test_damaged_checkpoints(tmp_path, change, message):
    save_tiny_model(tmp_path)
    quantize_folder(tmp_path, "fp8-tensor")
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors, "model.layers.1.self_attn.q_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=message):
        load_weights(open_checkpoint(tmp_path), torch.float32, CPU)


def test_wrong_blocks(tmp_path):
    save_tiny_model(tmp_path)
    quantize_folder(tmp_path, "fp8-block")
    config = json.loads((tmp_path / "config.json").read_text())
    for sizes, message in (
        ([128, 128], r"weight_scale_inv has shape \[2, 4\], the config asks for \[1, 1\]"),
        ([128], r"weight_block_size is \[128\]: use two whole numbers"),
    ):
        config["quantization_config"]["weight_block_size"] = sizes
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=message):
            open_checkpoint(tmp_path)


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match="--quantization is 'int4': use one of auto, none, fp8, int8"
    ):
        EngineOptions(quantization="int4")
    with pytest.raises(UserError, match="quantization int8 is for --device cpu: use fp8 on a GPU"):
        EngineOptions("cuda", quantization="int8")
    with pytest.raises(
        UserError, match=r"^down and .* 64 rows of 40, FP8 on a GPU needs multiples"
    ):
        loading.check_fp8("down", 64, 40, "another --tp")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    cuda = EngineOptions("cuda", quantization="fp8")
    with pytest.raises(
        UserError, match=r"fp8 needs a GPU of compute capability 8.9 or newer, .*8.0"
    ):
        torch_load._quantization(cuda)
    assert torch_load._quantization(replace(cuda, quantization="auto")) == "none"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert torch_load._quantization(replace(cuda, quantization="auto")) == "auto"
    save_tiny_model(tmp_path)
    quantize_folder(tmp_path, "modelopt")
    with pytest.raises(UserError, match="are in FP8: use star-attn build with --quantization fp8"):
        export_graph(tmp_path, tmp_path / "graph")


def test_a_pass_has_room_for_a_product():
    limits = [pass_limits(LLAMA_3_1_8B, 2, 1, 1000, 128, 1 << 33, fp8) for fp8 in (False, True)]
    assert limits[1].pass_tokens < limits[0].pass_tokens
