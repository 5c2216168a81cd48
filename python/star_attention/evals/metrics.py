"""Scorers: what a prediction is worth, 0 to 1. They give the values of the public scorers."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")
_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛"  # noqa: RUF001
    "｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰"  # noqa: RUF001
    "〾〿–—‘’‛“”„‟…‧﹏."  # noqa: RUF001
)


def string_match_all(prediction: str, outputs: Sequence[str]) -> float:
    """The share of the references that occur in the prediction, whatever their case.

    Source: RULER, arXiv 2404.06654, section 4; NVIDIA/RULER, scripts/eval.
    """
    text = _CONTROL.sub("\n", prediction.strip()).strip().lower()
    return sum(output.lower() in text for output in outputs) / len(outputs)


def string_match_part(prediction: str, outputs: Sequence[str]) -> float:
    """1 if any reference occurs in the prediction, whatever its case; 0 otherwise.

    Source: RULER, as `string_match_all`.
    """
    return float(string_match_all(prediction, outputs) > 0)


def only_label(prediction: str, target: str, question: str, labels: Sequence[str]) -> float:
    """1 if the prediction's first sentence names the target and no other label, apart from those
    that the question names; 0 otherwise.

    Source: BABILong, arXiv 2406.10149; booydar/babilong, babilong/metrics.py.
    """
    text = re.split(r"\.|<context>|<example>", prediction.lower())[0]
    known = {label.lower() for label in labels}
    named = {label for label in known if label in text and label not in question.lower()}
    return float(named == {target.lower()})


def first_number(prediction: str, output: str) -> float:
    """1 if the prediction's first run of digits is the reference (InfiniteBench: passkey,
    number_string)."""
    digits = re.search(r"[0-9]+", prediction)
    return float(digits is not None and digits[0] == output)


def first_value(prediction: str, output: str) -> float:
    """1 if the prediction's first number has the reference's value (InfiniteBench: math_find)."""
    number = re.search(r"\d+\.\d+|\d+", prediction)
    return float(number is not None and float(number[0]) == float(output))


def has_word(prediction: str, output: str) -> float:
    """1 if the reference is one of the prediction's words (InfiniteBench: kv_retrieval)."""
    return float(output in _blank(prediction, "\n:\"'.,?!{}").split())


def has_word_any_case(prediction: str, output: str) -> float:
    """`has_word` of the prediction in capitals (InfiniteBench: longdialogue_qa_eng, whose
    references are capitals)."""
    return has_word(prediction.upper(), output)


def choice(prediction: str, outputs: Sequence[str]) -> float:
    """1 if the prediction chooses the reference, (text, letter A to D): by its first letter, behind
    `answer is` and the like, or by the first lone letter (InfiniteBench: longbook_choice_eng)."""
    text = prediction.strip()
    if not text:
        return 0.0
    if text[0] in "ABCD":
        return float(text[0] in outputs)
    if text in outputs:
        return 1.0
    text = _single_spaces(_blank(text, "\n\"'.,?!{}"))
    chosen = _behind(text, ("answer is:", "answer:", "answer is", "option is"))
    if chosen is not None:
        return float(chosen.startswith(tuple(outputs)))
    letter = next((word for word in text.split() if word in "ABCD"), None)
    return float(letter in outputs)


def choice_of_function(prediction: str, outputs: Sequence[str]) -> float:
    """1 if the prediction begins with the reference's letter and `.` or `:`, or names the
    reference, (function, letter), behind `answer is:` and the like (InfiniteBench: code_debug)."""
    text = prediction.strip()
    name, letter = outputs
    if text[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    text = _blank(text, "\n`'\"-*").replace("Option", " ").replace("option", " ")
    chosen = _behind(_single_spaces(text), ("answer is:", "is:", "answer:", "correct option is:"))
    return float(chosen is not None and chosen.startswith((letter, name)))


def word_f1(prediction: str, outputs: Sequence[str]) -> float:
    """The best F1 of words over the references, without case, punctuation and articles
    (InfiniteBench: longbook_qa_eng)."""

    def words(text: str) -> list[str]:
        text = "".join(char for char in text.lower() if char not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    return max(_f1(words(prediction), words(output)) for output in outputs)


def character_f1(prediction: str, outputs: Sequence[str]) -> float:
    """The best F1 of characters over the references, without case, punctuation and white space
    (InfiniteBench: longbook_qa_chn)."""
    ignored = set(string.punctuation + _CHINESE_PUNCTUATION)

    def characters(text: str) -> list[str]:
        return [char for char in "".join(text.lower().split()) if char not in ignored]

    return max(_f1(characters(prediction), characters(output)) for output in outputs)


def rouge_lsum(prediction: str, output: str) -> float:
    """ROUGE-Lsum F1, lines taken as sentences (InfiniteBench: longbook_sum_eng)."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeLsum"]).score(output, prediction)["rougeLsum"].fmeasure


def _f1(predicted: list[str], reference: list[str]) -> float:
    same = sum((Counter(predicted) & Counter(reference)).values())
    return 2 * same / (len(predicted) + len(reference)) if same else 0.0


def _blank(text: str, characters: str) -> str:
    return text.translate(dict.fromkeys(map(ord, characters), " "))


def _single_spaces(text: str) -> str:
    return re.sub(" +", " ", text)


def _behind(text: str, openings: Sequence[str]) -> str | None:
    """What follows the first of `openings` that occurs, and one character; None: none does."""
    opening = next((opening for opening in openings if opening in text), None)
    return None if opening is None else text[text.index(opening) + len(opening) + 1 :]
