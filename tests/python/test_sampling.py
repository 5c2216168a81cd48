import numpy as np
import pytest
import torch

from star_attention.errors import UserError
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
    ],
)
def test_refusals(params, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**params)


def test_stop_may_be_one_string():
    assert SamplingParams(stop="red").stop == ("red",)
    assert SamplingParams(stop=["red", "blue"]).stop == ("red", "blue")
