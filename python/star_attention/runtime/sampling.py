"""Choosing the next token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace, device, to_device

from star_attention.engines.base import Logits
from star_attention.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How answers are generated.

    In the order of vLLM's sampler: `repetition_penalty`, `frequency_penalty`, `presence_penalty`;
    greedy choice ends here; `temperature`, `min_p`, `top_k`, `top_p`. (Hugging Face applies `min_p`
    behind `top_p`.)

    Attributes:
        max_tokens: tokens an answer has at most.
        temperature: divides the logits; 0: the most likely token (greedy).
        top_k: only the k most likely tokens are candidates; 0: all.
        top_p: only the most likely tokens that together reach this probability; 1: all.
        min_p: only tokens of at least this share of the likeliest one's probability; 0: all.
        repetition_penalty: divides the logits, or multiplies negative ones, of tokens that context,
            question or answer have already; 1: none.
        presence_penalty: is subtracted from the logits of tokens that the answer has already.
        frequency_penalty: likewise, for each time that it has them.
        seed: of the random choice. The same seed gives the same tokens on every rank, and for a
            question whether it is asked alone or with others.
        stop: strings, or one, that end an answer; they are not part of it.
        ignore_eos: go on after the model's end token (benchmarks).
        logprobs: log-probabilities are wanted of each token chosen, and of so many likeliest ones;
            None: not wanted.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        elif isinstance(self.stop, Iterable):
            object.__setattr__(self, "stop", tuple(self.stop))
        for name, valid, right in (
            ("max_tokens", _is_whole(self.max_tokens) and self.max_tokens >= 1, "1 or more"),
            (
                "temperature",
                _is_real(self.temperature) and self.temperature >= 0,
                "0 (greedy) or more",
            ),
            ("top_k", _is_whole(self.top_k) and self.top_k >= 0, "0 (all) or more"),
            ("top_p", _is_real(self.top_p) and 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("min_p", _is_real(self.min_p) and 0 <= self.min_p <= 1, "0 (all) to 1"),
            (
                "repetition_penalty",
                _is_real(self.repetition_penalty) and self.repetition_penalty > 0,
                "more than 0; 1 is none",
            ),
            ("presence_penalty", _is_penalty(self.presence_penalty), "-2 to 2"),
            ("frequency_penalty", _is_penalty(self.frequency_penalty), "-2 to 2"),
            ("seed", _is_whole(self.seed) and self.seed >= 0, "0 or more"),
            ("stop", _are_texts(self.stop), "strings that are not empty"),
            (
                "logprobs",
                self.logprobs is None or (_is_whole(self.logprobs) and self.logprobs >= 0),
                "0 or more",
            ),
        ):
            if not valid:
                raise UserError(f"{name} is {getattr(self, name)!r}: use {right}")

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probabilities under the model, before penalties, temperature and what else shapes
    a choice.

    Attributes:
        token: of the token chosen.
        top: the likeliest tokens, likeliest first, and theirs.
    """

    token: float
    top: tuple[tuple[int, float], ...] = ()


def finite(logprob: float) -> float:
    """JSON knows no infinity; vLLM's value instead."""
    return max(logprob, -9999.0) if not math.isnan(logprob) else -9999.0


def _is_real(value: object) -> bool:
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return is_number and bool(np.isfinite(value))


def _is_penalty(value: object) -> bool:
    return _is_real(value) and -2 <= value <= 2


def _are_texts(values: object) -> bool:
    return isinstance(values, tuple) and all(isinstance(v, str) and v for v in values)


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def sample(logits: Logits, params: SamplingParams, uniforms: np.ndarray) -> np.ndarray:
    """Chooses tokens where the logits are.

    Args:
        logits: float32 [R, vocab_size], NumPy's, torch's or CuPy's; penalised already.
        uniforms: [R], random numbers in [0, 1); greedy choice ignores them.

    Returns:
        int [R], on the host.
    """
    xp = array_namespace(logits)
    if params.temperature == 0:
        return to_numpy(xp.argmax(logits, axis=-1))
    order = xp.argsort(logits, axis=-1, descending=True, stable=True)
    if params.top_k:
        order = order[:, : params.top_k]
    scores = xp.astype(xp.take_along_axis(logits, order, axis=-1), xp.float64) / params.temperature
    probabilities = xp.exp(scores - scores[:, :1])  # of the likeliest one's
    probabilities = xp.where(probabilities >= params.min_p, probabilities, 0.0 * probabilities)
    probabilities = probabilities / xp.sum(probabilities, axis=-1, keepdims=True)
    # Tokens before which the probability has not yet reached top_p: at least the first.
    before = xp.cumulative_sum(probabilities, axis=-1) - probabilities
    probabilities = xp.where(before < params.top_p, probabilities, 0.0 * probabilities)
    reached = xp.cumulative_sum(probabilities, axis=-1)
    targets = xp.asarray(uniforms, dtype=xp.float64, device=device(logits))[:, None]
    chosen = xp.sum(xp.astype(reached <= targets * reached[:, -1:], xp.int64), axis=-1)
    return to_numpy(xp.take_along_axis(order, chosen[:, None], axis=-1)[:, 0])


def to_numpy(array: Logits) -> np.ndarray:
    return np.asarray(to_device(array, "cpu"))


def token_logprobs(
    logits: Logits, tokens: Sequence[int], counts: Sequence[int]
) -> list[TokenLogprobs]:
    """Of each row's chosen token and of its counts[i] likeliest.

    Args:
        logits: float32 [R, vocab_size].
    """
    xp = array_namespace(logits)
    shifted = xp.astype(logits, xp.float64) - xp.astype(
        xp.max(logits, axis=-1)[:, None], xp.float64
    )
    scores = shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1))[:, None]
    most = max(counts)
    order = xp.argsort(logits, axis=-1, descending=True, stable=True)[:, :most]
    likeliest, of_likeliest = to_numpy(order), to_numpy(xp.take_along_axis(scores, order, axis=-1))
    chosen = xp.asarray(tokens, dtype=order.dtype, device=device(logits))[:, None]
    of_chosen = to_numpy(xp.take_along_axis(scores, chosen, axis=-1))[:, 0]
    found = []
    for row, count in enumerate(counts):
        top = zip(likeliest[row, :count].tolist(), of_likeliest[row, :count].tolist(), strict=True)
        found.append(TokenLogprobs(float(of_chosen[row]), tuple(top)))
    return found
