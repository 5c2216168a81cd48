"""Scorers on hand-made predictions; the values are those of the public scorers."""

import pytest

from star_attention.evals import metrics
from star_attention.evals.named import names_all

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")


@pytest.mark.parametrize(
    ("prediction", "outputs", "every", "some"),
    [
        ("It is 7463343.", ["7463343"], 1, 1),
        ("lantern and KETTLE", ["Lantern", "kettle"], 1, 1),
        ("one, 222; three", ["one", "two", "three"], 2 / 3, 1),
        ("12345678", ["234"], 1, 1),
        ("a\tb", ["a b"], 0, 0),
        ("  \x00\n", ["a"], 0, 0),
        ("", ["a", "b"], 0, 0),
        ("a\x01b", ["a\nb"], 1, 1),
    ],
)
def test_string_match(prediction, outputs, every, some):
    assert metrics.string_match_all(prediction, outputs) == every
    assert metrics.string_match_part(prediction, outputs) == some


@pytest.mark.parametrize(
    ("prediction", "question", "score"),
    [
        ("The most recent location of Mary is garden", "Where is Mary?", 1),
        ("GARDEN.", "Where is Mary?", 1),
        ("The garden or the office.", "Where is Mary?", 0),
        ("The garden. Not the office.", "Where is Mary?", 1),
        ("I see. The garden.", "Where is Mary?", 0),
        ("Before the kitchen it was in the garden", "Where was it before the kitchen?", 1),
        ("garden<example>office", "Where is Mary?", 1),
        ("", "Where is Mary?", 0),
    ],
)
def test_only_label(prediction, question, score):
    assert metrics.only_label(prediction, "garden", question, PLACES) == score


@pytest.mark.parametrize(
    ("scorer", "prediction", "reference", "score"),
    [
        (metrics.first_number, " 71432.", "71432", 1),
        (metrics.first_number, "key 7 is 71432", "71432", 0),
        (metrics.first_number, "", "71432", 0),
        (metrics.first_value, "it is 88.0!", "88", 1),
        (metrics.first_value, "-3.5", "3.5", 1),
        (metrics.first_value, "none", "88", 0),
        (metrics.has_word, '"a-b": "c-d"}', "c-d", 1),
        (metrics.has_word, "c-de", "c-d", 0),
        (metrics.has_word_any_case, "I'd say Ace.", "ACE", 1),
        (metrics.choice, "B. pear", ["pear", "B"], 1),
        (metrics.choice, "Clearly pear", ["pear", "B"], 0),  # C, its first letter
        (metrics.choice, "the answer is B", ["pear", "B"], 1),
        (metrics.choice, "the answer is:", ["pear", "B"], 0),
        (metrics.choice, "pear", ["pear", "B"], 1),
        (metrics.choice, "well ... B", ["pear", "B"], 1),
        (metrics.choice, " ", ["pear", "B"], 0),
        (metrics.choice_of_function, "B. pear", ["pear", "B"], 1),
        (metrics.choice_of_function, "The correct option is: B", ["pear", "B"], 1),
        (metrics.choice_of_function, "The error is: `pear`", ["pear", "B"], 1),
        (metrics.choice_of_function, "pear", ["pear", "B"], 0),
        (metrics.word_f1, "The Cat, sat", ["a cat", "dog"], 2 / 3),
        (metrics.word_f1, "the", ["a"], 0),
        (metrics.character_f1, "\u4f60 \u597d\u3002", ["\u4f60\u597d"], 1),
        (metrics.character_f1, "\u4f60", ["\u4f60\u597d"], 2 / 3),
        (metrics.rouge_lsum, "a cat sat\non the mat", "the cat\nsat on a mat", 5 / 6),
        (metrics.rouge_lsum, "", "the cat", 0),
    ],
)
def test_infinitebench_scorers(scorer, prediction, reference, score):
    assert scorer(prediction, reference) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("It is the Nasdaq.", "nasdaq", 1),
        ("The Iconics", "The Iconic", 0),
        ("It rose by 9%.", "0.09", 1),
        ("9 percentage points", "0.09", 1),
        ("9", "0.09", 0),
        ("10.0 per cent", "0.1", 1),
        ("0.16 %", "0.0016", 1),
        ("-76 % and \u221242%", "-76%, -42%", 1),
        ("76% and 42%", "-76%, -42%", 0),
        ("It is 5,597,456.", "5597456", 1),
        ("559,745", "5597456", 0),
        ("55,200,000 dollars", "$55.2 million", 1),
        ("$7.1bn", "7.1 billion", 1),
        ("from 2021-2025", "2025", 1),
        ("Q4 of 2023", "4", 0),
        ("on 2 August 2026", "by August 2, 2026.", 0),  # "by" is a word of the reference
        ("2nd of August, 2026", "August 2, 2026", 1),
        ("2026-08-02", "August 2nd, 2026", 1),
        ("August 3, 2026", "August 2nd, 2026", 0),
        ("In Q4 2023 it was 26 percent", "Q4 2023, 26%", 1),
        ("Zip and Afterpay", "Afterpay, Zip", 1),
        ("Afterpay", "Afterpay, Zip", 0),
        ("First Smartsheet, then Asana", "1. Smartsheet\n2. Asana", 1),
        ("First Asana, then Smartsheet", "1. Smartsheet\n2. Asana", 0),
        ("Asana (3), Smartsheet, Asana", "1. Smartsheet\n2. Asana", 1),
        ("D. A. Davidson and Co", "D.A. Davidson & Co.", 0),
        ("D. A. Davidson & Co", "D.A. Davidson & Co.", 1),
        ("", "No", 0),
        ("anything", " ,;\n", 0),
    ],
)
def test_names_all(prediction, reference, score):
    assert names_all(prediction, reference) == score
