"""Rotary position embedding as a model's config describes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from star_attention.errors import UserError
from star_attention.models.fields import Fields

_ROOM = 1024  # tokens
# Of yarn's borders.
_LEAST_TURNS, _MOST_TURNS = 1e-3, 1e6


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: `theta` and how its frequencies are scaled.

    | scaling | frequencies |
    |---|---|
    | linear | all divided by `factor` |
    | llama3 | Llama 3.1's: divided by `factor` if the wave is long |
    | yarn | divided by `factor` where fewer than `beta_slow` turns fit into the original context, \
kept where more than `beta_fast` do (arXiv 2309.00071) |
    | factors | frequency i divided by `factors[i]` (Llama 3.1's scaling, in GGUF files) |
    | longrope | likewise; by `long_factors[i]` for long texts (arXiv 2402.13753) |

    Attributes:
        original_max_position: that the model was trained with before it was extended.
        truncates: yarn's borders are whole frequencies.
        attention_factor: of what is rotated.
        rotated: how many elements of a head, the first ones; None: all.
    """

    theta: float = 10000.0
    scaling: Literal["default", "linear", "llama3", "factors", "yarn", "longrope"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncates: bool = True
    attention_factor: float = 1.0
    rotated: int | None = None

    def __post_init__(self) -> None:
        if self.scaling == "yarn" and self.theta <= 1:
            raise UserError(f"rope_theta is {self.theta}: use more than 1 for yarn")
        for name in ("beta_fast", "beta_slow"):
            if not _LEAST_TURNS <= getattr(self, name) <= _MOST_TURNS:
                raise UserError(
                    f"{name} is {getattr(self, name)}: use {_LEAST_TURNS} to {_MOST_TURNS}"
                )

    @property
    def rows_per_position(self) -> int:
        """Of a rotary table: longrope has a row for short texts and one for long ones."""
        return 2 if self.scaling == "longrope" else 1

    @property
    def room(self) -> int:
        """Tokens for questions and answers that a context leaves which does not know them yet."""
        return min(_ROOM, self.original_max_position // 4)

    def is_long(self, tokens: int) -> bool:
        """Whether so many tokens of context, question and answer are rotated by `long_factors`."""
        return self.scaling == "longrope" and tokens > self.original_max_position

    def rows(self, positions: np.ndarray, is_long: bool) -> np.ndarray:
        """The rows of a rotary table for tokens of a text, of their positions, int [T]."""
        if self.rows_per_position == 1:
            return positions
        return self.rows_per_position * positions + is_long


@dataclass(frozen=True)
class RopeDefaults:
    """What Hugging Face's class of a model means by a config.

    Attributes:
        is_partial: `partial_rotary_factor` counts.
        original_max_position: without `original_max_position_embeddings`; None: what the scaling
            says.
        aliases: other names of scalings.
        theta: without `rope_theta`.
        local_theta: layers with a window have an embedding of their own, this one's without
            `rope_local_base_freq`; None: that of the others.
    """

    is_partial: bool = False
    original_max_position: int | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    theta: float = 10000.0
    local_theta: float | None = None


def rope_from_hf(
    config: Fields, defaults: RopeDefaults, head_dim: int, max_position: int
) -> tuple[RopeConfig, int | None]:
    """What a `config.json` says, and for texts of which length; None: of any. (`dynamic` scales by
    the text's length beyond `max_position`.)

    Raises:
        UserError: a value is missing or wrong, or the scaling is not supported.
    """
    # transformers 5 writes "rope_parameters", which includes theta; 4 wrote the two fields apart.
    scaling = config.fields("rope_scaling" if config.get("rope_scaling") else "rope_parameters")
    if defaults.local_theta is not None and scaling.objects():
        scaling = scaling.fields("full_attention")
    return _read(config, scaling, defaults, head_dim, max_position)


def window_rope_from_hf(
    config: Fields, defaults: RopeDefaults, head_dim: int, max_position: int
) -> RopeConfig | None:
    """That of layers with a window, where it is another one. As `rope_from_hf`."""
    if defaults.local_theta is None:
        return None
    theta = config.number("rope_local_base_freq", defaults.local_theta)
    local = replace(defaults, theta=theta, local_theta=None)
    unscaled = Fields({}, "the rope parameters of windows")
    parameters = config.fields("rope_parameters")
    scaling = parameters.fields("sliding_attention") if parameters.objects() else unscaled
    rope, longest = _read(unscaled, scaling, local, head_dim, max_position)
    if longest is not None:
        raise UserError("rope scaling 'dynamic' is not supported in layers with a window")
    return rope


def _read(
    config: Fields, scaling: Fields, defaults: RopeDefaults, head_dim: int, max_position: int
) -> tuple[RopeConfig, int | None]:
    if nested := scaling.objects():
        raise UserError(f"rope parameters for {nested[0]!r} alone are not supported: use one set")
    kind = scaling.word("rope_type", scaling.word("type", "default"))
    kind = defaults.aliases.get(kind, kind)
    if kind not in SCALINGS:
        known = ", ".join(SCALINGS)
        raise UserError(f"rope scaling {kind!r} is not supported: use one of {known}")
    original = config.whole(
        "original_max_position_embeddings",
        defaults.original_max_position
        or scaling.whole("original_max_position_embeddings", max_position),
    )
    rotated = _rotated(config, scaling, defaults, head_dim)
    options = {
        "theta": scaling.number("rope_theta", config.number("rope_theta", defaults.theta)),
        "rotated": None if rotated == head_dim else rotated,
    }
    if kind == "dynamic":
        scaling.number("factor")
        return RopeConfig(**options), max_position
    options |= _READERS[kind](scaling, original, max_position, rotated)
    return RopeConfig(scaling=kind, **options), None


def _rotated(config: Fields, scaling: Fields, defaults: RopeDefaults, head_dim: int) -> int:
    """How many elements of a head."""
    share = scaling.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    for each in (config, scaling):
        unused = each.number("partial_rotary_factor", 1.0)
        if unused != 1 and not defaults.is_partial:
            raise UserError(f"partial_rotary_factor {unused} is not supported: use 1")
    rotated = int(head_dim * min(share, 1.0))
    if share > 1 or rotated < 2 or rotated % 2:
        raise UserError(
            f"partial_rotary_factor {share} rotates {share * head_dim:g} of a head's {head_dim} "
            "elements: use an even number of them"
        )
    return rotated


def _default(scaling: Fields, original: int, max_position: int, rotated: int) -> dict:
    return {}


def _linear(scaling: Fields, original: int, max_position: int, rotated: int) -> dict:
    return {"factor": scaling.number("factor")}


def _llama3(scaling: Fields, original: int, max_position: int, rotated: int) -> dict:
    low, high = (scaling.number(f"{name}_freq_factor") for name in ("low", "high"))
    if low >= high:
        raise UserError(f"low_freq_factor is {low}: use less than high_freq_factor, {high}")
    return {
        "factor": scaling.number("factor"),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position": original,
    }


def _yarn(scaling: Fields, original: int, max_position: int, rotated: int) -> dict:
    factor = scaling.number("factor", max_position / original)
    attention = yarn_attention_factor(factor)
    if all(scaling.get(name) for name in ("mscale", "mscale_all_dim")):
        attention, all_dims = (
            yarn_attention_factor(factor, scaling.number(name))
            for name in ("mscale", "mscale_all_dim")
        )
        attention /= all_dims
    turns = {
        name: scaling.number(name) if scaling.get(name) else default
        for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
    }
    return {
        "factor": factor,
        "original_max_position": original,
        **turns,
        "truncates": "truncate" not in scaling or scaling.flag("truncate"),
        "attention_factor": scaling.number("attention_factor", attention),
    }


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """Source: YaRN, arXiv 2309.00071, equation 22."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(scaling: Fields, original: int, max_position: int, rotated: int) -> dict:
    factor = scaling.number("factor", max_position / original)
    return {
        "factors": scaling.numbers("short_factor", rotated // 2),
        "long_factors": scaling.numbers("long_factor", rotated // 2),
        "original_max_position": original,
        "attention_factor": scaling.number(
            "attention_factor", longrope_attention_factor(factor, original)
        ),
    }


def longrope_attention_factor(factor: float, original: int) -> float:
    """Source: LongRoPE, arXiv 2402.13753, as Phi-3 has it."""
    if factor <= 1:
        return 1.0
    if original == 1:
        raise UserError("original_max_position_embeddings is 1: use more for longrope")
    return math.sqrt(1 + math.log(factor) / math.log(original))


# What each scaling has of a config: from its parameters, the lengths that the model was trained
# with and is made for, and how many elements of a head are rotated.
_READERS: dict[str, Callable[[Fields, int, int, int], dict]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
SCALINGS = (*_READERS, "dynamic")
