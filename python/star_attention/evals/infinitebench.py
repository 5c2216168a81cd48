"""InfiniteBench: the ten of its tasks that the Star Attention paper reports, from the public files.

Source: arXiv 2402.13718; OpenBMB/InfiniteBench, src/prompt.py (the templates for open models),
src/eval_utils.py (answer lengths), src/compute_scores.py (scorers).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from star_attention.errors import UserError
from star_attention.evals import metrics
from star_attention.evals.maker import SampleMaker
from star_attention.evals.prompts import PromptTokenizer
from star_attention.evals.sample import Sample, Task
from star_attention.evals.texts import data_file, field_of, read_rows

SOURCE = "it is in https://huggingface.co/datasets/xinrongzhang2022/InfiniteBench"

Scorer = Callable[[str, Sample], float]


def _all(score: Callable[[str, list[str]], float]) -> Scorer:
    return lambda prediction, sample: score(prediction, list(sample.outputs))


def _first(score: Callable[[str, str], float]) -> Scorer:
    return lambda prediction, sample: score(prediction, sample.outputs[0])


_HIDDEN = "There is an important info hidden inside a lot of irrelevant text. "
_OPTIONS = "A. {a}\nB. {b}\nC. {c}\nD. {d}\n\n"
# Task -> tokens of an answer at most, scorer, template: in front of the context, behind it, answer
# prefix.
_TASKS: dict[str, tuple[int, Scorer, tuple[str, str, str]]] = {
    "passkey": (
        6,
        _first(metrics.first_number),
        (
            f"{_HIDDEN}Find it and memorize it. I will quiz you about the important information."
            "\n\n",
            "{input}\n\n",
            "The pass key is",
        ),
    ),
    "number_string": (
        12,
        _first(metrics.first_number),
        (
            f"{_HIDDEN}Find it. I will quiz you about the important information there.\n\n",
            "{input}\n\n",
            "The sequence of digits is",
        ),
    ),
    "kv_retrieval": (
        50,
        _first(metrics.has_word),
        (
            "Extract the value corresponding to the specified key in the JSON object below.\n\n",
            "{input}",
            "",
        ),
    ),
    "longbook_sum_eng": (
        1200,
        _first(metrics.rouge_lsum),
        ("Summarize the book below.\n\n", "", "Summary:"),
    ),
    "longbook_choice_eng": (
        40,
        _all(metrics.choice),
        (
            "Read the book and answer the question.\n\n",
            "Question: {input}\n" + _OPTIONS,
            "The letter of the correct answer is",
        ),
    ),
    "longbook_qa_eng": (
        40,
        _all(metrics.word_f1),
        (
            "Read the book and answer the question. Be very concise in your answer.\n\n",
            "Question: {input}\n",
            "Answer:",
        ),
    ),
    "longbook_qa_chn": (
        40,
        _all(metrics.character_f1),
        ("阅读以下书籍然后回答问题。\n\n", "问题：{input}\n", "答案："),  # noqa: RUF001
    ),
    "longdialogue_qa_eng": (
        40,
        _first(metrics.has_word_any_case),
        (
            "Below is a dialogue script where one random occurrence of a character name is "
            'replaced with "$$MASK$$", and you should try to guess who that character is.\n\n',
            "",
            "The name that has been replaced with $$MASK$$ is likely",
        ),
    ),
    "math_find": (3, _first(metrics.first_value), ("{prefix}\n\n", "{input}", "")),
    "code_debug": (
        5,
        _all(metrics.choice_of_function),
        (
            "Following is a Python code where exactly one of the functions/methods has a "
            "deliberate error that makes it crash.\n\n",
            "Options:\n" + _OPTIONS,
            "The correct option is:",
        ),
    ),
}
TASKS = {name: max_tokens for name, (max_tokens, *_) in _TASKS.items()}


def load_task(
    name: str, prompts: PromptTokenizer, length: int | None, seed: int, data_dir: Path | None
) -> Task:
    """A task of InfiniteBench from its file, `passkey.jsonl` and the like, in `data_dir`.

    Texts longer than `length` tokens, answer included, lose their middle, as in the reference.

    Raises:
        UserError: the file is missing or not as expected, or the length is too short.
    """
    max_tokens, score, template = _TASKS[name]
    path = data_file(data_dir, f"{name}.jsonl", SOURCE)
    rows = _rows(path)

    def sample(index: int, size: int | None = None) -> Sample:
        return _sample(index, rows[index], template, size, path)

    def shortened(index: int) -> Sample:
        whole = sample(index)
        if length is None or prompts.count(whole) + max_tokens <= length:
            return whole

        def draft(rng: random.Random, _index: int, size: int) -> Sample:
            return sample(index, size)

        return SampleMaker(name, draft, prompts, length, max_tokens, 100, "")(index)

    return Task(name, length, max_tokens, score, shortened, range(len(rows)))


def data_label(data_dir: Path | None) -> str:
    return "public files"


_rows = cache(read_rows)


def _sample(
    index: int, row: dict[str, Any], template: tuple[str, str, str], size: int | None, path: Path
) -> Sample:
    """The sample of a row; of its text only the first and last `size` / 2 characters."""
    get = partial(field_of, row, path=path)
    text, answer, options = get("context"), get("answer"), row.get("options") or []
    if size is not None and size < len(text):
        text = text[: size // 2] + text[len(text) - (size - size // 2) :]
    outputs = [str(item) for item in (answer if isinstance(answer, list) else [answer])]
    fields = {"input": row.get("input", ""), **dict(zip("abcd", options, strict=False))}
    if options and len(outputs) == 1:
        if len(options) != 4 or outputs[0] not in options:
            raise UserError(f"{path}: row {index} has no four options with its answer")
        outputs.append("ABCD"[options.index(outputs[0])])
    front, behind, prefix = template
    if "{prefix}" in front:
        wanted = re.search(r"The .+ of", fields["input"])
        if wanted is None:
            raise UserError(f"{path}: row {index} does not say which number to find")
        fields["prefix"] = f"What is {wanted[0].lower()[:-3]} in the following list?"
    return Sample(
        index,
        f"{front.format(**fields)}{text}\n\n",
        behind.format(**fields),
        outputs,
        prefix,
    )
