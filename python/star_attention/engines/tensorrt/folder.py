"""The folder of a TensorRT engine: one for all ranks, with all that running it needs.

config.json   `EngineConfig`
engine.plan   the engine
rotary.bin    float32 [max_seq_len or, for longrope, twice that, head_dim]: `rotary_table`
tokenizer/    the model's, in Hugging Face's format
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from star_attention.config import AnchorMode, StarConfig
from star_attention.errors import UserError
from star_attention.models.checkpoint import ENGINE_FILE, TRTLLM_ENGINE_FILE
from star_attention.models.config import ModelConfig

PLAN = ENGINE_FILE
CONFIG, ROTARY, TOKENIZER = "config.json", "rotary.bin", "tokenizer"
KIND = "star_attention_engine"
FORMAT = 1


@dataclass(frozen=True)
class EngineLimits:
    """What an engine can run. Names are trtllm-build's where they mean the same.

    Attributes:
        max_batch_size: questions that are answered together.
        max_input_len: tokens of context and question.
        max_seq_len: tokens of context, question and answer.
        max_num_tokens: tokens in one pass: at least a block, in mode `recompute` with its anchor;
            activations take memory for so many.
        tokens_per_block: tokens a page of the KV cache holds.
        block_size, anchor_size: how contexts are divided unless the user says otherwise, as in
            `StarConfig`.
        cp_size: ranks that the engine runs on; None: any number.
        anchor_mode: instead of the default one.
    """

    max_batch_size: int = 8
    max_input_len: int = 131072
    max_seq_len: int = 132096
    max_num_tokens: int = 32768
    tokens_per_block: int = 128
    block_size: int | None = None
    anchor_size: int | None = None
    cp_size: int | None = None
    anchor_mode: AnchorMode | None = None

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}: use 1 or more")
        if self.tokens_per_block not in (64, 128):
            raise UserError(f"--tokens_per_block is {self.tokens_per_block}: use 64 or 128")
        if self.cp_size is not None and self.cp_size < 1:
            raise UserError(f"--cp_size is {self.cp_size}: use 1 or more")
        if self.max_input_len >= self.max_seq_len:
            raise UserError(
                f"--max_input_len is {self.max_input_len}, --max_seq_len {self.max_seq_len}: "
                f"use a --max_seq_len that leaves room for answers"
            )
        self.divide(StarConfig(tokens_per_block=self.tokens_per_block))
        if self.block_size is not None and self.block_size > self.max_num_tokens:
            raise UserError(
                f"--max_num_tokens is {self.max_num_tokens}: use at least --block_size, "
                f"{self.block_size}"
            )

    @property
    def max_sequences(self) -> int:
        """Blocks of a context pass, or questions, at most."""
        return max(self.max_batch_size, self.max_num_tokens // self.tokens_per_block)

    @property
    def max_logit_rows(self) -> int:
        """Rows of a pass whose logits can be had: of all questions, or of a question's tokens."""
        return max(self.max_batch_size, 128)

    @property
    def max_pages_of_sequence(self) -> int:
        return -(-self.max_seq_len // self.tokens_per_block)

    def divide(self, config: StarConfig) -> StarConfig:
        """`config` with the engine's own division where it leaves that open.

        Raises:
            UserError: its pages are not the engine's.
        """
        if config.tokens_per_block != self.tokens_per_block:
            raise UserError(
                f"--tokens-per-block is {config.tokens_per_block}, but the engine's pages hold "
                f"{self.tokens_per_block}: use --tokens-per-block {self.tokens_per_block}"
            )
        if self.anchor_mode and config.anchor_mode == StarConfig.anchor_mode:
            config = replace(config, anchor_mode=self.anchor_mode)
        if config.block_size is not None:
            return config
        anchor = self.anchor_size if config.anchor_size is None else config.anchor_size
        return replace(config, block_size=self.block_size, anchor_size=anchor)


@dataclass(frozen=True)
class EngineConfig:
    """An engine's config.json.

    Attributes:
        dtype: of weights and computation.
        tensorrt, gpu, compute_capability: what the engine was built with, and only runs with.
        weights_sha256: of the weights.
        built_by: this package's version.
        quantization: `fp8`: of projections; None: they are in `dtype`.
    """

    model: ModelConfig
    limits: EngineLimits
    dtype: str
    tensorrt: str
    gpu: str
    compute_capability: str
    weights_sha256: str
    built_by: str
    quantization: str | None = None

    def write(self, folder: Path) -> None:
        content = {KIND: FORMAT, **asdict(self)}
        (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")


def plan_file(folder: Path) -> Path:
    """The engine itself."""
    plan = folder / PLAN
    return plan if plan.exists() else folder / TRTLLM_ENGINE_FILE


def read_content(folder: Path) -> dict[str, Any]:
    """config.json as it is. Raises UserError if it cannot be read."""
    try:
        content = json.loads((folder / CONFIG).read_text())
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / CONFIG} cannot be read: {error}: build the engine again"
        ) from None


def write_rotary(model: ModelConfig, positions: int, path: Path) -> None:
    """The engine's input `rotary`."""
    import torch

    from star_attention.models.rotary import rotary_table

    table = rotary_table(model.rope, model.head_dim, positions, torch.device("cpu"))
    table.numpy().tofile(path)
