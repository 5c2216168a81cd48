"""Star Attention for TensorRT: long contexts, sharded over ranks."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

from star_attention.config import StarConfig
from star_attention.errors import UserError
from star_attention.models.config import ModelConfig
from star_attention.plan import Plan, make_plan

if TYPE_CHECKING:
    from star_attention.llm import LLM, Answer
    from star_attention.runtime.sampling import SamplingParams

# Read when torch is loaded. Threads that wait sleep: where ranks or other programs share the cores,
# spinning takes the time that those who work would need.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__all__ = [
    "LLM",
    "Answer",
    "ModelConfig",
    "Plan",
    "SamplingParams",
    "StarConfig",
    "UserError",
    "make_plan",
]

_LAZY = {
    "LLM": "star_attention.llm",
    "Answer": "star_attention.llm",
    "SamplingParams": "star_attention.runtime.sampling",
}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
