"""A scorer for short free answers: does the answer name all that the reference lists?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

_MONTHS = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
# What stands behind a number -> power of ten.
_SCALES = {
    **dict.fromkeys(("%", "percentage points", "percent", "per cent"), -2),
    **dict.fromkeys(("thousand", "k"), 3),
    **dict.fromkeys(("million", "m"), 6),
    **dict.fromkeys(("billion", "bn"), 9),
    "trillion": 12,
}
_MONTH = f"({'|'.join(_MONTHS)})"
_DAY = r"(\d\d?)(?:st|nd|rd|th)?"
# Of a text in small letters.
_MONTH_FIRST = re.compile(rf"\b{_MONTH} {_DAY},? (\d{{4}})\b")
_DAY_FIRST = re.compile(rf"\b{_DAY} (?:of )?{_MONTH},? (\d{{4}})\b")
_TOKEN = re.compile(
    r"(?P<date>\b\d{4}-\d\d-\d\d\b)"
    r"|(?P<number>(?<![\w.])-?[$€£]?\d+(?:,\d{3})*(?:\.\d+)?)"
    rf"(?:\s?(?P<scale>{'|'.join(_SCALES)}))?(?!\w)"
    r"|(?P<word>[^\W_]+)"
)
_ARTICLES = {"a", "an", "the"}
# Not within a date or a number.
_BETWEEN_ITEMS = re.compile(r"[\n;]|,(?!\d{3}\b|\s*\d{4}\b)")
_NUMBERING = re.compile(r"^\s*\d+\.\s+", re.MULTILINE)


def names_all(prediction: str, reference: str) -> float:
    """1 if every item of the reference occurs in the prediction, 0 otherwise.

    Items stand between commas, semicolons or lines. If lines are numbered, items must occur in
    their order. What is compared are words without case, punctuation and articles; numbers by
    their value (5 % is 0.05, 2 million is 2,000,000, currency signs do not count); and dates.
    """
    said = _tokens(prediction)
    is_ranking = bool(_NUMBERING.search(reference))
    items = [_tokens(item) for item in _BETWEEN_ITEMS.split(_NUMBERING.sub("", reference))]
    place = 0
    for item in filter(None, items):
        found = _find(said, item, place if is_ranking else 0)
        if found is None:
            return 0.0
        place = found + len(item)
    return float(any(items))


def _tokens(text: str) -> list[str]:
    text = text.lower().replace("\u2212", "-")
    text = _MONTH_FIRST.sub(lambda m: _date(m[3], m[1], m[2]), text)
    text = _DAY_FIRST.sub(lambda m: _date(m[3], m[2], m[1]), text)
    tokens = [
        _value(match["number"], match["scale"]) if match["number"] else match[0]
        for match in _TOKEN.finditer(text)
    ]
    return [token for token in tokens if token not in _ARTICLES]


def _date(year: str, month: str, day: str) -> str:
    return f"{year}-{_MONTHS.index(month) + 1:02}-{int(day):02}"


def _value(number: str, scale: str | None) -> str:
    value = Decimal(re.sub(r"[,$€£]", "", number)).scaleb(_SCALES[scale] if scale else 0)
    return str(value.normalize())


def _find(tokens: Sequence[str], item: Sequence[str], start: int) -> int | None:
    """Where the item begins in `tokens`, from `start` on."""
    starts = range(start, len(tokens) - len(item) + 1)
    return next((i for i in starts if tokens[i : i + len(item)] == item), None)
