"""Choosing the next token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from star_attention.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How answers are generated.

    Attributes:
        max_tokens: tokens an answer has at most.
        temperature: divides the logits; 0: the most likely token (greedy).
        top_k: only the k most likely tokens are candidates; 0: all.
        top_p: only the most likely tokens that together reach this probability; 1: all.
        seed: of the random choice. The same seed gives the same tokens on every rank, and for a
            question whether it is asked alone or with others.
        stop: strings that end an answer; they are not part of it.
        ignore_eos: go on after the model's end token (benchmarks).
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, valid, right in (
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("seed", self.seed >= 0, "0 or more"),
            ("stop", all(self.stop), "strings that are not empty"),
        ):
            if not valid:
                raise UserError(f"{name} is {getattr(self, name)!r}: use {right}")


def sample(logits: np.ndarray, params: SamplingParams, rng: np.random.Generator) -> int:
    """The next token from its logits, float32 [vocab_size]."""
    if params.temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")
    if params.top_k:
        order = order[: params.top_k]
    scaled = logits[order].astype(np.float64) / params.temperature
    probabilities = np.exp(scaled - scaled[0])
    probabilities /= probabilities.sum()
    # Tokens before which the probability has not yet reached top_p: at least the first.
    kept = int(np.searchsorted(np.cumsum(probabilities), params.top_p)) + 1
    probabilities = probabilities[:kept] / probabilities[:kept].sum()
    return int(order[rng.choice(len(probabilities), p=probabilities)])
