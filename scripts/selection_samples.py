"""RULER samples as tokens in a file, so that a GPU machine needs neither texts nor their time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from star_attention.evals.prompts import PromptTokenizer
from star_attention.evals.ruler import TASKS, load_task
from star_attention.evals.sample import Sample


@dataclass(frozen=True)
class Tokens:
    """A sample.

    Attributes:
        context, question: token ids.
        needles: of each answer's needle the context's token where it begins, in the text's order.
    """

    context: np.ndarray
    question: np.ndarray
    outputs: list[str]
    needles: list[int]


def score(task: str, prediction: str, outputs: Sequence[str]) -> float:
    """0 to 1."""
    from star_attention.evals import metrics

    part = task.startswith("qa")
    return (metrics.string_match_part if part else metrics.string_match_all)(prediction, outputs)


def prepare(
    prompts: PromptTokenizer, task: str, length: int, count: int, data_dir: Path | None, out: Path
) -> None:
    """Writes `count` samples of a task to OUT/TASK-LENGTH.npz."""
    made = load_task(task, prompts, length, 42, data_dir)
    samples = [made.sample(index) for index in made.indices[:count]]
    contexts = [prompts.context_tokens(sample.context) for sample in samples]
    questions = [prompts.question_tokens(each.query, each.answer_prefix) for each in samples]
    about = [
        {"outputs": list(sample.outputs), "needles": _needles(prompts, sample)}
        for sample in samples
    ]
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        out / f"{task}-{length}.npz",
        tokens=np.concatenate([*contexts, *questions]).astype(np.int32),
        sizes=np.array([len(tokens) for tokens in (*contexts, *questions)]),
        about=json.dumps(about),
    )


def load(folder: Path, task: str, length: int) -> list[Tokens]:
    with np.load(folder / f"{task}-{length}.npz") as stored:
        parts = np.split(stored["tokens"], stored["sizes"].cumsum()[:-1])
        about = json.loads(str(stored["about"]))
    count = len(about)
    return [
        Tokens(context, question, each["outputs"], each["needles"])
        for context, question, each in zip(parts[:count], parts[count:], about, strict=True)
    ]


def max_tokens(task: str) -> int:
    return TASKS[task]


def _needles(prompts: PromptTokenizer, sample: Sample) -> list[int]:
    """Where they begin, give or take the tokens that stand between context and question."""
    text = sample.context
    starts = sorted(round(depth * len(text)) for depth in sample.depths)
    return [len(prompts.context_tokens(text[:start])) for start in starts]
