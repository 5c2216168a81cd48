"""Named contexts."""

import asyncio
import json
import threading
import time
from types import SimpleNamespace
from unittest.mock import Mock

import httpx
import numpy as np
import pytest

from fake_engine import FakeEngine, spelled
from fake_tokenizer import ByteTokenizer
from helpers import train_tokenizer
from serving import serving
from star_attention.errors import UserError
from star_attention.models.tokenizer import Message, Tokenizer
from star_attention.serve.api import ContextPatch
from star_attention.serve.app import create_app
from star_attention.serve.contexts import Contexts
from star_attention.serve.options import ServeOptions

TOKENIZER = ByteTokenizer()
TEXT = "A long text.\n" * 20


@pytest.fixture
def server():
    with serving() as running:
        yield running
        running.wait_until_idle()


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server.url, timeout=20) as http:
        yield http


def slow_server(step=0.02, **options):
    tokenizer = ByteTokenizer()
    return serving(tokenizer, FakeEngine(tokenizer, step=step), **options)


def when_at_work(running, action, *arguments):
    """Does it in a thread, once the engine does something."""

    def wait():
        running.wait_until(lambda: running.engine.open)
        action(*arguments)

    threading.Thread(target=wait).start()


def tokens(*turns):
    return TOKENIZER.chat([Message(role, parts) for role, *parts in turns]).token_ids.tolist()


def ask(http, context, *texts, **more):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    body = {"messages": messages, "context": context, "seed": 1, **more}
    return http.post("/v1/chat/completions", json=body)


def text_of(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def test_a_context_is_asked(server, http):
    made = http.post("/v1/contexts", json={"name": "book", "text": TEXT})
    assert made.status_code == 201
    made = made.json()
    assert (made["id"], made["object"], made["status"]) == ("book", "context", "ready")
    assert made["bytes"] == len(TEXT)
    assert made["blocks"][:2] == [
        {"start": 0, "end": 64, "rank": 0, "source": "new", "anchor": 0},
        {"start": 64, "end": 128, "rank": 1, "source": "new", "anchor": 64},
    ]
    assert server.engine.held == []

    response = ask(http, "book", "Who?")
    assert text_of(response) == spelled(tokens(("user", TEXT, "Who?")), 1)
    cached = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == made["tokens"]
    assert server.engine.asked[-1][1] == made["tokens"]

    turns = ("Who?", "Nobody.", "Where?")
    expected = tokens(("user", TEXT, "Who?"), ("assistant", "Nobody."), ("user", "Where?"))
    assert text_of(ask(http, "book", *turns)) == spelled(expected, 1)
    assert TOKENIZER.decode(expected[server.engine.asked[-1][1] :]) == "Where?assistant\n"
    said = http.get("/v1/contexts/book").json()
    assert said["questions"] == 2
    assert said["last_used"] >= said["created"]


def test_streamed_answers(http):
    http.post("/v1/contexts", json={"name": "book", "text": TEXT})
    response = ask(http, "book", "Who?", stream=True)
    pieces = [json.loads(line[6:]) for line in response.text.split("\n\n")[:-2]]
    text = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
    assert text == spelled(tokens(("user", TEXT, "Who?")), 1)


def test_systems_and_messages(http):
    http.post("/v1/contexts", json={"name": "a", "text": TEXT, "system": "Be short."})
    expected = tokens(("system", "Be short."), ("user", TEXT, "Who?"))
    assert text_of(ask(http, "a", "Who?")) == spelled(expected, 1)
    messages = [
        {"role": "user", "content": TEXT},
        {"role": "assistant", "content": "I see."},
        {"role": "user", "content": [{"type": "text", "text": "And"}] * 2},
    ]
    http.post("/v1/contexts", json={"name": "b", "messages": messages})
    expected = tokens(("user", TEXT), ("assistant", "I see."), ("user", "And", "And", "Who?"))
    assert text_of(ask(http, "b", "Who?")) == spelled(expected, 1)


def test_what_a_question_may_not_bring(http):
    http.post("/v1/contexts", json={"name": "book", "text": TEXT})
    system = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who?"}]
    body = {"messages": system, "context": "book"}
    assert http.post("/v1/chat/completions", json=body).status_code == 400
    response = ask(http, "nobody", "Who?")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "context_not_found"
    body = {"prompt": "Who?", "context": "book"}
    assert http.post("/v1/completions", json=body).status_code == 400


def test_models_without_template():
    tokenizer = ByteTokenizer(uses_chat=False)
    with serving(tokenizer) as running, httpx.Client(base_url=running.url) as http:
        http.post("/v1/contexts", json={"name": "book", "text": TEXT})
        body = {"prompt": "Who?", "context": "book", "seed": 1}
        answer = http.post("/v1/completions", json=body).json()
        assert answer["choices"][0]["text"] == spelled(TOKENIZER.text_tokens(TEXT + "Who?"), 1)
        assert http.post("/v1/contexts", json={"text": "a", "system": "b"}).status_code == 400


def test_files(server, http):
    files = [("files", ("/etc/a.txt", b"One.\n")), ("files", ("b.md", "Z\u00fcrich.".encode()))]
    made = http.post("/v1/contexts", files=files, data={"name": "docs", "ttl_seconds": "60"})
    assert made.status_code == 201, made.text
    made = made.json()
    assert made["files"] == [{"name": "a.txt", "bytes": 5}, {"name": "b.md", "bytes": 8}]
    assert made["ttl_seconds"] == 60
    expected = tokens(("user", "One.\n\nZ\u00fcrich.", "Who?"))
    assert text_of(ask(http, "docs", "Who?")) == spelled(expected, 1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"\xff\xfe", "UTF-8"), (b"a\0b", "binary"), (b" \n", "empty"), (b"", "empty")],
)
def test_wrong_files(http, content, reason):
    response = http.post("/v1/contexts", files=[("files", ("x.txt", content))])
    assert response.status_code == 400
    assert reason in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"text": " \n"},
        {"text": "a", "messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "assistant", "content": "a"}]},
        {"text": "a", "ttl_seconds": 0},
        {"text": "a", "ttl_seconds": "5"},
        {"text": "a", "pinned": 1},
        {"text": "x" * 5000},
        *({"text": "a", "name": name} for name in ("", ".a", "a/b", "a" * 65, "a\n", "\u00e4", 5)),
    ],
    ids=str,
)
def test_wrong_contexts(http, wrong):
    response = http.post("/v1/contexts", json=wrong)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert http.get("/v1/contexts").json()["data"] == []


def test_list_and_delete(http):
    names = [http.post("/v1/contexts", json={"text": TEXT}).json()["id"] for _ in range(2)]
    assert all(name.startswith("ctx-") for name in names)
    assert [each["id"] for each in http.get("/v1/contexts").json()["data"]] == names
    deleted = http.delete(f"/v1/contexts/{names[0]}").json()
    assert deleted == {"id": names[0], "object": "context", "deleted": True}
    assert http.get(f"/v1/contexts/{names[0]}").status_code == 404
    assert http.delete(f"/v1/contexts/{names[0]}").status_code == 404


def test_names_are_unique(http):
    assert http.post("/v1/contexts", json={"name": "a", "text": TEXT}).status_code == 201
    response = http.post("/v1/contexts", json={"name": "a", "text": "other"})
    assert response.status_code == 409
    assert response.json()["error"]["code"] == "context_exists"


def test_there_are_not_too_many():
    with serving(max_contexts=1) as running, httpx.Client(base_url=running.url) as http:
        http.post("/v1/contexts", json={"name": "a", "text": TEXT})
        response = http.post("/v1/contexts", json={"name": "b", "text": TEXT})
        assert response.json()["error"]["code"] == "too_many_contexts"
        http.delete("/v1/contexts/a")
        assert http.post("/v1/contexts", json={"name": "b", "text": TEXT}).status_code == 201


def test_progress(http):
    response = http.post("/v1/contexts", json={"name": "a", "text": TEXT, "stream": True})
    events = [json.loads(line[6:]) for line in response.text.split("\n\n")[:-2]]
    assert {event["object"] for event in events[:-1]} == {"context.progress"}
    assert events[-1]["object"] == "context"
    assert events[-1]["status"] == "ready"
    assert response.text.endswith("data: [DONE]\n\n")


def test_pinned_contexts_are_held(server, http):
    made = http.post("/v1/contexts", json={"name": "a", "text": TEXT, "pinned": True}).json()
    assert made["pinned"]
    assert len(server.engine.held) == 1
    assert http.patch("/v1/contexts/a", json={"pinned": False}).json()["status"] == "ready"
    assert server.engine.held == []
    http.patch("/v1/contexts/a", json={"pinned": True})
    server.wait_until(lambda: len(server.engine.held) == 1)
    assert http.get("/v1/contexts/a").json()["status"] == "ready"
    http.delete("/v1/contexts/a")
    assert server.engine.held == []


def test_pinned_contexts_are_read_again(server, http):
    for name, pinned in (("a", True), ("b", False)):
        http.post("/v1/contexts", json={"name": name, "text": TEXT + name, "pinned": pinned})
    server.call(server.engine.lose)
    server.wait_until(lambda: not server.engine.held)
    assert http.get("/v1/contexts/a").json()["status"] == "reading"
    server.call(server.engine.restart)
    server.wait_until(lambda: len(server.engine.held) == 1)
    assert http.get("/v1/contexts/a").json()["status"] == "ready"
    assert text_of(ask(http, "b", "?")) == spelled(tokens(("user", TEXT + "b", "?")), 1)


def test_a_context_that_no_longer_fits_has_failed(server, http):
    http.post("/v1/contexts", json={"name": "a", "text": TEXT, "pinned": True})
    server.call(server.engine.lose)
    server.engine.refuses = "it does not fit"
    server.call(server.engine.restart)
    server.wait_until(lambda: next(iter(server.app.contexts)).status == "failed")
    assert http.get("/v1/contexts/a").json()["error"] == "it does not fit"
    server.engine.refuses = None


def test_the_engine_is_lost_while_a_context_is_read():
    with slow_server(0.1) as running, httpx.Client(base_url=running.url, timeout=20) as http:
        when_at_work(running, running.call, running.engine.lose)
        response = http.post("/v1/contexts", json={"name": "a", "text": TEXT})
        assert response.status_code == 503
        assert http.get("/v1/contexts").json()["data"] == []
        running.wait_until_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_leaves_while_a_context_is_read(stream):
    with slow_server(0.1) as running, httpx.Client(base_url=running.url) as http:
        body = {"name": "a", "text": TEXT, "pinned": True, "stream": stream}
        if stream:
            with http.stream("POST", "/v1/contexts", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/contexts", json=body, timeout=0.3)
        running.wait_until_idle()
        assert http.get("/v1/contexts").json()["data"] == []
        assert running.engine.held == []


def test_deleted_while_it_is_read():
    with slow_server(0.1) as running, httpx.Client(base_url=running.url, timeout=20) as http:
        when_at_work(running, httpx.delete, f"{running.url}/v1/contexts/a")
        response = http.post("/v1/contexts", json={"name": "a", "text": TEXT})
        assert response.json()["error"]["code"] == "context_deleted"
        running.wait_until_idle()


def test_deleted_while_it_is_asked():
    with slow_server() as running, httpx.Client(base_url=running.url, timeout=20) as http:
        http.post("/v1/contexts", json={"name": "a", "text": TEXT})
        when_at_work(running, httpx.delete, f"{running.url}/v1/contexts/a")
        assert text_of(ask(http, "a", "?")) == spelled(tokens(("user", TEXT, "?")), 1)
        assert http.get("/v1/contexts").json()["data"] == []


def test_contexts_expire(server, http):
    made = http.post("/v1/contexts", json={"name": "a", "text": TEXT, "ttl_seconds": 0.2}).json()
    assert made["expires_at"] == pytest.approx(time.time() + 0.2, abs=0.3)
    http.post("/v1/contexts", json={"name": "b", "text": TEXT, "ttl_seconds": 0.2})
    http.patch("/v1/contexts/b", json={"ttl_seconds": None})
    server.wait_until(lambda: [each.name for each in server.app.contexts] == ["b"])
    assert http.get("/v1/contexts/b").json()["expires_at"] is None


def test_expiry_waits_for_answers():
    with slow_server(0.05) as running, httpx.Client(base_url=running.url, timeout=20) as http:
        http.post("/v1/contexts", json={"name": "a", "text": TEXT, "ttl_seconds": 0.05})
        assert text_of(ask(http, "a", "?")) == spelled(tokens(("user", TEXT, "?")), 1)
        running.wait_until(lambda: not list(running.app.contexts))


def test_contexts_are_saved(tmp_path):
    with serving(context_dir=tmp_path) as running, httpx.Client(base_url=running.url) as http:
        for name, pinned in (("a", True), ("b", False), ("c", False)):
            http.post("/v1/contexts", json={"name": name, "text": TEXT + name, "pinned": pinned})
        http.delete("/v1/contexts/c")
        ask(http, "b", "?")
        said = http.get("/v1/contexts/b").json()
    folder = tmp_path / "contexts"
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "a.npy", "b.json", "b.npy"]

    with serving(context_dir=tmp_path) as running, httpx.Client(base_url=running.url) as http:
        running.wait_until(lambda: len(running.engine.held) == 1)
        again = http.get("/v1/contexts/b").json()
        assert again == {**said, "blocks": []}
        assert text_of(ask(http, "b", "?")) == spelled(tokens(("user", TEXT + "b", "?")), 1)
        assert http.get("/v1/contexts/a").json()["status"] == "ready"


def damage_json(folder):
    (folder / "a.json").write_text("{")


def cut_tokens(folder):
    (folder / "a.npy").write_bytes((folder / "a.npy").read_bytes()[:-4])


def change_tokens(folder):
    tokens = np.load(folder / "a.npy")
    tokens[5] += 1
    np.save(folder / "a.npy", tokens)


def pickle_tokens(folder):
    np.save(folder / "a.npy", np.array([{"a": 1}], object), allow_pickle=True)


def rename(folder):
    (folder / "a.json").rename(folder / "c.json")


def other_tokenizer(folder):
    said = json.loads((folder / "a.json").read_text())
    (folder / "a.json").write_text(json.dumps({**said, "tokenizer": "0" * 64}))


@pytest.mark.parametrize(
    "damage",
    [damage_json, cut_tokens, change_tokens, pickle_tokens, rename, other_tokenizer],
    ids=lambda function: function.__name__,
)
def test_damaged_ones_are_skipped(tmp_path, damage, capfd):
    with serving(context_dir=tmp_path) as running:
        for name in ("a", "b"):
            httpx.post(f"{running.url}/v1/contexts", json={"name": name, "text": TEXT})
    damage(tmp_path / "contexts")
    with serving(context_dir=tmp_path) as running:
        data = httpx.get(f"{running.url}/v1/contexts").json()["data"]
        assert [each["id"] for each in data] == ["b"]
    assert "is skipped" in capfd.readouterr().err


def test_a_folder_that_cannot_be_written(tmp_path):
    folder = tmp_path / "contexts"
    folder.write_text("a file")
    with pytest.raises(UserError, match="contexts cannot be written: File exists"):
        create_app(FakeEngine(TOKENIZER), TOKENIZER, ServeOptions(("tiny",), context_dir=tmp_path))
    folder.unlink()
    with serving(context_dir=tmp_path) as running:
        folder.rmdir()
        folder.write_text("a file")
        made = httpx.post(f"{running.url}/v1/contexts", json={"name": "a", "text": TEXT})
        assert made.status_code == 201
        assert httpx.delete(f"{running.url}/v1/contexts/a").status_code == 200


def test_many_at_once(server):
    async def run():
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as http:

            async def one(index):
                made = await http.post("/v1/contexts", json={"text": f"{TEXT} {index}"})
                name = made.json()["id"]
                answers = await asyncio.gather(
                    *(
                        http.post(
                            "/v1/chat/completions",
                            json={
                                "messages": [{"role": "user", "content": f"{i}?"}],
                                "context": name,
                                "seed": 0,
                            },
                        )
                        for i in range(3)
                    )
                )
                for i, answer in enumerate(answers):
                    expected = spelled(tokens(("user", f"{TEXT} {index}", f"{i}?")))
                    assert text_of(answer) == expected
                assert (await http.delete(f"/v1/contexts/{name}")).status_code == 200

            await asyncio.gather(*map(one, range(20)))

    asyncio.run(run())
    assert list(server.app.contexts) == []


@pytest.fixture(scope="module", params=["smollm2", "llama3", "llama2"])
def real_tokenizer(request, tmp_path_factory, smollm2):
    if request.param == "smollm2":
        return Tokenizer(smollm2)
    return Tokenizer(train_tokenizer(tmp_path_factory.mktemp(request.param), request.param))


def test_real_tokenizers(real_tokenizer):
    """A question over a context has the tokens of the whole conversation."""
    text = " It's 12345 o'clock.\n\n  Na\u00efve caf\u00e9s \U0001f600\n" * 20
    engine = FakeEngine(real_tokenizer)
    with (
        serving(real_tokenizer, engine, block_tokens=256) as running,
        httpx.Client(base_url=running.url) as http,
    ):
        made = http.post("/v1/contexts", json={"name": "a", "text": text}).json()
        assert made["status"] == "ready"
        turns = [("user", "Who?"), ("assistant", "Me."), ("user", "Who?\n" + "And? " * 3)]
        for count in (1, 3):
            answer = ask(http, "a", *(said for _, said in turns[:count]), max_tokens=2)
            assert answer.status_code == 200, answer.text
            (_, first), *later = turns[:count]
            whole = [Message("user", (text, first))]
            whole += [Message(role, (said,)) for role, said in later]
            chat = real_tokenizer.chat(whole)
            token_ids, border, _ = engine.asked[-1]
            assert token_ids.tolist() == list(chat.token_ids)
            assert border == chat.starts[-1][-1]
            assert chat.starts[0][1] == made["tokens"]
        end = "Na\u00efve caf\u00e9s \U0001f600\nWho?\nYou?"
        long = [{"role": "user", "content": text * 5 + "Who?\nYou?"}]
        http.post("/v1/chat/completions", json={"messages": long, "max_tokens": 2})
        assert spelled_behind_border(engine, real_tokenizer).startswith(end)
        http.post("/v1/completions", json={"prompt": text * 5 + "Who?\nYou?", "max_tokens": 2})
        # A token that is partly in front of the border is not part of the question.
        assert spelled_behind_border(engine, real_tokenizer).strip() == end


def spelled_behind_border(engine, tokenizer):
    token_ids, border, _ = engine.asked[-1]
    return b"".join(map(tokenizer.token_bytes, token_ids[border:])).decode()


def test_a_context_that_is_deleted_is_not_pinned(server, http):
    """The body that pins it takes its time."""
    http.post("/v1/contexts", json={"name": "book", "text": TEXT})
    deleted = []

    def slowly():
        yield b'{"pinned": '
        with httpx.Client(base_url=server.url) as other:
            deleted.append(other.delete("/v1/contexts/book").status_code)
        yield b"true}"

    headers = {"Content-Type": "application/json"}
    assert http.patch("/v1/contexts/book", content=slowly(), headers=headers).status_code == 404
    assert deleted == [200]
    assert server.engine.held == []


def new_context():
    """All contexts, one of them that is being read, and the engine."""
    options = SimpleNamespace(context_dir=None, max_contexts=4)
    metrics = SimpleNamespace(readings={}, context_read=Mock())
    engine = FakeEngine(TOKENIZER)
    contexts = Contexts(SimpleNamespace(options=options, metrics=metrics, engine=engine))
    token_ids = np.arange(9, dtype=np.int32)
    return contexts, contexts.add("book", token_ids, 9, [], False, None), engine


def test_pinned_and_unpinned_at_once():
    async def change():
        contexts, book, engine = new_context()
        await book.task
        await contexts.change(book, ContextPatch(pinned=True))
        while not engine.held:
            await asyncio.sleep(0.01)
        pins = (False, True)
        await asyncio.gather(*(contexts.change(book, ContextPatch(pinned=pin)) for pin in pins))
        state = book.pinned, book.status, len(engine.held)
        await contexts.remove(book)
        return state, engine.held

    state, held = asyncio.run(change())
    assert state in ((True, "ready", 1), (True, "reading", 0))
    assert held == []


def test_pinned_while_it_is_read():
    """It is ready from then on."""

    async def change():
        contexts, book, engine = new_context()
        while book.opened is None:
            await asyncio.sleep(0)
        await contexts.change(book, ContextPatch(pinned=True))
        states = []
        while not engine.held:
            states.append(book.status)
            await asyncio.sleep(0)
        await contexts.remove(book)
        return states

    states = asyncio.run(change())
    assert states == sorted(states)
    assert states[-1] == "ready"


def test_a_context_that_is_deleted_while_it_is_pinned():
    async def pin_and_delete():
        contexts, book, _ = new_context()
        await book.task
        pinning = contexts.change(book, ContextPatch(pinned=True))
        error, _ = await asyncio.gather(pinning, contexts.remove(book), return_exceptions=True)
        return error, book.task

    error, task = asyncio.run(pin_and_delete())
    assert error.code == "context_deleted"
    assert task is None


def test_names_that_are_not_allowed_are_told_in_words(http):
    message = (
        "name: use letters, digits, '.', '_' and '-', 64 at most, of which the first is a letter "
        "or a digit"
    )
    for name in (".a", "a/b", "a" * 65):
        error = http.post("/v1/contexts", json={"name": name, "text": TEXT}).json()["error"]
        assert (error["message"], error["param"]) == (message, "name")
