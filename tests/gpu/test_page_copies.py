"""Copies of pages between a GPU's KV cache and a rank's host and disk tier."""

import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from shutil import disk_usage

import numpy as np
import pytest
import torch

from engine_steps import step_of
from star_attention.distributed import SingleProcess
from star_attention.engines.torch.engine import TorchEngine
from star_attention.models.config import ModelConfig
from star_attention.models.loading import random_weights
from star_attention.models.rope import RopeConfig
from star_attention.runtime.tiers import StoreDescription, Tiers

pytest.importorskip("star_attention.ops.cuda", exc_type=ImportError)

PAGE, LAYERS = 64, 4
CONFIG = ModelConfig(LAYERS, 256, 512, 4, 2, 64, 128, 512, 1e-5, RopeConfig())
PAGES, OTHERS = [2, 3, 9, 5, 6], [11, 0, 7, 8, 1]
KEY = bytes(range(32))
ALL = range(LAYERS)


def make_engine(pages=12):
    device = torch.device("cuda", torch.cuda.current_device())
    weights = random_weights(CONFIG, torch.bfloat16, device)
    engine = TorchEngine(CONFIG, weights, SingleProcess(), PAGE, pages)
    engine.reserve_positions(CONFIG.max_position)
    bytes_of(engine).random_()
    return engine


def bytes_of(engine, pages=slice(None)):
    """uint8 [num_layers, len(pages), page_bytes]: all pages as a view, some as a copy."""
    return engine._pool.data.view(torch.uint8).flatten(2)[:, pages]


@contextmanager
def opened(engine, host=None, disk=None):
    page_bytes = engine.page_bytes
    about = StoreDescription("m", "abc", "bfloat16", LAYERS, 2, 64, PAGE, page_bytes, 0, 1, 1)
    tiers = Tiers(engine, about, host, disk)
    try:
        yield tiers
    finally:
        tiers.close()


def save(tiers, key, pages):
    for layer in ALL:
        tiers.save(key, pages, range(layer, layer + 1))


def wait_for_ends(tiers, count):
    until = time.monotonic() + 60
    while count:
        assert time.monotonic() < until
        for end in tiers.ended():
            assert end.stored, end
            count -= 1
        time.sleep(0.001)


def load(tiers, key, pages):
    until = time.monotonic() + 60
    for layer in ALL:
        while (state := tiers.load(key, pages, range(layer, layer + 1))) == "waiting":
            assert time.monotonic() < until
            time.sleep(0.001)
        assert state == "done"


@pytest.fixture
def memory_folder():
    """In memory, as a host tier's folder is."""
    shared = Path("/dev/shm")
    parent = shared if shared.exists() and disk_usage(shared).free > 8 << 30 else None
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        yield Path(folder)


@pytest.mark.parametrize("which", ["host", "disk", "both"])
def test_round_trip_and_restart(memory_folder, tmp_path, which):
    folders = [
        folder if which in (tier, "both") else None
        for tier, folder in (("host", memory_folder / "host"), ("disk", tmp_path / "disk"))
    ]
    engine = make_engine()
    expected = bytes_of(engine, PAGES).clone()
    with opened(engine, *folders) as tiers:
        for _ in range(3):  # into new memory, then into memory that is used again
            save(tiers, KEY, PAGES)
            for page in PAGES:
                engine.copy_page(10, page)  # waits for the copies
            load(tiers, KEY, OTHERS)
            engine.finish_copies()
            assert torch.equal(bytes_of(engine, OTHERS), expected)
            load(tiers, KEY, PAGES)
            engine.finish_copies()
            assert torch.equal(bytes_of(engine, PAGES), expected)
            wait_for_ends(tiers, 2 if which == "both" else 1)
    bytes_of(engine).zero_()
    torch.cuda.synchronize()
    with opened(engine, *folders) as tiers:
        load(tiers, KEY, OTHERS)
        engine.finish_copies()
        assert torch.equal(bytes_of(engine, OTHERS), expected)


def test_a_question_over_a_block_that_was_loaded(memory_folder):
    """Its steps, of which the third replays a graph, wait for the copies."""
    engine = make_engine()
    tokens = np.arange(100, 100 + 4 * PAGE, dtype=np.int32) % 128
    nowhere = np.empty(0, np.int32)
    places = np.arange(len(tokens), dtype=np.int32)
    engine.step(tokens, places, step_of((PAGES[:4], 0, len(tokens)), page=PAGE), nowhere)
    one = np.zeros(1, np.int32)
    position = np.array([len(tokens)], np.int32)

    def answer(pages):
        step = step_of(([*pages, 10], len(tokens), 1), page=PAGE)
        return engine.step(one, position, step, one).clone()

    expected = answer(PAGES[:4])
    with opened(engine, memory_folder / "host") as tiers:
        save(tiers, KEY, PAGES[:4])
        wait_for_ends(tiers, 1)
        for _ in range(4):
            bytes_of(engine)[:, OTHERS] = 0
            load(tiers, KEY, OTHERS[:4])
            torch.testing.assert_close(answer(OTHERS[:4]), expected)


def test_pinned():
    engine = make_engine()
    buffer = np.zeros(1 << 20, np.uint8)
    engine.pin(buffer)
    assert torch.from_numpy(buffer).is_pinned()
    engine.unpin(buffer)
    assert not torch.from_numpy(buffer).is_pinned()
    engine.unpin(buffer)


def test_bandwidth(memory_folder, capsys):
    """Prints what the caller's thread waits for and how fast the copies are, for 1 GiB."""
    count = (1 << 30) // LAYERS // (4 * PAGE * 2 * 64)
    engine = make_engine(2 * count)
    pages, others = range(count), range(count, 2 * count)
    expected = bytes_of(engine)[:, :count].clone()
    lines = []

    def timed(what, call):
        start = time.perf_counter()
        call()
        called = time.perf_counter() - start
        engine.finish_copies()
        rate = expected.nbytes / (time.perf_counter() - start) / 1e9
        lines.append(f"{what}: {rate:.1f} GB/s, the call takes {called * 1e3:.0f} ms")

    with opened(engine, memory_folder / "host") as tiers:
        for index, what in enumerate(("into new memory", "into memory made ahead")):
            key = bytes([index]) * 32
            timed(f"save {what}", lambda key=key: save(tiers, key, pages))
            wait_for_ends(tiers, 1)
            time.sleep(2)  # the next one's memory is made
        bytes_of(engine)[:, count:] = 0
        torch.cuda.synchronize()
        timed("load", lambda: load(tiers, bytes([1]) * 32, others))
        assert torch.equal(bytes_of(engine)[:, count:], expected)
    with capsys.disabled():
        print("", *lines, sep="\n")
