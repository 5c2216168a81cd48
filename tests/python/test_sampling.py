from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.generation import logits_process

from star_attention.errors import UserError
from star_attention.runtime.penalties import Penalties
from star_attention.runtime.sampling import SamplingParams, sample

LOGITS = np.log(np.array([0.1, 0.4, 0.3, 0.2], np.float32))


def draw(count=4000, **params):
    uniforms = np.random.default_rng(0).random(count)
    logits = np.tile(LOGITS, (count, 1))
    drawn = sample(logits, SamplingParams(**params), uniforms)
    np.testing.assert_array_equal(
        sample(torch.from_numpy(logits), SamplingParams(**params), uniforms), drawn
    )
    return np.bincount(drawn, minlength=4) / count


def test_greedy():
    assert draw(3)[1] == 1


def test_temperature():
    np.testing.assert_allclose(draw(temperature=1.0), [0.1, 0.4, 0.3, 0.2], atol=0.03)
    cold = np.array([0.1, 0.4, 0.3, 0.2]) ** 2
    np.testing.assert_allclose(draw(temperature=0.5), cold / cold.sum(), atol=0.03)


def test_top_k():
    np.testing.assert_allclose(draw(temperature=1.0, top_k=2), [0, 4 / 7, 3 / 7, 0], atol=0.03)


@pytest.mark.parametrize(("top_p", "kept"), [(0.39, 1), (0.41, 2), (0.71, 3), (1.0, 4)])
def test_top_p(top_p, kept):
    assert (draw(temperature=1.0, top_p=top_p) > 0).sum() == kept


@pytest.mark.parametrize(("min_p", "kept"), [(0.0, 4), (0.26, 3), (0.51, 2), (1.0, 1)])
def test_min_p(min_p, kept):
    assert (draw(temperature=1.0, min_p=min_p) > 0).sum() == kept


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7, "min_p": 0.3},
        {"temperature": 2.0, "min_p": 0.3},
        {"temperature": 1.3, "min_p": 0.05, "top_k": 9},
        {"temperature": 0.9, "min_p": 0.1, "top_k": 12, "top_p": 0.8},
    ],
)
def test_what_is_left_is_what_hugging_face_leaves(params):
    """With its processors in vLLM's order."""
    logits = np.random.default_rng(1).normal(0, 2, (1, 50)).astype(np.float32)
    scores = torch.from_numpy(logits)
    for name, kind in (
        ("temperature", "Temperature"),
        ("min_p", "MinP"),
        ("top_k", "TopK"),
        ("top_p", "TopP"),
    ):
        if name in params:
            processor = getattr(logits_process, f"{kind}LogitsWarper")
            scores = processor(params[name])(None, scores)
    expected = scores.softmax(-1)[0].numpy()
    count = 20_000
    uniforms = (np.arange(count) + 0.5) / count
    drawn = sample(np.tile(logits, (count, 1)), SamplingParams(**params), uniforms)
    np.testing.assert_allclose(np.bincount(drawn, minlength=50) / count, expected, atol=2 / count)


def asked(context, tokens, answer, **params):
    """A question as far as penalties look at it."""
    return SimpleNamespace(
        context=context, token_ids=tokens, answer=answer, params=SamplingParams(**params)
    )


class Context:
    def __init__(self, *tokens):
        self.token_ids = np.array(tokens, np.int32)


def test_penalties():
    """Against the definitions, token by token; repetition also against Hugging Face."""
    logits = np.random.default_rng(2).normal(0, 3, (4, 30)).astype(np.float32)
    before = logits.copy()
    one, other = Context(1, 2, 2, 3), Context(29)
    questions = [
        asked(one, np.array([3, 4], np.int32), [5, 5, 1], repetition_penalty=1.7),
        asked(one, np.array([6], np.int32), []),
        asked(
            other,
            np.array([7], np.int32),
            [8, 8, 8, 2],
            repetition_penalty=0.5,
            presence_penalty=0.4,
            frequency_penalty=-0.3,
        ),
        asked(one, np.array([9], np.int32), [9, 9, 0], presence_penalty=1, frequency_penalty=2),
    ]
    expected = logits.astype(np.float64)
    for row, question in zip(expected, questions, strict=True):
        params = question.params
        for token in {*question.context.token_ids, *question.token_ids, *question.answer}:
            penalty = params.repetition_penalty
            row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
        for token in set(question.answer):
            row[token] -= params.frequency_penalty * question.answer.count(token)
            row[token] -= params.presence_penalty
    penalties = Penalties()
    for _ in range(2):  # what is known of contexts stays
        found = penalties.apply(logits, questions)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        np.testing.assert_array_equal(logits, before)
    on_torch = Penalties().apply(torch.from_numpy(logits), questions)
    np.testing.assert_allclose(on_torch.numpy(), expected, rtol=1e-6)
    seen = torch.tensor([[1, 2, 2, 3, 3, 4, 5, 5, 1]])
    processor = logits_process.RepetitionPenaltyLogitsProcessor(1.7)
    theirs = processor(seen, torch.from_numpy(logits[:1].copy()))
    np.testing.assert_allclose(found[:1], theirs, rtol=1e-6)


def test_tokens_of_a_context_are_looked_at_once():
    class Counted(Context):
        looks = 0

        def __getattribute__(self, name):
            Counted.looks += name == "token_ids"
            return super().__getattribute__(name)

    context = Counted(1, 2)
    questions = [
        asked(context, np.array([3], np.int32), [index], repetition_penalty=2) for index in (4, 5)
    ]
    penalties, logits = Penalties(), np.ones((2, 9), np.float32)
    for _ in range(3):
        penalties.apply(logits, questions)
    assert Counted.looks == 1


def test_no_penalties_cost_nothing():
    logits = np.ones((1, 9), np.float32)
    assert Penalties().apply(logits, [asked(None, None, [1])]) is logits


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0: use 1 or more"),
        ({"max_tokens": 1.5}, r"max_tokens is 1\.5: use 1 or more"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, r"top_p is 0\.0: use more than 0"),
        ({"top_p": 1.1}, r"top_p is 1\.1"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": ("",)}, "stop is"),
        ({"stop": ""}, "stop is"),
        ({"stop": (1,)}, "stop is"),
        ({"stop": 1}, "stop is 1: use strings"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": "warm"}, "temperature is 'warm'"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"top_p": None}, "top_p is None"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"min_p": 1.1}, r"min_p is 1\.1: use 0 \(all\) to 1"),
        ({"min_p": -0.1}, r"min_p is -0\.1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0: use more than 0"),
        ({"presence_penalty": 2.1}, r"presence_penalty is 2\.1: use -2 to 2"),
        ({"frequency_penalty": "a"}, "frequency_penalty is 'a'"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
    ],
)
def test_refusals(params, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**params)


def test_stop_may_be_one_string():
    assert SamplingParams(stop="red").stop == ("red",)
    assert SamplingParams(stop=["red", "blue"]).stop == ("red", "blue")
