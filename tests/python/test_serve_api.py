"""The API as OpenAI's own client sees it."""

import asyncio
import json

import httpx
import numpy as np
import openai
import pytest

from fake_engine import FakeEngine, spelled
from fake_tokenizer import ByteTokenizer
from serving import serving
from star_attention.models.tokenizer import Message
from star_attention.serve.messages import BlockPlace

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running
        running.wait_until_idle()


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        yield client


def chat_tokens(*turns):
    return TOKENIZER.chat(
        [Message(role, tuple(parts)) for role, *parts in turns]
    ).token_ids.tolist()


def tokens_of(text):
    return TOKENIZER.text_tokens(text).tolist()


def user(text):
    return [{"role": "user", "content": text}]


def test_chat(client):
    answer = client.chat.completions.create(model="tiny", messages=user("Who?"), seed=7)
    tokens = chat_tokens(("user", "Who?"))
    assert answer.choices[0].message.content == spelled(tokens, 7)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == len(tokens)
    assert answer.usage.completion_tokens == len(spelled(tokens, 7)) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_chat_streamed(client):
    create = client.chat.completions.create
    options = {"model": "alias", "messages": user("Who?"), "seed": 7}
    whole = create(**options)
    chunks = list(create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_asynchronous_client(server):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-") as client:
            stream = await client.chat.completions.create(
                model="tiny", messages=user("Who?"), seed=1, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(ask()) == spelled(chat_tokens(("user", "Who?")), 1)


def test_several_answers(client):
    options = {"model": "tiny", "messages": user("Who?"), "seed": 5, "n": 3}
    expected = [spelled(chat_tokens(("user", "Who?")), 5 + i) for i in range(3)]
    whole = client.chat.completions.create(**options)
    assert [choice.message.content for choice in whole.choices] == expected
    texts = [""] * 3
    for chunk in client.chat.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == expected


def test_random_seeds_differ(client):
    texts = [
        client.chat.completions.create(model="tiny", messages=user("?")).choices[0].message.content
        for _ in range(2)
    ]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("stop", [" seed", ["never", " seed"]])
def test_stop_strings(server, client, stop):
    options = {"model": "tiny", "messages": user("Who?"), "seed": 5, "stop": stop}
    expected = spelled(chat_tokens(("user", "Who?")), 5).partition(" seed")[0]
    answer = client.chat.completions.create(**options)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(expected + " seed")
    chunks = client.chat.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    server.wait_until_idle()


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens(client, name):
    answer = client.chat.completions.create(model="tiny", messages=user("Who?"), **{name: 3})
    assert answer.choices[0].finish_reason == "length"
    assert len(answer.choices[0].message.content) == answer.usage.completion_tokens == 3


def test_logprobs(client):
    options = {"model": "tiny", "messages": user("Who?"), "logprobs": True, "max_tokens": 4}
    answer = client.chat.completions.create(**options, top_logprobs=2, seed=0)
    choice = answer.choices[0]
    assert "".join(each.token for each in choice.logprobs.content) == choice.message.content
    first = choice.logprobs.content[0]
    assert (first.logprob, bytes(first.bytes)) == (-0.25, first.token.encode())
    assert [each.logprob for each in first.top_logprobs] == [-0.25, -9999.0]
    plain = client.chat.completions.create(**options)
    assert plain.choices[0].logprobs.content[0].top_logprobs == []
    streamed = []
    for chunk in client.chat.completions.create(**options, seed=0, stream=True):
        if chunk.choices and chunk.choices[0].logprobs:
            streamed += [each.token for each in chunk.choices[0].logprobs.content]
    assert "".join(streamed) == choice.message.content


def test_completion_logprobs(client):
    options = {"model": "tiny", "prompt": "Once", "max_tokens": 4, "seed": 0}
    choice = client.completions.create(**options, logprobs=1).choices[0]
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset == [0, 1, 2, 3]
    assert choice.logprobs.token_logprobs == [-0.25] * 4
    assert choice.logprobs.top_logprobs[0] == {choice.text[0]: -0.25}
    offsets = []
    for chunk in client.completions.create(**options, logprobs=1, stream=True):
        offsets += chunk.choices[0].logprobs.text_offset
    assert offsets == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("Once", ["Once"]),
        (["Once", "Twice"], ["Once", "Twice"]),
        (tokens_of("Once"), ["Once"]),
        ([tokens_of("Once"), tokens_of("Twice")], ["Once", "Twice"]),
    ],
)
def test_completions(client, prompt, texts):
    options = {"model": "tiny", "prompt": prompt, "seed": 2, "n": 2}
    expected = [spelled(TOKENIZER.text_tokens(text), 2 + i) for text in texts for i in range(2)]
    whole = client.completions.create(**options)
    assert [choice.text for choice in whole.choices] == expected
    assert whole.usage.prompt_tokens == sum(len(TOKENIZER.text_tokens(text)) for text in texts)
    streamed = [""] * len(expected)
    for chunk in client.completions.create(**options, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == expected


def test_cached_tokens(server, client):
    text = "a long text, " * 20
    content = [{"type": "text", "text": text}, {"type": "text", "text": "What is it?"}]
    answers = [
        client.chat.completions.create(model="tiny", messages=user(content), n=2) for _ in range(2)
    ]
    first, second = (answer.usage.prompt_tokens_details.cached_tokens for answer in answers)
    assert (first, second) == (0, server.engine.asked[-1][1])


def test_progress(client):
    text = "a text of a few blocks, " * 20
    content = [{"type": "text", "text": text}, {"type": "text", "text": "What is it?"}]
    stream = client.chat.completions.create(
        model="tiny",
        messages=user(content),
        stream=True,
        extra_body={"stream_options": {"include_progress": True}},
    )
    said = [chunk.star_attention for chunk in stream if hasattr(chunk, "star_attention")]
    assert said[0]["done"] == [0.0] * len(said[0]["blocks"])
    assert said[-1]["done"] == [1.0] * len(said[0]["blocks"])
    assert set(said[0]["blocks"][0]) == set(BlockPlace.__dataclass_fields__)


MARK = {"cache_control": {"type": "ephemeral"}}


@pytest.mark.parametrize(
    ("messages", "question"),
    [
        (user("Who?"), "Who?"),
        ([{"role": "system", "content": "Be short."}, *user("Who?")], "Who?"),
        (user([{"type": "text", "text": "ctx"}, {"type": "text", "text": "Who?"}]), "Who?"),
        ([*user("a"), {"role": "assistant", "content": "b"}, *user("Who?")], "Who?"),
        (
            user(
                [
                    {"type": "text", "text": "ctx", **MARK},
                    {"type": "text", "text": "more"},
                    {"type": "text", "text": "Who?"},
                ]
            ),
            "more\nWho?",
        ),
        (user("x" * 100 + "\n\n" + "y" * 100 + "\nand who?"), "y" * 100 + "\nand who?"),
        (user("x" * 100 + "\r\n \r\n" + "y" * 60 + "\nWho?\n\n \n"), "y" * 60 + "\nWho?"),
        (user("x" * 100 + "\n" + "y" * 60 + "\nWho?"), "Who?"),
        (user("x" * 100 + "\n\n" + "y" * 200 + "\nWho?"), "Who?"),
        (user("\n\n" + "x" * 400), None),
        (user([{"type": "text", "text": "x" * 400, **MARK}]), None),
    ],
)
def test_borders(server, client, messages, question):
    client.chat.completions.create(model="tiny", messages=messages)
    token_ids, border, _ = server.engine.asked[-1]
    assert token_ids.dtype == np.int32
    behind = TOKENIZER.decode(token_ids[border:])
    if question is None:
        assert len(token_ids) - border == 256
    else:
        assert behind.removesuffix("assistant\n") == question


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("x" * 200 + "\n\nWho \u00e9?\nNow.", "Who \u00e9?\nNow."),
        ("x" * 200 + "\nWho?", "Who?"),
        ("x" * 300, "x" * 256),
        ("short", "short"),
        (tokens_of("x" * 300), "x" * 256),
    ],
)
def test_borders_of_completions(server, client, prompt, question):
    client.completions.create(model="tiny", prompt=prompt)
    token_ids, border, _ = server.engine.asked[-1]
    assert TOKENIZER.decode(token_ids[border:]) == question


def test_sampling_parameters(server, client):
    ask = client.chat.completions.create
    ask(model="tiny", messages=user("?"))
    params = server.engine.asked[-1][2]
    assert (params.temperature, params.top_p, params.top_k, params.stop) == (1.0, 1.0, 0, ())
    assert params.max_tokens == 1024
    ask(
        model="tiny",
        messages=user("?"),
        temperature=1e-9,
        top_p=0.5,
        seed=-1,
        extra_body={"top_k": -1},
        user="me",
        store=True,
        metadata={"a": "b"},
    )
    params = server.engine.asked[-1][2]
    assert (params.temperature, params.top_p, params.top_k) == (0.0, 0.5, 0)
    assert params.seed == 2**63 - 1
    assert not params.has_penalties
    ask(
        model="tiny",
        messages=user("?"),
        presence_penalty=-0.5,
        frequency_penalty=2,
        extra_body={"min_p": 0.1, "repetition_penalty": 1.2},
    )
    params = server.engine.asked[-1][2]
    assert (params.presence_penalty, params.frequency_penalty) == (-0.5, 2)
    assert (params.min_p, params.repetition_penalty) == (0.1, 1.2)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("alias").max_model_len == 4096
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


UNSUPPORTED = [
    {"logit_bias": {"5": 1}},
    {"tools": [{"type": "function"}]},
    {"response_format": {"type": "json_object"}},
    {"audio": {"voice": "x"}},
    {"modalities": ["text", "audio"]},
    {"echo": True},
]
WRONG = [
    {"n": 0},
    {"n": 17},
    {"temperature": -1},
    {"top_p": 0},
    {"min_p": 1.5},
    {"repetition_penalty": 0},
    {"presence_penalty": 2.5},
    {"frequency_penalty": -3},
    {"max_tokens": 0},
    {"max_tokens": 5000},
    {"stop": ["a"] * 17},
    {"stop": [""]},
    {"seed": 2**64},
    {"top_logprobs": 3},
    {"logprobs": True, "top_logprobs": 21},
    {"stream_options": {"include_usage": True}},
    {"messages": []},
    {"messages": user([{"type": "image_url", "image_url": {"url": "data:"}}])},
    {"messages": [{"role": "tool", "content": "x"}]},
    {"messages": user("")},
    {"messages": user("x" * 5000)},
    {"context": 5},
]


@pytest.mark.parametrize("wrong", UNSUPPORTED + WRONG, ids=str)
def test_wrong_parameters(server, client, wrong):
    body = {"model": "tiny", "messages": user("Who?"), **wrong}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]
    assert len(error["message"]) < 200
    if wrong in UNSUPPORTED:
        assert error["param"] in wrong


def test_too_long(client):
    with pytest.raises(openai.BadRequestError, match=r"5\d\d\d tokens.*4096") as caught:
        client.chat.completions.create(model="tiny", messages=user("x" * 5000))
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("wrong", [{"suffix": "x"}, {"best_of": 3}, {"echo": True}, {"prompt": []}])
def test_wrong_completions(client, wrong):
    with pytest.raises(openai.BadRequestError):
        client.completions.create(**{"model": "tiny", "prompt": "Once", **wrong})


def test_unknown_model(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=user("Who?"))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405), ("PUT", "/health", 405)],
)
def test_unknown_paths(server, method, path, status):
    response = httpx.request(method, server.url + path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_tokenize(server):
    tokenize = f"{server.url}/tokenize"
    answer = httpx.post(tokenize, json={"prompt": "ab", "return_token_strs": True}).json()
    assert answer == {
        "count": 3,
        "max_model_len": 4096,
        "tokens": [256, 97, 98],
        "token_strs": ["<256>", "a", "b"],
    }
    plain = httpx.post(tokenize, json={"prompt": "ab", "add_special_tokens": False}).json()
    assert plain["tokens"] == [97, 98]
    chat = httpx.post(tokenize, json={"messages": user("Who?")}).json()
    assert chat["tokens"] == chat_tokens(("user", "Who?"))
    text = httpx.post(f"{server.url}/detokenize", json={"tokens": chat["tokens"]}).json()
    assert text == {"prompt": TOKENIZER.decode(chat["tokens"])}
    wrong = httpx.post(f"{server.url}/detokenize", json={"tokens": [259]})
    assert wrong.status_code == 400


def test_events_are_server_sent(server):
    body = {"messages": user("Who?"), "stream": True, "max_tokens": 2}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")
    for event in response.text.split("\n\n")[:-2]:
        json.loads(event.removeprefix("data: "))


def test_openapi(server):
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    schema = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    assert "messages" in schema["schema"]["properties"]
    assert "$ref" not in json.dumps(paths["/v1/contexts"])


def test_metrics(server, client):
    client.chat.completions.create(model="tiny", messages=user("Who?"))
    lines = httpx.get(f"{server.url}/metrics").text
    for name in (
        "num_requests_running 0.0",
        "num_requests_waiting 0.0",
        "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_count",
        "e2e_request_latency_seconds_count",
        "context_read_seconds_count",
        "prompt_tokens_total",
        "cached_prompt_tokens_total",
        "generation_tokens_total",
        'request_success_total{finished_reason="stop"}',
        "requests_aborted_total",
        "kv_cache_usage_perc 0.25",
        'cached_blocks{tier="gpu"}',
        'cached_bytes{tier="gpu"}',
        "engine_restarts_total 0.0",
        'http_requests_total{method="POST",path="/v1/chat/completions",status="200"}',
    ):
        assert f"star_attention:{name}" in lines


def test_engine_refuses():
    tokenizer = ByteTokenizer()
    engine = FakeEngine(tokenizer)
    engine.refuses = "the context does not fit"
    with serving(tokenizer, engine) as running:
        for stream in (False, True):
            body = {"messages": user("Who?"), "stream": stream}
            response = httpx.post(f"{running.url}/v1/chat/completions", json=body)
            assert response.status_code == 400
            assert response.json()["error"]["message"] == "the context does not fit"
        running.wait_until_idle()


def test_engine_is_not_there():
    tokenizer = ByteTokenizer()
    engine = FakeEngine(tokenizer, state="starting")
    engine.reason, engine.model = "loading the model", None
    with serving(tokenizer, engine) as running:
        response = httpx.get(f"{running.url}/health")
        assert response.status_code == 503
        assert response.json() == {"status": "starting", "reason": "loading the model"}
        response = httpx.post(f"{running.url}/v1/chat/completions", json={"messages": user("?")})
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        assert "loading the model" in response.json()["error"]["message"]


def test_engine_is_lost_in_a_stream():
    tokenizer = ByteTokenizer()
    engine = FakeEngine(tokenizer, step=0.05)
    with (
        serving(tokenizer, engine) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="-", max_retries=0) as client,
    ):
        stream = client.chat.completions.create(model="tiny", messages=user("?"), stream=True)
        next(stream)
        running.call(engine.lose)
        with pytest.raises(openai.APIError, match="a rank was lost"):
            list(stream)
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="tiny", messages=user("?"))
        assert caught.value.status_code == 503
        running.call(engine.restart)
        client.chat.completions.create(model="tiny", messages=user("?"))
        running.wait_until_idle()


def test_draining():
    tokenizer = ByteTokenizer()
    engine = FakeEngine(tokenizer, step=0.02)
    with (
        serving(tokenizer, engine) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="-", max_retries=0) as client,
    ):
        stream = client.chat.completions.create(
            model="tiny", messages=user("?"), stream=True, seed=0
        )
        first = next(stream)
        running.call(running.app.drain)
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            client.chat.completions.create(model="tiny", messages=user("?"))
        assert httpx.get(f"{running.url}/health").json()["status"] == "draining"
        text = "".join(chunk.choices[0].delta.content or "" for chunk in [first, *stream])
        assert text == spelled(chat_tokens(("user", "?")))
