"""Asks a model the samples of tasks, with one attention method after the other."""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
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
# Samples that are asked together at most, and contexts that are held for them.
_BATCH = 32
# Tokens of these contexts at most, where the KV cache takes what it needs of the host's memory.
_BATCH_TOKENS = 32768


@dataclass(frozen=True)
class Method:
    """How one configuration attends.

    Attributes:
        block_size: `whole`, `half`, `quarter` or `eighth` of the length, or tokens; star only.
        anchor_size: `block`, `half`, `quarter` or `eighth` of the block, `page`, or tokens.
        selected_pages: as in `StarConfig`; 0: none, the paper's method.
    """

    attention: AttentionMethod
    block_size: str | None = None
    anchor_size: str | None = None
    selected_pages: int = 0

    @property
    def configuration(self) -> dict[str, Any]:
        """What results say of it: selected pages only if there are any."""
        said = asdict(self)
        if not self.selected_pages:
            del said["selected_pages"]
        return said

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
        return StarConfig(
            block,
            anchor,
            anchor_mode,
            tokens_per_block=tokens_per_block,
            selected_pages=self.selected_pages,
        )


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


@dataclass(frozen=True)
class Read:
    """A context in the KV cache and the samples that ask it.

    Attributes:
        seconds: that reading it took, a sample's share.
        asked_tokens: of KV that all its questions and answers take at most.
    """

    context: EncodedContext
    samples: Sequence[Sample]
    seconds: float
    asked_tokens: int


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
    """Makes the pending samples of a task and has them answered, as many contexts at a time as the
    KV cache has room for. Samples in a row with the same context share it."""
    failures: dict[int | str, Exception] = {}

    def samples() -> Iterator[Sample]:
        for index, made in _made(task, run.pending(task)):
            try:
                yield made.result()
            except Exception as error:
                failures[index] = error

    batch: list[Read] = []
    try:
        for _, group in itertools.groupby(samples(), key=lambda sample: sample.context):
            asking = list(group)
            if _is_full(llm, batch):
                yield from _ask_batch(llm, prompts, run, task, batch)
            read = _read(llm, prompts, run, task, asking)
            if isinstance(read, Exception) and batch:  # beside others it may have had no room
                yield from _ask_batch(llm, prompts, run, task, batch)
                read = _read(llm, prompts, run, task, asking)
            if isinstance(read, Exception):
                yield from (_failure(task, sample.index, read) for sample in asking)
            else:
                batch.append(read)
        yield from _ask_batch(llm, prompts, run, task, batch)
    finally:
        _release(batch)
    for index, error in failures.items():
        yield _failure(task, index, error)


def _made(task: Task, indices: Sequence[int | str]) -> Iterator[tuple[int | str, Future[Sample]]]:
    """Samples in order, as many at a time as there are cores: tokenizers let go of Python's lock.
    None is made while others are answered, which would be part of their time."""
    cores = len(os.sched_getaffinity(0))
    left = iter(indices)
    with ThreadPoolExecutor(cores, "samples") as pool:
        while some := list(itertools.islice(left, cores)):
            futures = [pool.submit(task.sample, index) for index in some]
            wait(futures)
            yield from zip(some, futures, strict=True)


def _is_full(llm: LLM, batch: Sequence[Read]) -> bool:
    """Whether no context is tried beside these: answers to all, and to one more like them, would
    have to wait for one another's memory."""
    if not batch or len(batch) == _BATCH:
        return bool(batch)
    free = llm.free_tokens
    if free is None:
        lengths = [read.context.plan.context_len for read in batch]
        return sum(lengths) + max(lengths) > _BATCH_TOKENS
    asked = [read.asked_tokens for read in batch]
    return free < max(map(_tokens_on_a_rank, batch)) + sum(asked) + max(asked)


def _tokens_on_a_rank(read: Read) -> int:
    """Of a context, on the rank that keeps most of it."""
    tokens: Counter[int] = Counter()
    for part in read.context.plan.parts:
        tokens[part.rank] += part.tokens
    return max(tokens.values())


def _read(
    llm: LLM, prompts: PromptTokenizer, run: Run, task: Task, samples: Sequence[Sample]
) -> Read | Exception:
    """Phase 1 of the context of some samples, or why it cannot be."""
    begin = time.perf_counter()
    try:
        config = run.config(task.length or prompts.count(samples[0]) + task.max_tokens)
        questions = [prompts.question_tokens(each.query, each.answer_prefix) for each in samples]
        context = llm.encode(samples[0].context, config)
    except RankError:
        raise
    except Exception as error:
        return error
    seconds = (time.perf_counter() - begin) / len(samples)
    each = task.max_tokens + config.tokens_per_block  # and what its last page leaves
    return Read(context, samples, seconds, sum(len(tokens) + each for tokens in questions))


def _ask_batch(
    llm: LLM, prompts: PromptTokenizer, run: Run, task: Task, batch: list[Read]
) -> Iterator[dict[str, Any]]:
    """The records of a batch, which is empty then. If its questions are refused together, the last
    context makes room and is read again."""
    again: list[Sequence[Sample]] = []
    while len(batch) > 1:
        records = _ask(llm, run, task, [(read, each) for read in batch for each in read.samples])
        if isinstance(records, Exception):
            again.append(batch[-1].samples)
            batch.pop().context.release()
        else:
            _release(batch)
            yield from records
    if batch:
        yield from _ask_about(llm, run, task, batch[0])
        _release(batch)
    for samples in reversed(again):
        read = _read(llm, prompts, run, task, samples)
        if isinstance(read, Exception):
            yield from (_failure(task, sample.index, read) for sample in samples)
        else:
            batch.append(read)
            yield from _ask_about(llm, run, task, read)
            _release(batch)


def _release(batch: list[Read]) -> None:
    while batch:
        batch.pop().context.release()


def _ask_about(llm: LLM, run: Run, task: Task, read: Read) -> Iterator[dict[str, Any]]:
    """The records of a context's samples; those that are refused together are asked one by one."""
    for first in range(0, len(read.samples), _BATCH):
        asked = [(read, sample) for sample in read.samples[first : first + _BATCH]]
        records = _ask(llm, run, task, asked)
        if not isinstance(records, Exception):
            yield from records
            continue
        for each in asked:
            records = _ask(llm, run, task, [each])
            if isinstance(records, Exception):
                records = [_failure(task, each[1].index, records)]
            yield from records


def _ask(
    llm: LLM, run: Run, task: Task, asked: Sequence[tuple[Read, Sample]]
) -> list[dict[str, Any]] | Exception:
    """The records of samples that are asked together, or why they cannot be."""
    begin = time.perf_counter()
    try:
        answers = llm.ask(
            [read.context for read, _ in asked],
            [sample.query for _, sample in asked],
            SamplingParams(max_tokens=task.max_tokens),
            [sample.answer_prefix for _, sample in asked],
        )
    except RankError:
        raise
    except Exception as error:
        return error
    share = (time.perf_counter() - begin) / len(asked)
    return [
        _record(run, task, read, sample, answer.text, share)
        for answer, (read, sample) in zip(answers, asked, strict=True)
    ]


def _record(
    run: Run, task: Task, read: Read, sample: Sample, prediction: str, seconds: float
) -> dict[str, Any]:
    """A line of predictions; `seconds` are the answer's share."""
    plan = read.context.plan
    times = {"context_seconds": read.seconds, "seconds": read.seconds + seconds}
    return {
        "task": task.name,
        "length": task.length,
        "index": sample.index,
        **sample.extra,
        "pred": prediction,
        "outputs": list(sample.outputs),
        "score": task.score(prediction, sample),
        "depths": [round(depth, 4) for depth in sample.depths],
        "context_tokens": plan.context_len,
        "block_size": plan.block_size,
        "anchor_size": plan.anchor_size,
        **(times if run.timed else {}),
    }


def _failure(task: Task, index: int | str, error: Exception) -> dict[str, Any]:
    reason = str(error) or type(error).__name__
    return {"task": task.name, "length": task.length, "index": index, "error": reason}
