"""What clients may not do, by mistake or on purpose: never a 500, always OpenAI's error."""

import contextlib
import json
import socket
import threading
import time

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_engine import FakeEngine, spelled
from fake_tokenizer import ByteTokenizer
from serving import serving
from star_attention.models.tokenizer import Message
from star_attention.serve.api import ChatRequest, CompletionRequest, ContextRequest, TokenizeRequest

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server():
    with serving(max_body_mib=1, body_timeout=2) as running:
        yield running
        running.wait_until_idle()


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=20) as http:
        yield http


def slow_server(step, **options):
    tokenizer = ByteTokenizer()
    return serving(tokenizer, FakeEngine(tokenizer, step=step), **options)


def chat(text="?", **more):
    return {"messages": [{"role": "user", "content": text}], "seed": 0, **more}


def check_error(response, *statuses):
    assert response.status_code in statuses, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe{}",
        b'{"messages": "\xff"}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"temperature": NaN}',
        b'{"temperature": Infinity}',
        b'{"messages": [{"role": "user", "content": "?"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "?"}], "seed": ' + b"9" * 5000 + b"}",
        b'{"a": ' + b"[" * 33 + b"]" * 33 + b"}",
        b"[" * 500_000,
        b'{"a":' * 100_000,
        b'{"messages": [], "messages": 5}',
        b'{"messages": [{"role": "user", "content": "?"}]} trailing',
    ],
    ids=lambda body: repr(body[:30]),
)
def test_wrong_json(http, body):
    check_error(http.post(CHAT, content=body, headers=JSON), 400)


def test_the_last_of_equal_keys_counts(http):
    body = json.dumps(chat())[:-1] + ', "max_tokens": 0, "max_tokens": 3}'
    response = http.post(CHAT, content=body, headers=JSON)
    assert response.json()["usage"]["completion_tokens"] == 3


def test_depth_that_is_allowed(http):
    body = json.dumps(chat())[:-1] + ', "metadata": ' + "[" * 31 + "]" * 31 + "}"
    assert http.post(CHAT, content=body, headers=JSON).status_code == 200


def test_other_encodings_and_types(http):
    body = json.dumps(chat())
    check_error(http.post(CHAT, content=body, headers={**JSON, "content-encoding": "gzip"}), 415)
    check_error(http.post(CHAT, content=body, headers={"content-type": "text/plain"}), 415)
    check_error(http.post(CHAT, content=body), 415)


def test_bodies_that_are_too_large(http):
    large = json.dumps(chat("x" * (1 << 20))).encode()
    error = check_error(http.post(CHAT, content=large, headers=JSON), 413)
    assert error["code"] == "body_too_large"
    pieces = iter([large[:1000]] * 2000)  # chunked, without Content-Length
    check_error(http.post(CHAT, content=pieces, headers=JSON), 413)
    files = [("files", ("a.txt", b"x" * (1 << 20)))]
    check_error(http.post("/v1/contexts", files=files), 413)


@pytest.mark.parametrize("body", [b"", b"--x\r\n\r\n", b"--x\r\nContent-Disposition: a\r\n\r\nb"])
def test_wrong_forms(http, body):
    headers = {"content-type": "multipart/form-data; boundary=x"}
    check_error(http.post("/v1/contexts", content=body, headers=headers), 400)
    check_error(
        http.post("/v1/contexts", content=body, headers={"content-type": "multipart/form-data"}),
        400,
    )


def test_many_fields_and_files(http):
    data = {f"f{index}": "x" for index in range(20)}
    check_error(http.post("/v1/contexts", data=data, files={"files": b"x"}), 400)
    check_error(http.post("/v1/contexts", files=[("files", b"x")] * 1001), 400)


@pytest.mark.parametrize(
    "wrong",
    [
        {"messages": [{"role": "user", "content": "?"}] * 2049},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}] * 2049}]},
    ],
)
def test_many_messages_and_parts(http, wrong):
    check_error(http.post(CHAT, json=wrong), 400)


def connect(server):
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    connection.settimeout(10)
    return connection


def read_all(connection):
    data = b""
    while piece := connection.recv(1 << 16):
        data += piece
    return data


def test_heads_that_do_not_come(server):
    with connect(server) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
        start = time.monotonic()
        assert read_all(connection) == b""
        assert time.monotonic() - start < 5


def test_bodies_that_do_not_come(server):
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    )
    with connect(server) as connection:
        connection.sendall(head)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"code":"body_timeout"' in answer


def test_lengths_that_lie(server):
    for length in (b"-1", b"9" * 5000, b"abc"):
        with connect(server) as connection:
            connection.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: " + length + b"\r\n\r\n{}"
            )
            assert read_all(connection).startswith((b"HTTP/1.1 400", b"HTTP/1.1 413"))


def test_the_queue_is_full():
    with slow_server(0.05, max_queue=2) as running, httpx.Client(base_url=running.url) as http:
        check_error(http.post(CHAT, json=chat(n=3)), 400)
        threads = [
            threading.Thread(target=httpx.post, args=[running.url + CHAT], kwargs={"json": chat()})
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        running.wait_until(lambda: running.app.in_flight == 2)
        response = http.post(CHAT, json=chat())
        check_error(response, 429)
        assert int(response.headers["retry-after"]) >= 1
        check_error(http.post("/v1/contexts", json={"text": "a"}), 429)
        for thread in threads:
            thread.join()
        assert http.post(CHAT, json=chat(), timeout=20).status_code == 200
        running.wait_until_idle()


def test_requests_that_take_too_long():
    with (
        slow_server(0.2, request_timeout=0.7) as running,
        httpx.Client(base_url=running.url, timeout=10) as http,
    ):
        check_error(http.post(CHAT, json=chat()), 504)
        response = http.post(CHAT, json=chat(stream=True))
        assert response.status_code == 200
        last = json.loads(response.text.rstrip().split("\n\n")[-1].removeprefix("data: "))
        assert last["error"]["code"] == "request_timeout"
        check_error(http.post("/v1/contexts", json={"text": "a" * 1000}), 504)
        assert http.get("/v1/contexts").json()["data"] == []
        running.wait_until_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave(stream):
    with slow_server(0.2) as running:
        body = json.dumps(chat(stream=stream, n=3)).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with connect(running) as connection:
            connection.sendall(head.encode() + body)
            running.wait_until(lambda: running.engine.open == 3)
        start = time.monotonic()
        running.wait_until_idle()
        assert time.monotonic() - start < 1
        assert "requests_aborted_total 1.0" in httpx.get(f"{running.url}/metrics").text


def test_clients_that_do_not_read():
    """Their request is cancelled, and what waits for them has a bound."""
    tokenizer = ByteTokenizer()
    engine = FakeEngine(tokenizer, max_tokens=1 << 22)
    with serving(tokenizer, engine, client_timeout=0.5, block_tokens=1 << 20) as running:
        options = {"include_progress": True}
        # Each event of progress lists all blocks: some 60 MB in all.
        parts = [{"type": "text", "text": "x" * 64 * 1000}, {"type": "text", "text": "?"}]
        body = json.dumps(chat(parts, stream=True, stream_options=options)).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with connect(running) as connection:
            connection.sendall(head.encode() + body)
            running.wait_until(lambda: running.engine.open == 1)
            running.wait_until_idle()
            assert len(engine.cached) < 1000


def test_limit_of_contexts():
    with serving(max_context_tokens=100) as running, httpx.Client(base_url=running.url) as http:
        parts = [{"type": "text", "text": "x" * 200}, {"type": "text", "text": "?"}]
        error = check_error(http.post(CHAT, json=chat(parts)), 400)
        assert error["code"] == "context_length_exceeded"
        assert "100" in error["message"]
        error = check_error(http.post("/v1/contexts", json={"text": "x" * 200}), 400)
        assert error["code"] == "context_length_exceeded"


class SlowTokenizer(ByteTokenizer):
    """Takes a second, as a real one does for 4 MB."""

    def chat(self, messages):
        if len(messages[0].parts[0]) > 1000:
            time.sleep(1)
        return super().chat(messages)


def test_long_texts_hold_nobody_up():
    tokenizer = SlowTokenizer()
    with serving(tokenizer, FakeEngine(tokenizer, max_tokens=1 << 24)) as running:
        big = chat("x" * 100_000)
        sent = threading.Thread(
            target=httpx.post, args=[running.url + CHAT], kwargs={"json": big, "timeout": 30}
        )
        sent.start()
        running.wait_until(lambda: running.app.in_flight == 1)
        with httpx.Client(base_url=running.url) as http:
            start = time.monotonic()
            assert http.get("/health").status_code == 200
            response = http.post(CHAT, json=chat())
            assert time.monotonic() - start < 0.5
        expected = tokenizer.chat([Message("user", ("?",))]).token_ids
        assert response.json()["choices"][0]["message"]["content"] == spelled(expected)
        sent.join()


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([2**63, -(2**64), 1e308, "", "user", "text", "tiny"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=5) | st.sampled_from(["type", "text", "role", "content"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
ENDPOINTS = {
    CHAT: (ChatRequest, {"messages": [{"role": "user", "content": "?"}]}),
    "/v1/completions": (CompletionRequest, {"prompt": "Once"}),
    "/v1/contexts": (ContextRequest, {"text": "Once"}),
    "/tokenize": (TokenizeRequest, {"prompt": "Once"}),
}
MORE = ["logit_bias", "tools", "response_format", "best_of", "echo"]


@pytest.mark.parametrize("path", ENDPOINTS)
@given(data=st.data())
@settings(max_examples=60)
def test_wrong_types_everywhere(http, path, data):
    model, right = ENDPOINTS[path]
    fields = st.sampled_from([*model.model_fields, *MORE])
    wrong = data.draw(st.dictionaries(fields, ANYTHING, min_size=1, max_size=3))
    body = json.dumps({**right, "max_tokens": 2, **wrong})
    response = http.post(path, content=body.encode(), headers=JSON)
    if response.status_code >= 300:
        check_error(response, 400, 404, 409)
    for context in http.get("/v1/contexts").json()["data"]:
        assert http.delete(f"/v1/contexts/{context['id']}").status_code == 200


@given(body=st.binary(max_size=200))
@settings(max_examples=50)
def test_any_bytes(http, body):
    check_error(http.post(CHAT, content=body, headers=JSON), 400)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/contexts"])
def test_what_cannot_fit_is_not_tokenised(path):
    class Careful(ByteTokenizer):
        def text_tokens(self, text):
            assert len(text) <= 8192
            return super().text_tokens(text)

        def chat(self, messages):
            assert sum(len(part.strip()) for message in messages for part in message.parts) <= 8192
            return super().chat(messages)

    def body(text):
        return {CHAT: chat(text), "/v1/completions": {"prompt": text}}.get(path, {"text": text})

    with serving(Careful(), max_context_tokens=4000) as running:  # the model takes 4096
        for text in ("x" * 8195, "x" * 4097):
            error = check_error(httpx.post(running.url + path, json=body(text), timeout=20), 400)
            assert error["code"] == "context_length_exceeded"
            assert ("at least" in error["message"]) == (len(text) > 8192)
        if path == CHAT:  # whose template drops it
            assert httpx.post(running.url + path, json=body(" " * 9000 + "?")).status_code == 200


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/contexts"])
def test_a_full_queue_refuses_before_the_body_comes(path):
    """Who sends it nevertheless is told as well, and may go on over the same connection."""
    with serving(max_queue=1) as running:
        running.app.front.admission.count = 1
        with socket.create_connection(("127.0.0.1", running.port), timeout=10) as client:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n"
            client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode())
            told = client.recv(4096)
            while not told.endswith(b"}}"):
                told += client.recv(4096)
            assert told.startswith(b"HTTP/1.1 429 ")
            client.sendall(b"x" * 1_000_000 + b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
        running.app.front.admission.count = 0


def test_who_sends_half_a_body_is_told_of_the_end():
    head = "Host: localhost\r\nContent-Length: 1000\r\n"
    with serving() as running, contextlib.ExitStack() as clients:
        sockets = []
        for path, kind in (
            (CHAT, "application/json"),
            ("/v1/contexts", "multipart/form-data; boundary=a"),
        ):
            client = socket.create_connection(("127.0.0.1", running.port), timeout=10)
            sockets.append(clients.enter_context(client))
            client.sendall(f"POST {path} HTTP/1.1\r\n{head}Content-Type: {kind}\r\n\r\n".encode())
        time.sleep(0.2)
        running.call(running.app.drain)
        running.call(running.app.end)
        for client in sockets:
            assert client.recv(4096).startswith(b"HTTP/1.1 503 ")
        assert httpx.get(running.url + "/version").status_code == 200
