"""Asks a model the samples of tasks, with one attention method after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from star_attention.config import AnchorMode, AttentionMethod, StarConfig
from star_attention.errors import RankError
from star_attention.evals.prompts import PromptTokenizer
from star_attention.evals.results import Results
from star_attention.evals.sample import Sample, Task
from star_attention.llm import LLM, EncodedContext
from star_attention.runtime.sampling import SamplingParams

# Sizes that follow the length: of the block, a share of it; of the anchor, a share of the block.
SHARES = {"whole": 1, "block": 1, "half": 2, "quarter": 4, "eighth": 8}
# Samples that are asked together, and tokens of their contexts, unless they share one.
_BATCH, _BATCH_TOKENS = 8, 32768


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
class Run:
    """One configuration's part of an evaluation.

    Attributes:
        samples: of each task at most.
        config: the division for a length, in tokens.
        timed: whether records say what answers took.
    """

    results: Results
    tasks: Sequence[Task]
    samples: int
    config: Callable[[int], StarConfig]
    timed: bool = True

    def pending(self, task: Task) -> list[int | str]:
        """The indices of samples without an answer."""
        done = self.results.finished
        wanted = task.indices[: self.samples]
        return [index for index in wanted if (task.length, task.name, index) not in done]

    def first_failure(self) -> str | None:
        """Why the first sample failed, if no sample has an answer."""
        keys = [(t.length, t.name, i) for t in self.tasks for i in t.indices[: self.samples]]
        records = [self.results.records[key] for key in keys if key in self.results.records]
        if not records or any("error" not in record for record in records):
            return None
        return records[0]["error"]


OnSample = Callable[[Run, Task, dict[str, Any]], None]
# A context's text, its division, and the samples that ask it.
Part = tuple[str, StarConfig, list[Sample]]


def evaluate(llm: LLM, prompts: PromptTokenizer, runs: Sequence[Run], on_sample: OnSample) -> None:
    """Answers what is pending, batch after batch.

    A sample that is refused is recorded with its error; a rank that fails ends the job.

    Args:
        on_sample: called with every new record.
    """
    for run in runs:
        try:
            for task in run.tasks:
                for record in _records(llm, prompts, run, task):
                    run.results.append(record)
                    on_sample(run, task, record)
        finally:
            run.results.write_scores()


def _records(llm: LLM, prompts: PromptTokenizer, run: Run, task: Task) -> Iterator[dict[str, Any]]:
    """Makes the pending samples of a task and has them answered."""
    failures: dict[int | str, Exception] = {}

    def samples() -> Iterator[Sample]:
        for index in run.pending(task):
            try:
                yield task.sample(index)
            except Exception as error:
                failures[index] = error

    for batch in _batches(samples(), task.length):
        yield from _ask(llm, prompts, run, task, batch)
    for index, error in failures.items():
        yield _failure(task, index, error)


def _batches(samples: Iterator[Sample], length: int | None) -> Iterator[list[Sample]]:
    """What is asked together: samples of one context, or of as many as their length allows."""
    most = max(1, _BATCH_TOKENS // length) if length else 1
    batch: list[Sample] = []
    for sample in samples:
        contexts = {other.context for other in (*batch, sample)}
        if len(batch) == _BATCH or len(contexts) > most:
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def _ask(
    llm: LLM, prompts: PromptTokenizer, run: Run, task: Task, batch: Sequence[Sample]
) -> Iterator[dict[str, Any]]:
    """The records of a batch; if it fails, its samples are asked one by one."""
    try:
        parts: list[Part] = []
        for context, group in groupby(batch, key=lambda sample: sample.context):
            samples = list(group)
            config = run.config(task.length or prompts.count(samples[0]) + task.max_tokens)
            parts.append((context, config, samples))
        answers = _answer(llm, parts, task.max_tokens)
    except RankError:
        raise
    except Exception as error:
        if len(batch) == 1:
            yield _failure(task, batch[0].index, error)
        else:
            for sample in batch:
                yield from _ask(llm, prompts, run, task, [sample])
        return
    for sample, (prediction, sizes, times) in zip(batch, answers, strict=True):
        yield {
            "task": task.name,
            "length": task.length,
            "index": sample.index,
            **sample.extra,
            "pred": prediction,
            "outputs": list(sample.outputs),
            "score": task.score(prediction, sample),
            "depths": [round(depth, 4) for depth in sample.depths],
            **sizes,
            **(times if run.timed else {}),
        }


def _failure(task: Task, index: int | str, error: Exception) -> dict[str, Any]:
    reason = str(error) or type(error).__name__
    return {"task": task.name, "length": task.length, "index": index, "error": reason}


def _answer(
    llm: LLM, parts: Sequence[Part], max_tokens: int
) -> list[tuple[str, dict[str, int], dict[str, float]]]:
    """Each answer, sizes in tokens, and its share of the seconds of phase 1 and both."""
    asked: list[tuple[EncodedContext, Sample, float]] = []
    try:
        for text, config, samples in parts:
            begin = time.perf_counter()
            context = llm.encode(text, config)
            seconds = (time.perf_counter() - begin) / len(samples)
            asked += [(context, sample, seconds) for sample in samples]
        begin = time.perf_counter()
        answers = llm.ask(
            [context for context, *_ in asked],
            [sample.query for _, sample, _ in asked],
            SamplingParams(max_tokens=max_tokens),
            [sample.answer_prefix for _, sample, _ in asked],
        )
        share = (time.perf_counter() - begin) / len(asked)
    finally:
        for context, *_ in asked:
            context.release()
    return [
        (
            answer.text,
            {
                "context_tokens": context.plan.context_len,
                "block_size": context.plan.block_size,
                "anchor_size": context.plan.anchor_size,
            },
            {"context_seconds": seconds, "seconds": seconds + share},
        )
        for answer, (context, _, seconds) in zip(answers, asked, strict=True)
    ]
