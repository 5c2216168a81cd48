"""Many clients at once, some of whom leave: every answer is to its own question."""

import asyncio
import json
import random

import httpx

from fake_engine import FakeEngine, spelled
from fake_tokenizer import ByteTokenizer
from serving import serving
from star_attention.models.tokenizer import Message

CLIENTS = 200
TOKENIZER = ByteTokenizer()


async def ask(http, index, chance):
    """What came, or None if this client left; and what is right."""
    context, question = f"Text number {index % 20}. " * 10, f"Question {index}?"
    kind = chance.choice(["chat", "stream", "completion", "named"])
    leaves = chance.random() < 0.4
    seed = chance.randrange(1000)
    turn = Message("user", (context, question))
    right = spelled(TOKENIZER.chat([turn]).token_ids, seed)
    content = [{"type": "text", "text": text} for text in turn.parts]
    body = {"messages": [{"role": "user", "content": content}], "seed": seed}
    path = "/v1/chat/completions"
    if kind == "completion":
        body, path = {"prompt": context + question, "seed": seed}, "/v1/completions"
        right = spelled(TOKENIZER.text_tokens(context + question), seed)
    elif kind == "named":
        made = await http.post("/v1/contexts", json={"text": context, "ttl_seconds": 100})
        name = made.json()["id"]
        body = {"messages": [{"role": "user", "content": question}], "seed": seed, "context": name}
    try:
        if kind == "stream":
            came = await read_stream(http, path, body, chance.randrange(20) if leaves else None)
        else:
            timeout = chance.uniform(0.01, 0.3) if leaves else 60
            answer = await http.post(path, json=body, timeout=timeout)
            assert answer.status_code == 200, answer.text
            choice = answer.json()["choices"][0]
            came = choice["text"] if kind == "completion" else choice["message"]["content"]
    except httpx.TimeoutException:
        assert leaves
        came = None
    if kind == "named":
        assert (await http.delete(f"/v1/contexts/{name}")).status_code == 200
    return came, right


async def read_stream(http, path, body, leaves_after):
    text = ""
    async with http.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        count = 0
        async for line in response.aiter_lines():
            if count == leaves_after:
                return None
            count += 1
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    text += choice["delta"].get("content", "")
    assert line == "data: [DONE]" or not line
    return text


def test_answers_do_not_cross():
    engine = FakeEngine(TOKENIZER, step=0.005)
    with serving(TOKENIZER, engine, max_queue=CLIENTS, max_contexts=CLIENTS) as running:

        async def run():
            limits = httpx.Limits(max_connections=CLIENTS)
            async with httpx.AsyncClient(base_url=running.url, timeout=60, limits=limits) as http:
                chances = [random.Random(index) for index in range(CLIENTS)]
                return await asyncio.gather(
                    *(ask(http, index, chance) for index, chance in enumerate(chances))
                )

        results = asyncio.run(run())
        came = [(text, right) for text, right in results if text is not None]
        assert all(text == right for text, right in came)
        assert CLIENTS / 2 < len(came) < CLIENTS
        assert engine.most_open > 20
        running.wait_until_idle()
        assert list(running.app.contexts) == []
        metrics = httpx.get(f"{running.url}/metrics").text
        for name in ("num_requests_running", "num_requests_waiting", "contexts_being_read"):
            assert f"star_attention:{name} 0.0" in metrics


def test_the_engine_is_lost_under_load():
    """Everyone is told something, and afterwards all is as before."""
    engine = FakeEngine(TOKENIZER, step=0.02)  # no answer is over when it is lost
    with serving(TOKENIZER, engine) as running:

        async def one(http, index):
            question = f"Question {index}?"
            body = {"messages": [{"role": "user", "content": question}], "seed": 0}
            answer = await http.post("/v1/chat/completions", json=body)
            if answer.status_code == 503:
                return False
            right = spelled(TOKENIZER.chat([Message("user", (question,))]).token_ids)
            assert answer.json()["choices"][0]["message"]["content"] == right
            return True

        async def run():
            async with httpx.AsyncClient(base_url=running.url, timeout=60) as http:
                asked = [asyncio.create_task(one(http, index)) for index in range(80)]
                await asyncio.sleep(0.4)
                await asyncio.to_thread(running.call, engine.lose)
                lost = await asyncio.gather(*asked)
                await asyncio.to_thread(running.call, engine.restart)
                return lost, await asyncio.gather(*(one(http, index) for index in range(80)))

        lost, after = asyncio.run(run())
        assert not all(lost)
        assert all(after)
        running.wait_until_idle()
