"""A server whose ranks, front or clients are lost, with real processes."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time

import httpx
import pytest

from server_process import SERVE, Server, save_long_model, wait_until

SECONDS = 15  # within which requests in flight are told that a rank is lost
PAGE = ("--block-size", 256, "--tokens-per-block", 32)
SHORT = [7, 8, 9] * 60
LONG = 20_000  # tokens of an answer that takes long, where 128K tokens of context do too


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_long_model(tmp_path_factory.mktemp("long"))


@pytest.fixture(scope="module")
def server(model):
    """Two ranks that may be lost often."""
    with Server(model, "--ranks", 2, "--oversubscribe", "--restart", 99, *PAGE) as server:
        yield server.ready()


class Asking(threading.Thread):
    """A request in flight. `moment`: its context is read for long, or it is answered for long."""

    counter = 0

    def __init__(self, server, moment, tokens=LONG, stream=True):
        super().__init__()
        Asking.counter += 1
        self.server, self.stream = server, stream
        self.prompt = [1 + Asking.counter % 200, *SHORT]
        if moment == "reading":
            self.prompt = [1 + Asking.counter % 200, *range(1, 241)] * 500
        self.options = {"max_tokens": tokens, "stream": stream}
        if stream:
            self.options["stream_options"] = {"include_usage": True, "include_progress": True}
        self.begun, self.gone = threading.Event(), threading.Event()
        self.status, self.error, self.usage = None, None, None
        running = server.metric("num_requests_running")
        self.start()
        if stream:
            assert self.begun.wait(60), server.log
        else:
            wait_until(lambda: server.metric("num_requests_running") > running)

    def run(self):
        with contextlib.suppress(httpx.HTTPError):  # whoever is told nothing has no status
            self.ask()

    def ask(self):
        body = {"prompt": self.prompt, "temperature": 0, "ignore_eos": True, **self.options}
        url = f"{self.server.url}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=120) as response:
            self.status = response.status_code
            if self.status != 200 or not self.stream:
                self.error = json.loads(response.read()).get("error")
                return
            for line in response.iter_lines():
                if self.gone.is_set():
                    return
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    self.error = event.get("error", self.error)
                    self.usage = event.get("usage") or self.usage
                    is_answer = bool(event.get("choices"))
                    if is_answer or len(self.prompt) > 1000:
                        self.begun.set()

    def told(self, seconds=SECONDS):
        """Waits for the end of the response, which says 503."""
        self.join(seconds)
        assert not self.is_alive(), self.server.log
        assert self.error, self.status
        assert self.error["type"] == "service_unavailable_error"
        assert self.status == (200 if self.stream else 503)


def lose(server, who, number):
    os.kill(server.mpirun() if who == "mpirun" else server.rank(who), number)


@pytest.mark.parametrize(
    ("who", "number", "moment"),
    [
        (0, signal.SIGKILL, "reading"),
        (1, signal.SIGKILL, "reading"),
        (0, signal.SIGKILL, "decoding"),
        (1, signal.SIGKILL, "decoding"),
        (1, signal.SIGKILL, "idle"),
        ("mpirun", signal.SIGKILL, "decoding"),
        (0, signal.SIGSTOP, "reading"),
        (1, signal.SIGSTOP, "decoding"),
    ],
)
def test_a_rank_is_lost(server, who, number, moment):
    server.wait_until_well()
    restarts = server.metric("engine_restarts_total")
    asking = []
    if moment != "idle":
        asking = [Asking(server, moment), Asking(server, moment, stream=False)]
    ranks = {server.rank(0), server.rank(1)}
    lose(server, who, number)
    for each in asking:
        each.told()
    answer = wait_until(
        lambda: (health := server.health()).status_code == 503 and health, SECONDS, server.health
    )
    assert answer.json()["reason"]
    assert answer.headers["retry-after"]
    refused = server.complete(SHORT, max_tokens=3)
    if refused.status_code == 503:  # it may be back
        assert refused.headers["retry-after"]
    wait_until(lambda: server.metric("engine_restarts_total") == restarts + 1)
    if number == signal.SIGKILL and who != "mpirun":
        assert f"rank {who} was ended by signal 9" in server.log
    server.wait_until_well()
    assert server.complete(SHORT, max_tokens=3).status_code == 200
    assert ranks.isdisjoint(server.processes())


def test_one_rank_that_nobody_else_watches(model):
    """It is ended once it is silent, and started again as often as is allowed."""
    with Server(model, "--restart", 1, "--stuck-timeout", 6, *PAGE) as server:
        server.ready()
        asking = [Asking(server, "decoding"), Asking(server, "decoding", stream=False)]
        os.kill(server.rank(0), signal.SIGSTOP)
        for each in asking:
            each.told()
        wait_until(lambda: server.metric("engine_restarts_total") == 1)
        assert "have said nothing for 6 s" in server.log
        assert "signal" not in server.log
        server.wait_until_well()
        asking = Asking(server, "reading")
        os.kill(server.rank(0), signal.SIGKILL)
        asking.told()
        wait_until(lambda: server.health().json()["status"] == "lost")
        assert "signal 9" in server.health().json()["reason"]
        time.sleep(1)
        assert server.health().json()["status"] == "lost"
        assert server.complete(SHORT, max_tokens=3).status_code == 503
        assert len(server.processes()) == 1
        server.process.terminate()
        assert server.process.wait(10) == 0
        server.nothing_is_left()


@pytest.mark.parametrize("state", ["idle", "reading", "stopped"])
def test_the_front_is_killed(model, state):
    ranks = 1 if state == "stopped" else 2
    with Server(model, "--ranks", ranks, "--oversubscribe", *PAGE) as server:
        server.ready()
        if state == "reading":
            Asking(server, "reading")
        if state == "stopped":
            os.kill(server.rank(0), signal.SIGSTOP)
        server.process.kill()
        server.nothing_is_left(seconds=10)


@pytest.mark.parametrize("interrupt", [False, True])
def test_requests_in_flight_are_finished(model, interrupt):
    """SIGTERM, and Ctrl-C, which the terminal sends to all processes in front."""
    ranks = 2 if interrupt else 1
    with Server(model, "--ranks", ranks, "--oversubscribe", *PAGE) as server:
        server.ready()
        asking = [Asking(server, "decoding", 600, stream) for stream in (True, False)]
        if interrupt:
            os.killpg(server.process.pid, signal.SIGINT)
        else:
            server.process.terminate()
        wait_until(lambda: server.health().json()["status"] == "draining")
        refused = server.complete(SHORT, max_tokens=3)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        for each in asking:
            each.join(30)
            assert each.status == 200
            assert each.error is None
        assert asking[0].usage["completion_tokens"] == 600
        assert server.process.wait(20) == 0
        server.nothing_is_left()


def test_requests_that_take_longer_than_the_shutdown(model):
    options = ("--ranks", 2, "--oversubscribe", "--shutdown-timeout", 2)
    with Server(model, *options, *PAGE) as server:
        server.ready()
        asking = [Asking(server, "decoding"), Asking(server, "reading", stream=False)]
        server.process.terminate()
        for each in asking:
            each.told(10)
            assert "shutting down" in each.error["message"]
        assert server.process.wait(10) == 0
        server.nothing_is_left()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(model, number):
    options = ("--ranks", 2 if number == signal.SIGTERM else 1, "--shutdown-timeout", 60)
    with Server(model, *options, "--oversubscribe", *PAGE) as server:
        server.ready()
        asking = Asking(server, "decoding")
        server.process.send_signal(number)
        wait_until(lambda: server.health().json()["status"] == "draining")
        began = time.monotonic()
        server.process.send_signal(number)
        server.process.wait(10)
        assert time.monotonic() - began < 8
        asking.gone.set()
        server.nothing_is_left()


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_while_the_model_is_loaded(model, ranks):
    with Server(model, "--ranks", ranks, "--oversubscribe", *PAGE) as server:
        wait_until(lambda: server.rank(ranks - 1), 60, lambda: server.log)
        server.process.terminate()
        assert server.process.wait(10) == 0
        server.nothing_is_left()
        assert "star-attn" not in server.log


@pytest.mark.parametrize("moment", ["reading", "decoding"])
def test_a_client_that_leaves(server, moment):
    """The engine stops working for it, on all ranks, and has its pages back."""

    def used():
        return server.metric("kv_cache_usage_perc")

    server.wait_until_well()
    prompt = Asking.counter + 1
    if moment == "decoding":  # its context is cached before and after
        server.complete([1 + prompt % 200, *SHORT], max_tokens=1)
    wait_until(lambda: used() is not None)
    time.sleep(1.5)  # the next statistics
    before = used()
    asking = Asking(server, moment)
    wait_until(lambda: used() > before)
    asking.gone.set()
    asking.join(10)
    for name in ("num_requests_running", "num_requests_waiting", "contexts_being_read"):
        wait_until(lambda name=name: server.metric(name) == 0, 5)
    wait_until(lambda: used() == before, 10, lambda: f"{used()}, before {before}")
    begin = time.monotonic()
    assert server.complete(SHORT, max_tokens=2).status_code == 200
    assert time.monotonic() - begin < 5


def refusal(*options, model=None, code=2):
    """What a server that does not start says: its line of the log."""
    process = subprocess.run(
        [*SERVE, "--model", str(model), *map(str, options)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert process.returncode == code, process.stderr
    lines = [line for line in process.stderr.splitlines() if not line.startswith("{")]
    assert len(lines) == 1, process.stderr
    assert process.stdout == ""
    return lines[0]


def test_what_is_refused_at_once(model, tmp_path):
    assert "no/such/model" in refusal(model="no/such/model")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port} cannot be served" in refusal("--port", port, model=model)
    assert "--restart" in refusal("--restart", -1, model=model)
    assert "--ranks is 99" in refusal("--ranks", 99, model=model)
    assert "--stuck-timeout" in refusal("--stuck-timeout", 0, model=model)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_that_cannot_be_loaded(model, tmp_path, ranks):
    """No rank is started again, and each says nothing more than the reason."""
    folder = shutil.copytree(model, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with Server(folder, "--ranks", ranks, "--oversubscribe", *PAGE) as server:
        assert server.process.wait(90) == 2
        lines = [line for line in server.log.splitlines() if not line.startswith("{")]
        assert len(lines) == 1, server.log
        assert lines[0].startswith("star-attn: error: ")
        server.nothing_is_left()


@pytest.mark.parametrize("who", ["front", "mpirun", "rank 0", "rank 1"])
def test_ranks_that_mpirun_starts(model, who):
    with Server(model, *PAGE, outer=2) as server:
        server.ready()
        assert server.complete(SHORT, max_tokens=3).json()["usage"]["completion_tokens"] == 3
        asking = Asking(server, "decoding", tokens=300 if who == "front" else LONG)
        if who == "front":
            (front,) = [
                pid for pid, (_, env) in server.processes().items() if b"_OUTER_RANK0=" in env
            ]
            os.kill(front, signal.SIGTERM)
            asking.join(30)
            assert asking.usage["completion_tokens"] == 300
            assert server.process.wait(20) == 0
        else:
            if who == "mpirun":
                server.process.terminate()
            else:
                os.kill(server.rank(int(who[-1])), signal.SIGKILL)
            asking.told()
            assert server.process.wait(20) != 0
        server.nothing_is_left()


def test_what_is_refused_under_mpirun(model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = ("--port", taken.getsockname()[1])
        with Server(model, *options, outer=2) as server:
            assert server.process.wait(60) == 2
            assert "cannot be served" in server.log
            server.nothing_is_left()
