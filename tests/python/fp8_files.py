"""Checkpoints in FP8 as people have them, made of a folder in float32."""

import json

import torch
from safetensors.torch import load_file, save_file

from star_attention.ops.quantized import FP8, LARGEST

BLOCK = [32, 16]  # where people have 128 x 128
GROUP = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}


def compressed(strategy, **more):
    weights = {**GROUP, "strategy": strategy, **more}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


# By a name: what scales stand for, the end of their names, and what config.json says.
FORMS = {
    "compressed-dynamic": ("row", "weight_scale", compressed("channel")),
    "compressed-static": ("tensor", "weight_scale", compressed("tensor")),
    "compressed-block": ("block", "weight_scale", compressed("block", block_structure=BLOCK)),
    "fp8-tensor": (
        "tensor",
        "weight_scale",
        {"quant_method": "fp8", "activation_scheme": "static"},
    ),
    "fp8-block": (
        "block",
        "weight_scale_inv",
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": BLOCK},
    ),
    "modelopt": ("tensor", "weight_scale", None),
}


def scaled(weight, by):
    """FP8 values of a weight, their scales as a file has them, and what both stand for."""
    rows, columns = weight.shape
    height, width = {"row": (1, columns), "tensor": (rows, columns), "block": BLOCK}[by]
    padded = torch.zeros(-(-rows // height) * height, -(-columns // width) * width)
    padded[:rows, :columns] = weight
    blocks = padded.view(len(padded) // height, height, -1, width)
    scales = blocks.abs().amax((1, 3), keepdim=True) / LARGEST[FP8]
    values = (blocks / scales).to(FP8)
    wide = (values.float() * scales).view(padded.shape)[:rows, :columns]
    values = values.view(torch.uint8).view(padded.shape)[:rows, :columns].contiguous().view(FP8)
    shape = {"row": (rows, 1), "tensor": (), "block": (len(blocks), blocks.shape[2])}[by]
    return values, scales.reshape(shape), wide


def quantize_folder(folder, form, kept=()):
    """Rewrites `folder` in one of FORMS; returns the weights that its projections stand for.

    Args:
        kept: parts of names of projections that stay as they are.
    """
    by, ending, described = FORMS[form]
    tensors = load_file(folder / "model.safetensors")
    meant = {}
    for name in [name for name in tensors if "_proj.weight" in name]:
        if any(part in name for part in kept):
            continue
        tensors[name], scales, meant[name] = scaled(tensors[name], by)
        base = name.removesuffix("weight")
        tensors[base + ending] = scales
        if form in ("compressed-static", "fp8-tensor", "modelopt"):
            tensors[f"{base}input_scale"] = torch.tensor(0.5)
        if form == "modelopt" and "k_proj" in name:
            tensors[f"{base}k_scale"] = torch.tensor(1.0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if described is None:
        quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
        described = {"producer": {"name": "modelopt"}, "quantization": quantization}
        (folder / "hf_quant_config.json").write_text(json.dumps(described))
    else:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = described
        (folder / "config.json").write_text(json.dumps(config))
    return meant
