"""How checkpoints say that their weights are quantised. FP8 is read, other kinds are refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from star_attention.errors import UserError
from star_attention.models.fields import Fields

# How projections are kept: `auto` in FP8 where a checkpoint has them in it and the GPU computes in
# it, otherwise in the run's dtype, as `none` always.
Quantization = Literal["auto", "none", "fp8", "int8"]
QUANTIZATIONS: tuple[Quantization, ...] = ("auto", "none", "fp8", "int8")

# Endings of tensors that are not read beside FP8 weights: activations are scaled as they come, and
# the KV cache is not theirs.
UNUSED_SCALES = (".input_scale", ".k_scale", ".v_scale")


@dataclass(frozen=True)
class Fp8Format:
    """Of weights in e4m3: each is to be multiplied by a scale.

    Attributes:
        block: rows and columns that share a scale; None: a tensor or each of its rows has one.
    """

    block: tuple[int, int] | None = None

    def scale_shapes(self, rows: int, columns: int) -> list[tuple[int, ...]]:
        """That the scales of a weight [rows, columns] may have."""
        if self.block is None:
            return [(), (1,), (1, 1), (rows, 1), (rows,)]
        return [(-(-rows // self.block[0]), -(-columns // self.block[1]))]


def fp8_format(described: Fields) -> Fp8Format:
    """Of a `quantization_config` in Hugging Face's config.json.

    Raises:
        UserError: it is something else.
    """
    method = described.word("quant_method", "unnamed method")
    readers = {
        "compressed-tensors": _compressed_tensors,
        "fp8": _blocks_or_tensors,
        "modelopt": _modelopt,
    }
    found = readers[method](described) if method in readers else None
    if found is None:
        raise _refusal(f"{method!r}")
    return found


def modelopt_format(described: Fields) -> Fp8Format | None:
    """Of ModelOpt's `hf_quant_config.json`; None: nothing is quantised.

    Raises:
        UserError: it is something else.
    """
    quantization = described.fields("quantization")
    if quantization.get("quant_algo") is None:
        return None
    if (found := _modelopt(quantization)) is None:
        raise _refusal(f"{quantization.get('quant_algo')!r} in hf_quant_config.json")
    return found


def _refusal(method: str) -> UserError:
    return UserError(
        f"the model's weights are quantised ({method}): use a safetensors folder in float32, "
        "bfloat16, float16 or FP8 (e4m3), or a GGUF file"
    )


def _modelopt(described: Fields) -> Fp8Format | None:
    is_known = described.get("quant_algo") in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
    return Fp8Format() if is_known else None


def _blocks_or_tensors(described: Fields) -> Fp8Format | None:
    """DeepSeek's blocks, or tensors with one scale."""
    if described.word("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        return None
    return Fp8Format(_block(described, "weight_block_size"))


def _compressed_tensors(described: Fields) -> Fp8Format | None:
    groups = described.fields("config_groups")
    weights = [groups.fields(name).fields("weights") for name in groups.objects()]
    blocks = {_block(each, "block_structure") for each in weights}
    is_fp8 = all(
        each.word("type", "") == "float"
        and each.whole("num_bits", 8) == 8
        and each.word("strategy", "tensor") in ("tensor", "channel", "block")
        for each in weights
    )
    is_plain = (
        not described.get("transform_config")
        and described.fields("sparsity_config").word("format", "dense") == "dense"
    )
    return Fp8Format(*blocks) if is_fp8 and is_plain and len(blocks) == 1 else None


def _block(described: Fields, name: str) -> tuple[int, int] | None:
    sizes = described.get(name)
    if sizes is None:
        return None
    is_pair = isinstance(sizes, list) and len(sizes) == 2
    if not is_pair or not all(type(size) is int and size > 0 for size in sizes):
        raise UserError(f"the quantisation's {name} is {sizes!r}: use two whole numbers above 0")
    return sizes[0], sizes[1]
