"""Asks a model the samples of tasks, with one attention method after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

from star_attention.config import AnchorMode, AttentionMethod, StarConfig
from star_attention.errors import UserError
from star_attention.evals.prompts import PromptTokenizer
from star_attention.evals.results import Results
from star_attention.evals.sample import Sample, Task
from star_attention.llm import LLM
from star_attention.runtime.sampling import SamplingParams

# Sizes that follow the length: of the block, a share of it; of the anchor, a share of the block.
SHARES = {"whole": 1, "block": 1, "half": 2, "quarter": 4, "eighth": 8}
# Questions about one context that are asked together.
_BATCH = 8


@dataclass(frozen=True)
class Method:
    """How one configuration attends.

    Attributes:
        block_size: `whole`, `half`, `quarter` or `eighth` of the length, or tokens; star only.
        anchor_size: `block`, `half`, `quarter` or `eighth` of the block, `page`, or tokens.
    """

    attention: AttentionMethod
    block_size: str | None = None
    anchor_size: str | None = None

    def config(self, length: int, anchor_mode: AnchorMode, tokens_per_block: int) -> StarConfig:
        """The division of a context for a prompt and answer of `length` tokens; shares are rounded
        up to whole pages.

        Raises:
            UserError: sizes do not fit one another.
        """
        if self.attention != "star":
            return StarConfig(attention=self.attention, tokens_per_block=tokens_per_block)

        def tokens(size: str, whole: int) -> int:
            if size == "page":
                return tokens_per_block
            if size not in SHARES:
                return int(size)
            return -(-whole // (SHARES[size] * tokens_per_block)) * tokens_per_block

        block = tokens(self.block_size, length)
        anchor = tokens(self.anchor_size, block)
        return StarConfig(block, anchor, anchor_mode, tokens_per_block=tokens_per_block)


@dataclass(frozen=True)
class Job:
    """What all ranks run together: questions about one context."""

    context: str
    queries: Sequence[str]
    config: StarConfig
    max_tokens: int


@dataclass(frozen=True)
class Run:
    """One configuration's part of an evaluation, on rank 0.

    Attributes:
        samples: of each task at most.
        config: the division for a length, in tokens.
    """

    results: Results
    tasks: Sequence[Task]
    samples: int
    config: Callable[[int], StarConfig]

    def pending(self, task: Task) -> list[int | str]:
        """The indices of samples without an answer."""
        done = self.results.finished
        wanted = task.indices[: self.samples]
        return [index for index in wanted if (task.length, task.name, index) not in done]


OnSample = Callable[[Run, Task, dict[str, Any]], None]


def evaluate(
    llm: LLM, prompts: PromptTokenizer | None, runs: Sequence[Run], on_sample: OnSample
) -> None:
    """Answers what is pending, context after context; ranks other than 0 follow rank 0.

    A sample that fails is recorded with its error. On several ranks an answer may only fail with
    what all of them meet (UserError); anything else ends the job.

    Args:
        prompts, runs: of rank 0.
        on_sample: called on rank 0 with every new record.
    """
    if llm.comm.rank == 0:
        for run in runs:
            try:
                for task in run.tasks:
                    for record in _records(llm, prompts, run, task):
                        run.results.append(record)
                        on_sample(run, task, record)
            finally:
                run.results.write_scores()
        llm.comm.broadcast_object(None)
        return
    while (job := llm.comm.broadcast_object(None)) is not None:
        with suppress(UserError):  # rank 0 has the same one and records it
            _answer(llm, job)


def _records(llm: LLM, prompts: PromptTokenizer, run: Run, task: Task) -> Iterator[dict[str, Any]]:
    """Makes the pending samples of a task and has them answered, those of one context together."""
    failures: dict[int | str, Exception] = {}

    def samples() -> Iterator[Sample]:
        for index in run.pending(task):
            try:
                yield task.sample(index)
            except Exception as error:
                failures[index] = error

    for _, group in groupby(samples(), key=lambda sample: sample.context):
        while batch := list(islice(group, _BATCH)):
            yield from _ask(llm, prompts, run, task, batch)
    for index, error in failures.items():
        yield _failure(task, index, error)


def _ask(
    llm: LLM, prompts: PromptTokenizer, run: Run, task: Task, batch: Sequence[Sample]
) -> Iterator[dict[str, Any]]:
    recoverable = UserError if llm.comm.size > 1 else Exception
    try:
        config = run.config(task.length or prompts.count(batch[0]) + task.max_tokens)
        queries = [prompts.query(sample) for sample in batch]
        job = Job(prompts.context(batch[0]), queries, config, task.max_tokens)
        llm.comm.broadcast_object(job)
        predictions, times = _answer(llm, job)
    except recoverable as error:
        for sample in batch:
            yield _failure(task, sample.index, error)
        return
    for sample, prediction in zip(batch, predictions, strict=True):
        yield {
            "task": task.name,
            "length": task.length,
            "index": sample.index,
            **sample.extra,
            "pred": prediction,
            "outputs": list(sample.outputs),
            "score": task.score(prediction, sample),
            "depths": [round(depth, 4) for depth in sample.depths],
            **times,
        }


def _failure(task: Task, index: int | str, error: Exception) -> dict[str, Any]:
    reason = str(error) or type(error).__name__
    return {"task": task.name, "length": task.length, "index": index, "error": reason}


def _answer(llm: LLM, job: Job) -> tuple[list[str], dict[str, float]]:
    """The answers (rank 0), and what an answer took: tokens and seconds of both phases."""
    begin = time.perf_counter()
    context = llm.encode(job.context, job.config)
    encoded = time.perf_counter()
    try:
        answers = llm.ask(context, job.queries, SamplingParams(max_tokens=job.max_tokens))
    finally:
        context.release()
    plan, share = context.plan, 1 / len(job.queries)
    return [answer.text for answer in answers], {
        "context_tokens": plan.context_len,
        "block_size": plan.block_size,
        "anchor_size": plan.anchor_size,
        "context_seconds": (encoded - begin) * share,
        "seconds": (time.perf_counter() - begin) * share,
    }
