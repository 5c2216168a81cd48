"""A rank's host and disk tier, over a torch engine on the CPU."""

import errno
import json
import os
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_steps import NONE, step_of
from star_attention.distributed import SingleProcess
from star_attention.engines.base import Exchange, Hop, Pages, runs_of
from star_attention.engines.page_copies import PagesUnderCopy
from star_attention.engines.torch.engine import TorchEngine
from star_attention.errors import UserError
from star_attention.models.config import ModelConfig
from star_attention.models.loading import random_weights
from star_attention.models.rope import RopeConfig
from star_attention.runtime import tiers as tiers_module
from star_attention.runtime.kv_file import MAGIC, StoreDescription, checksum_of
from star_attention.runtime.orders import OpenStore
from star_attention.runtime.tiers import SaveEnd, Tiers
from star_attention.runtime.worker import Worker

CONFIG = ModelConfig(3, 32, 48, 4, 2, 8, 64, 256, 1e-5, RopeConfig())
PAGE, LAYERS = 8, 3
PAGES, OTHERS = [2, 3, 9, 5, 6], [11, 0, 7, 8, 1]
STRIDE = 8192  # of a layer's 5 KiB
KEY, KEY2 = bytes(range(32)), bytes(32)
ALL = range(LAYERS)


def make_engine(seed=0):
    weights = random_weights(CONFIG, torch.float32, torch.device("cpu"))
    engine = TorchEngine(CONFIG, weights, SingleProcess(), PAGE)
    engine.reserve_pages(12)
    for layer in ALL:
        engine.write_layer(layer, range(12), random_bytes(engine, 12, seed + layer))
    return engine


def random_bytes(engine, count, seed):
    shape = count, engine.page_bytes
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def kv_of(engine, pages):
    out = np.zeros((LAYERS, len(pages), engine.page_bytes), np.uint8)
    for layer in ALL:
        engine.read_layer(layer, pages, out[layer])
    return out


ENGINE = make_engine()
DESCRIPTION = StoreDescription(
    "tiny", "abc", "float32", LAYERS, 2, 8, PAGE, ENGINE.page_bytes, 0, 1, 1
)


@contextmanager
def opened(folder, *tiers, description=DESCRIPTION, engine=None):
    folders = (folder / tier if tier in tiers else None for tier in ("host", "disk"))
    tiers = Tiers(engine or make_engine(), description, *folders)
    try:
        yield tiers
    finally:
        tiers.close()


def save(tiers, key=KEY, pages=PAGES, cut=2):
    tiers.save(key, pages, range(cut))
    tiers.save(key, pages, range(cut, LAYERS))


def wait_for_ends(tiers, count):
    ends, until = [], time.monotonic() + 10
    while len(ends) < count:
        assert time.monotonic() < until, ends
        ends += tiers.ended()
        time.sleep(0.001)
    return ends


def load(tiers, key=KEY, pages=OTHERS, cuts=((0, 1), (1, 3))):
    """The state that ends it, which is not `waiting`."""
    until = time.monotonic() + 10
    for begin, end in cuts:
        while (state := tiers.load(key, pages, range(begin, end))) == "waiting":
            assert time.monotonic() < until
            time.sleep(0.001)
        if state == "failed":
            break
    return state


def block_path(folder, tier, key=KEY):
    return folder / tier / "rank-0" / f"{key.hex()}.kv"


def check_loads(tiers, **options):
    before = kv_of(make_engine(), PAGES)
    assert load(tiers, **options) == "done"
    np.testing.assert_array_equal(kv_of(tiers._engine, OTHERS), before)


def check_fails(tiers, tier):
    assert load(tiers) == "failed"
    assert KEY not in tiers.stored()[tier]


def file_of_a_block(folder, tier="disk"):
    with opened(folder, tier) as tiers:
        save(tiers)
        wait_for_ends(tiers, 1)
    return block_path(folder, tier)


# Round trips


@pytest.mark.parametrize("which", [("host",), ("disk",), ("host", "disk")], ids="+".join)
def test_round_trip_and_restart(tmp_path, which):
    with opened(tmp_path, *which) as tiers:
        assert load(tiers) == "failed"
        save(tiers)
        ends = wait_for_ends(tiers, len(which))
        assert set(ends) == {SaveEnd(KEY, tier, True) for tier in which}
        size = tiers.block_bytes(len(PAGES))
        expected = {tier: {KEY: size} if tier in which else {} for tier in ("host", "disk")}
        assert tiers.stored() == expected
        check_loads(tiers)
        check_loads(tiers, cuts=[(0, 3)])
    for tier in which:
        path = block_path(tmp_path, tier)
        assert path.stat().st_size == size
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert not [name for name in os.listdir(path.parent) if name.startswith(".")]
    with opened(tmp_path, *which, engine=make_engine(seed=50)) as tiers:
        assert tiers.stored() == expected
        check_loads(tiers)
        check_loads(tiers)
        assert tiers.stored() == expected


def test_it_is_loaded_while_it_is_written(tmp_path, monkeypatch):
    """Also from a slow disk; and nothing waits for the disk."""
    go_on = threading.Event()
    publish = tiers_module.StoreFolder.publish

    def slowly(folder, draft, key, *, sync):
        assert go_on.wait(10)
        publish(folder, draft, key, sync=sync)

    monkeypatch.setattr(tiers_module.StoreFolder, "publish", slowly)
    with opened(tmp_path, "disk") as tiers:
        save(tiers)
        check_loads(tiers)
        assert tiers.stored()["disk"] == {}
        assert tiers.ended() == []
        go_on.set()
        assert wait_for_ends(tiers, 1) == [SaveEnd(KEY, "disk", True)]


def test_a_block_of_the_host_tier_survives_its_crash(tmp_path):
    """What is there when the process is killed, as `close` never ran."""
    tiers = Tiers(make_engine(), DESCRIPTION, tmp_path / "host", None)
    save(tiers)
    wait_for_ends(tiers, 1)
    tiers.save(KEY2, PAGES, range(2))
    for descriptor in (tiers._host._lock, tiers._host._folder):
        os.close(descriptor)  # what the kernel does
    assert len(os.listdir(tmp_path / "host/rank-0")) > 2
    with opened(tmp_path, "host", engine=make_engine(seed=50)) as again:
        assert sorted(os.listdir(tmp_path / "host/rank-0")) == [f"{KEY.hex()}.kv", "lock"]
        assert again.stored()["host"].keys() == {KEY}
        check_loads(again)


def test_forget(tmp_path):
    with opened(tmp_path, "host", "disk") as tiers:
        save(tiers)
        wait_for_ends(tiers, 2)
        tiers.forget(KEY, "host")
        assert tiers.stored()["host"] == {}
        check_loads(tiers)  # from the disk
        tiers.forget(KEY, "disk")
        assert load(tiers) == "failed"
        save(tiers, KEY2)
        tiers.forget(KEY2, "disk")  # while it is written
        tiers.forget(KEY2, "host")
        assert load(tiers, KEY2) == "failed"
    assert os.listdir(tmp_path / "host/rank-0") == ["lock"]
    assert os.listdir(tmp_path / "disk/rank-0") == ["lock"]


def test_memory_is_used_again(tmp_path):
    """Steadily one block is saved in the place of another: no more memory is taken."""
    with opened(tmp_path, "host") as tiers:
        for index in range(8):
            key = bytes([index]) * 32
            if index > 2:
                tiers.forget(bytes([index - 3]) * 32, "host")
            save(tiers, key)
            wait_for_ends(tiers, 1)
            check_loads(tiers, key=key)
        assert len(tiers._saving._all) <= 5
        assert len(tiers.stored()["host"]) == 3
        for index in range(5, 8):
            check_loads(tiers, key=bytes([index]) * 32)


def test_few_blocks_of_the_disk_are_in_memory_at_a_time(tmp_path):
    """However many are asked for at once."""
    keys = [bytes([index]) * 32 for index in range(8)]
    with opened(tmp_path, "disk") as tiers:
        for key in keys:
            save(tiers, key)
        wait_for_ends(tiers, len(keys))
    with opened(tmp_path, "disk") as tiers:
        waiting, most, end = list(keys), 0, time.monotonic() + 20
        while waiting and time.monotonic() < end:
            waiting = [key for key in waiting if tiers.load(key, OTHERS, ALL) == "waiting"]
            most = max(most, len(tiers._staging._all))
        assert not waiting
        assert most <= 4  # of which two were just loaded
        for key in keys:
            check_loads(tiers, key=key)


def test_a_block_of_another_size(tmp_path):
    file_of_a_block(tmp_path)
    with opened(tmp_path, "disk") as tiers:
        assert load(tiers, pages=[0, 1, 2]) == "failed"
        assert tiers.stored()["disk"] == {}
        save(tiers)
        assert load(tiers, pages=[0, 1, 2]) == "failed"
        assert tiers.stored()["disk"] == {}


def test_past_the_host_tier(tmp_path):
    with opened(tmp_path, "host", "disk") as tiers:
        tiers.save(KEY, PAGES, ALL, ("disk",))
        check_loads(tiers)
        assert wait_for_ends(tiers, 1) == [SaveEnd(KEY, "disk", True)]
        assert tiers.stored()["host"] == {}
        assert list((tmp_path / "host/rank-0").glob("*.kv")) == []
        check_loads(tiers)
        save(tiers)
        assert wait_for_ends(tiers, 2) == [SaveEnd(KEY, tier, True) for tier in ("disk", "host")]
        check_loads(tiers)


def test_cancel(tmp_path):
    with opened(tmp_path, "host", "disk") as tiers:
        tiers.save(KEY, PAGES, range(2))
        assert load(tiers) == "failed"
        tiers.save(KEY, PAGES, range(2))
        tiers.cancel(KEY)
        tiers.save(KEY, PAGES, range(2, 3))  # nobody's
        assert tiers.stored() == {"host": {}, "disk": {}}
        save(tiers)
        wait_for_ends(tiers, 2)
    with opened(tmp_path, "host", "disk") as tiers:
        tiers.load(KEY, OTHERS, range(1))
        tiers.cancel(KEY)
        check_loads(tiers)


def test_a_worker_that_ends_deletes_its_part_of_the_host_tier(tmp_path):
    host, disk = tmp_path / "host", tmp_path / "disk"
    worker = Worker(make_engine(), SingleProcess())
    worker.execute(OpenStore("tiny", "abc", str(host), str(disk)))
    other = Tiers(make_engine(), replace(worker._tiers._description, rank=1), host, disk)
    save(other)
    wait_for_ends(other, 2)
    worker.close()
    assert sorted(path.name for path in host.iterdir()) == ["rank-1", "store.json"]
    other.close()
    assert (host / "rank-1").exists()
    other.delete_host()
    assert not host.exists()
    assert len(list((disk / "rank-1").glob("*.kv"))) == 1


@pytest.mark.parametrize("which", [("host",), ("disk",), ("host", "disk")], ids="+".join)
def test_any_order_of_calls(tmp_path, which):
    """What can be loaded is what was saved last, and what was not forgotten can be loaded."""
    random = np.random.default_rng(3)
    keys = [bytes([index]) * 32 for index in range(4)]
    engine = make_engine()
    for _ in range(4):
        with opened(tmp_path, *which, engine=engine) as tiers:
            stored = tiers.stored()
            there = {key: {tier for tier in which if key in stored[tier]} for key in keys}
            for _ in range(100):
                key = keys[random.integers(4)]
                match random.integers(6):
                    case 0 | 1:
                        for layer in ALL:
                            engine.write_layer(layer, PAGES, np.full((5, 1024), key[0], np.uint8))
                        save(tiers, key)
                        there[key] = set(which)
                    case 2:
                        tier = which[random.integers(len(which))]
                        tiers.forget(key, tier)
                        there[key].discard(tier)
                    case 3:
                        tiers.load(key, OTHERS, range(1))
                        tiers.cancel(key)
                    case _:
                        state = load(tiers, key)
                        assert state == "done" or not there[key]
                        if state == "done":
                            assert (kv_of(engine, OTHERS) == key[0]).all()
                if random.integers(2):
                    tiers.ended()


# Failures


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk(tmp_path, monkeypatch, capsys):
    with opened(tmp_path, "disk") as tiers:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full_disk)
            for key in (KEY, KEY2):
                save(tiers, key)
            assert [end.stored for end in wait_for_ends(tiers, 2)] == [False, False]
        assert tiers.stored()["disk"] == {}
        assert load(tiers) == "failed"
        assert capsys.readouterr().err == (
            f"star-attn: a context's KV is not kept in --context-dir {tmp_path}/disk: "
            "No space left on device\n"
        )
        assert os.listdir(tmp_path / "disk/rank-0") == ["lock"]
        save(tiers)
        assert wait_for_ends(tiers, 1) == [SaveEnd(KEY, "disk", True)]


@pytest.mark.parametrize("call", ["ftruncate", "posix_fallocate"])
def test_a_full_host_tier(tmp_path, monkeypatch, capsys, call):
    with opened(tmp_path, "host", "disk") as tiers:
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full_disk)
            save(tiers)
            ends = {SaveEnd(KEY, "host", False), SaveEnd(KEY, "disk", False)}
            assert set(wait_for_ends(tiers, 2)) == ends
            assert load(tiers) == "failed"
        assert capsys.readouterr().err.count("\n") == 1
        save(tiers)
        check_loads(tiers)


def test_an_error_that_is_no_files_fault(tmp_path, monkeypatch):
    with opened(tmp_path, "host") as tiers:
        monkeypatch.setattr(tiers_module, "checksum_of", lambda data: 1 / 0)
        save(tiers)
        with pytest.raises(ZeroDivisionError):
            wait_for_ends(tiers, 1)


def test_a_damaged_host_block_is_read_from_the_disk(tmp_path, capsys):
    with opened(tmp_path, "host", "disk") as tiers:
        save(tiers)
        wait_for_ends(tiers, 2)
    path = block_path(tmp_path, "host")
    data = bytearray(path.read_bytes())
    data[-STRIDE] ^= 1  # of the last layer
    path.write_bytes(data)
    with opened(tmp_path, "host", "disk") as tiers:
        assert tiers.stored()["host"].keys() == {KEY}
        check_loads(tiers)
        assert tiers.stored()["host"] == {}
        assert tiers.stored()["disk"].keys() == {KEY}
        assert "a block in the host tier's folder" in capsys.readouterr().err
    assert not path.exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The path of a block's file."""
    return file_of_a_block(tmp_path_factory.mktemp("whole"))


def reopened(folder, data, tier="disk"):
    path = block_path(folder, tier)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    about = {"format": 1, **vars(DESCRIPTION)}
    (folder / tier / "store.json").write_text(json.dumps(about))
    return opened(folder, tier)


@pytest.mark.parametrize("tier", ["host", "disk"])
@settings(max_examples=60)
@given(data=st.data())
def test_any_byte_flipped(whole, tmp_path_factory, tier, data):
    flipped = bytearray(whole.read_bytes())
    header = len(flipped) - LAYERS * STRIDE
    text_end = 24 + int.from_bytes(flipped[12:16], "little")
    places = st.integers(0, len(flipped) - 1), st.integers(0, text_end), st.just(header - 1)
    where = data.draw(st.one_of(places))
    flipped[where] ^= data.draw(st.integers(1, 255))
    in_layer = (where - header) % STRIDE
    in_padding = in_layer >= 5 * 1024 if where >= header else where >= text_end
    with reopened(tmp_path_factory.mktemp("flipped"), flipped, tier) as tiers:
        assert load(tiers) == ("done" if in_padding else "failed")
        if in_padding:
            np.testing.assert_array_equal(kv_of(tiers._engine, OTHERS), kv_of(ENGINE, PAGES))
        else:
            assert tiers.stored()[tier] == {}


@pytest.mark.parametrize("size", [0, 5, 24, 100, 4096, 4097, -4096, -1])
def test_a_file_cut_short(whole, tmp_path, size):
    with reopened(tmp_path, whole.read_bytes()[:size]) as tiers:
        check_fails(tiers, "disk")
    assert block_path(tmp_path, "disk").exists() == (
        not whole.read_bytes()[:size].startswith(MAGIC)
    )


def test_cut_short_after_it_was_seen(whole, tmp_path):
    with reopened(tmp_path, whole.read_bytes()) as tiers:
        os.truncate(block_path(tmp_path, "disk"), 5000)
        check_fails(tiers, "disk")


def with_header(path, change):
    """A file, but for a header that is as it says and whose checksum is right."""
    whole_file = path.read_bytes()
    length = int.from_bytes(whole_file[12:16], "little")
    text = change(whole_file[24 : 24 + length])
    head = whole_file[:12] + len(text).to_bytes(4, "little")
    head += checksum_of(text).to_bytes(8, "little") + text
    return head.ljust(4096, b"\0") + whole_file[4096:]


LIES = {
    "pages": lambda values: values["shape"].__setitem__(1, 3),
    "huge": lambda values: values["shape"].__setitem__(1, 10**30),
    "negative": lambda values: values["shape"].__setitem__(1, -1),
    "float": lambda values: values["shape"].__setitem__(1, 4.0),
    "bool": lambda values: values["shape"].__setitem__(1, True),
    "text": lambda values: values.__setitem__("shape", "4"),
    "null": lambda values: values.__setitem__("shape", None),
    "nothing": lambda values: values.clear(),
    "layers": lambda values: values["checksums"].pop(),
    "more layers": lambda values: values["checksums"].extend(values["checksums"]),
    "no number": lambda values: values["checksums"].__setitem__(0, "x"),
    "huge number": lambda values: values["checksums"].__setitem__(0, "f" * 5000),
    "a list": lambda values: values["checksums"].__setitem__(0, []),
    "key": lambda values: values.__setitem__("key", KEY2.hex()),
    "model": lambda values: values["description"].__setitem__("fingerprint", "def"),
    "rank": lambda values: values["description"].__setitem__("rank", 1),
    "more": lambda values: values.__setitem__("more", 1),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_lying_header(whole, tmp_path, lie):
    def change(text):
        values = json.loads(text)
        lie(values)
        return json.dumps(values).encode()

    with reopened(tmp_path, with_header(whole, change)) as tiers:
        check_fails(tiers, "disk")


@pytest.mark.parametrize("text", [b"[" * 3000, b"\xff\xfe", b"", b"3", b"1" * 5000, b"NaN", b"[]"])
def test_a_header_of_something_else(whole, tmp_path, text):
    with reopened(tmp_path, with_header(whole, lambda _: text)) as tiers:
        check_fails(tiers, "disk")


@pytest.mark.parametrize("kind", ["folder", "fifo", "link", "loop", "socket"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_is_not_a_file(whole, tmp_path, capsys, kind, when):
    """It is neither followed nor deleted, and a save does not take its place."""
    path, target = block_path(tmp_path, "disk"), tmp_path / "target"
    target.write_bytes(whole.read_bytes())

    def replace_it():
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            os.mknod(path, 0o140600)
        else:
            path.symlink_to(target if kind == "link" else path)

    tiers = reopened(tmp_path, whole.read_bytes())
    if when == "before":
        replace_it()
    with tiers as tiers:
        if when == "after":
            replace_it()
        check_fails(tiers, "disk")
        with suppress(FileNotFoundError):
            before = path.lstat()
        save(tiers)
        assert wait_for_ends(tiers, 1) == [SaveEnd(KEY, "disk", False)]
        assert path.lstat().st_ino == before.st_ino
    assert path.name not in capsys.readouterr().err  # or there would be a line for each block
    assert target.read_bytes() == whole.read_bytes()


# Folders


def test_leftovers(tmp_path):
    file_of_a_block(tmp_path)
    rank = tmp_path / "disk/rank-0"
    strangers = ["notes.txt", "ab.kv.tmp", ".xyz.kv.tmp", "abc.kv", ".ab.kv.tmp.bak", "ab.kv"]
    for name in [*strangers, ".3f.kv.tmp"]:
        (rank / name).write_text("text")
    (rank / ".1.kv.tmp").symlink_to(rank / "notes.txt")
    (rank / ".2.kv.tmp").mkdir()
    with opened(tmp_path, "disk") as tiers:
        assert tiers.stored()["disk"].keys() == {KEY}
        expected = {*strangers, ".1.kv.tmp", ".2.kv.tmp", f"{KEY.hex()}.kv", "lock"}
        assert set(os.listdir(rank)) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "def", "model": "big"}, r"model tiny \(abc\), here it is big \(def\)"),
        ({"dtype": "bfloat16"}, "dtype float32, here it is bfloat16"),
        ({"quantization": "fp8"}, "quantization None, here it is fp8"),
        ({"tokens_per_block": 4}, "tokens_per_block 8, here it is 4"),
        ({"num_ranks": 2}, "num_ranks 1, here it is 2"),
        ({"tp": 2}, "tp 1, here it is 2"),
    ],
)
def test_another_store(tmp_path, change, message):
    file_of_a_block(tmp_path)
    end = ": use another folder or delete it$"
    with (
        pytest.raises(UserError, match=f"disk was made with {message}{end}"),
        opened(tmp_path, "disk", description=replace(DESCRIPTION, **change)),
    ):
        pass
    assert block_path(tmp_path, "disk").exists()


def test_another_rank_and_a_renamed_model(tmp_path):
    file_of_a_block(tmp_path)
    both = replace(DESCRIPTION, model="renamed")
    with (
        opened(tmp_path, "disk", description=both) as tiers,
        opened(tmp_path, "disk", description=replace(both, rank=1)) as other,
    ):
        check_loads(tiers)
        assert other.stored()["disk"] == {}


def test_in_use(tmp_path):
    with (
        opened(tmp_path, "disk"),
        pytest.raises(UserError, match="disk is in use by another process"),
        opened(tmp_path, "host", "disk"),
    ):
        pass
    with opened(tmp_path, "host", "disk"):
        pass


def test_a_strangers_folder(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/thesis.tex").touch()
    with pytest.raises(UserError, match="is not empty and holds no"), opened(tmp_path, "disk"):
        pass
    assert os.listdir(tmp_path / "disk") == ["thesis.tex"]


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 5000, "\0"])
def test_a_damaged_store(tmp_path, text):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/store.json").write_text(text)
    with pytest.raises(UserError, match=r"store.json is damaged: use"), opened(tmp_path, "disk"):
        pass


@pytest.mark.parametrize("name", ["store.json", "rank-0", "rank-0/lock"])
def test_links_in_the_folder(tmp_path, name):
    """What they point to is not touched."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".1.kv.tmp").touch()
    with opened(tmp_path, "disk"):
        pass
    path = tmp_path / "disk" / name
    if name == "rank-0":
        path.joinpath("lock").unlink()
        path.rmdir()
        path.symlink_to(elsewhere)
    else:
        path.rename(elsewhere / "file")
        path.symlink_to(elsewhere / "file")
    before = sorted(os.listdir(elsewhere))
    with pytest.raises(UserError, match="--context-dir"), opened(tmp_path, "disk"):
        pass
    assert sorted(os.listdir(elsewhere)) == before


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="file/disk cannot be used: Not a directory"),
        opened(tmp_path / "file", "disk"),
    ):
        pass
    with (
        pytest.raises(UserError, match="cannot be used: No such file"),
        opened(Path("/proc"), "disk"),
    ):
        pass


# What engines share


def test_runs():
    assert runs_of([2, 3, 9, 5, 6, 7]) == [(2, 2), (9, 1), (5, 3)]
    assert runs_of([]) == []


def test_pages_under_copy():
    copies = PagesUnderCopy()
    assert not copies
    copies.add([1, 2], written=False)
    copies.add([5], written=True)
    assert copies
    steps = [
        (step_of(([3, 4], 0, 9)), False),
        (step_of(([1, 2, 4], 16, 2)), False),  # looks at 1 and 2
        (step_of(([1, 2], 14, 2)), True),
        (step_of(([4, 5], 0, 2)), True),  # may look at 5
        (step_of(([4, 5], 9, 1), stored=False), True),
    ]
    for pages, sends, receives in (
        ([1, 3], False, True),
        ([3, 5], True, True),
        ([6], False, False),
    ):
        each = Pages(1, np.array(pages, np.int32))
        steps += [
            (step_of(exchanges=(Exchange(0, (each,), ()),)), sends),
            (step_of(exchanges=(Exchange(0, (), (each,)),)), receives),
            (step_of(([3], 0, 1), hops=(Hop(each, 1, 0, NONE, NONE),)), sends),
        ]
    for step, expected in steps:
        assert copies.concern_step(step, PAGE) == expected, step
    assert copies.concern([], [2])
    copies.clear()
    assert not copies
