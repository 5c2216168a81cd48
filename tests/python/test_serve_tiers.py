"""Contexts in host memory and on disk, as clients of a server meet them."""

import os
import signal
from pathlib import Path

import pytest

from server_process import Server, save_long_model, wait_until

OPTIONS = ("--block-size", 256, "--tokens-per-block", 32, "--oversubscribe")
PROMPT = "".join(f"{i}. The quick brown fox jumps over the lazy dog.\n" for i in range(60))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_long_model(tmp_path_factory.mktemp("long"))


def answer(server):
    """Its text and log-probabilities, and tokens of the context that were not read."""
    body = server.complete(PROMPT, max_tokens=8, logprobs=0).json()
    choice = body["choices"][0]
    cached = body["usage"]["prompt_tokens_details"]["cached_tokens"]
    return choice["text"], choice["logprobs"]["token_logprobs"], cached


def wait_for_copies(server, tier):
    """Until all blocks that are in pages are in the tier too."""

    def is_there():
        blocks = server.metric('cached_blocks{tier="gpu"}')
        return blocks and server.metric(f'cached_blocks{{tier="{tier}"}}') == blocks

    wait_until(is_there, 30, lambda: server.log)


def check_same(first, later):
    assert later[0] == first[0]
    assert later[1] == pytest.approx(first[1], abs=1e-3)
    assert first[2] == 0 < later[2]


@pytest.mark.parametrize(("kv_dtype", "status"), [("auto", 400), ("int8", 200)])
def test_a_context_that_fits_in_8_bits_only(model, kv_dtype, status):
    pages, tokens = 26, 900
    memory = pages * 2 * 3 * 2 * 16 * 32 * 4 / 2**30  # K and V of 3 layers, 2 heads of 16
    options = ("--kv-dtype", kv_dtype, "--kv-cache-gib", memory, *OPTIONS)
    with Server(model, *options) as server:
        # A text of the longest token is known to be too long before it is tokenised.
        reply = server.ready().complete(" Indented" * tokens, max_tokens=2)
        assert reply.status_code == status, reply.text
    assert tokens > pages * 32


def test_host_memory_outlives_the_ranks(model):
    with Server(model, "--ranks", 2, "--host-cache-gib", 0.1, *OPTIONS) as server:
        server.ready()
        first = answer(server)
        wait_for_copies(server, "host")
        os.kill(server.rank(1), signal.SIGKILL)
        wait_until(lambda: server.metric("engine_restarts_total") == 1, 30)
        server.wait_until_well()
        check_same(first, answer(server))
        server.process.terminate()
        assert server.process.wait(30) == 0
        front = f"star-attention-{server.process.pid}-"
        assert not [each for each in Path("/dev/shm").iterdir() if each.name.startswith(front)]


def test_the_disk_outlives_the_server(model, tmp_path):
    folder = tmp_path / "contexts"
    with Server(model, "--context-dir", folder, *OPTIONS) as server:
        first = answer(server.ready())
        wait_for_copies(server, "disk")
        server.process.terminate()
        assert server.process.wait(30) == 0
    for path in (folder / "blocks").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0
    with Server(model, "--context-dir", folder, *OPTIONS) as server:
        check_same(first, answer(server.ready()))
        with Server(model, "--context-dir", folder, *OPTIONS) as second:
            assert second.process.wait(60) == 2
            assert "--context-dir" in second.log
    # A block that is damaged is read again.
    damaged = next((folder / "blocks").rglob("*.kv"))
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    with Server(model, "--context-dir", folder, *OPTIONS) as server:
        text, logprobs, cached = answer(server.ready())
        assert text == first[0]
        assert logprobs == pytest.approx(first[1], abs=1e-3)
        assert cached < answer(server)[2]


def test_blocks_of_another_model_are_refused(model, tmp_path):
    folder = tmp_path / "contexts"
    with Server(model, "--context-dir", folder, *OPTIONS) as server:
        answer(server.ready())
        wait_for_copies(server, "disk")
    other = ("--block-size", 256, "--tokens-per-block", 64, "--oversubscribe")
    with Server(model, "--context-dir", folder, *other) as server:
        assert server.process.wait(60) == 2
        assert "tokens_per_block" in server.log
        assert "use another folder" in server.log


def test_too_much_host_memory_is_refused(model):
    with Server(model, "--host-cache-gib", 10**6) as server:
        assert server.process.wait(60) == 2
        assert "--host-cache-gib 1e+06 takes 1e+06 GiB of /dev/shm" in server.log
