"""Limits of memory, checked before anything runs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from star_attention.runtime.runtime import Runtime

from star_attention.config import StarConfig
from star_attention.distributed import SingleProcess
from star_attention.engines.base import is_decode_step
from star_attention.engines.torch.engine import TorchEngine
from star_attention.errors import UserError
from star_attention.models.config import ModelConfig, RopeConfig
from star_attention.models.loading import random_weights
from star_attention.runtime.pages import Rows, paged_step

TINY = ModelConfig(1, 32, 32, 4, 2, 8, 64, 1024, 1e-5, RopeConfig())
CONTEXT = np.zeros(1000, np.int32)
CONFIG = StarConfig(block_size=128, tokens_per_block=16)


def make_runtime(max_pages, pass_tokens=None):
    comm = SingleProcess()
    weights = random_weights(TINY, torch.float32, torch.device("cpu"))
    engine = TorchEngine(TINY, weights, comm, 16, max_pages)
    engine.limits = replace(engine.limits, pass_tokens=pass_tokens)
    return Runtime(engine, comm)


@pytest.mark.parametrize(
    ("max_pages", "message"),
    [
        # Of two ranks, the second would take 504 tokens and an anchor of 128.
        (50, r"1008 tokens of KV cache .* room for 800: use 2 ranks or more, or a larger"),
        (15, r"use a smaller block size, or a larger --kv-cache-gib"),
    ],
)
def test_kv_cache_that_is_too_small(max_pages, message):
    with pytest.raises(UserError, match=message):
        make_runtime(max_pages).encode(CONTEXT, CONFIG)
    dense = StarConfig(attention="dense", tokens_per_block=16)
    with pytest.raises(UserError, match="use ring or star over several ranks"):
        make_runtime(max_pages).encode(CONTEXT, dense)


def test_no_room_for_questions():
    runtime = make_runtime(63)
    context = runtime.encode(CONTEXT, CONFIG)
    with pytest.raises(UserError, match="room for 0: use more ranks, or a larger --kv-cache-gib"):
        runtime.questions().ask([context], [CONTEXT[:20]], 4)
    context.release()
    assert runtime.pool.pages_in_use == 0


def test_activations_that_do_not_fit():
    make_runtime(100, 128).encode(CONTEXT, CONFIG)
    runtime = make_runtime(100, 127)
    with pytest.raises(
        UserError, match=r"128 tokens in one pass, .* 127: use a smaller block size"
    ):
        runtime.encode(CONTEXT, CONFIG)
    ring = StarConfig(attention="ring", tokens_per_block=16)
    with pytest.raises(
        UserError, match=r"1000 tokens in one pass, .* for 127: use 11 ranks or more"
    ):
        runtime.encode(CONTEXT, ring)


def test_what_a_decode_step_is():
    one_each = paged_step([Rows([0], 5, 1), Rows([1], 7, 1)], 16)
    assert is_decode_step(one_each, np.arange(2))
    assert not is_decode_step(one_each, np.arange(1))
    assert not is_decode_step(paged_step([Rows([0], 5, 2)], 16), np.arange(2))
    # A rank without blocks still takes part in what the others send.
    assert not is_decode_step(paged_step([], 16, shared_pages=[0]), np.arange(0))
