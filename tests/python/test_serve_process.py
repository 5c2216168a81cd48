"""`star-attn serve` and its ranks as clients meet them: answers, and what is not read again."""

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from openai import OpenAI

from server_process import Server, save_long_model
from star_attention import LLM, SamplingParams, StarConfig
from star_attention.distributed import SingleProcess
from star_attention.engines.loader import load_engine
from star_attention.engines.options import EngineOptions
from star_attention.models.tokenizer import Message, TextStream, Tokenizer
from star_attention.runtime.leader import lead_together

BLOCK, PAGE, QUESTION = 256, 32, 256  # of tokens without lines, so many at the end are asked
OPTIONS = ("--block-size", BLOCK, "--tokens-per-block", PAGE, "--oversubscribe")
CONFIG = StarConfig(block_size=BLOCK, tokens_per_block=PAGE)
CLOSE = 1e-3
TOKENS = 12

DOCUMENT = "".join(f"{i}. The quick brown fox jumps over the lazy dog.\n" for i in range(120))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_long_model(tmp_path_factory.mktemp("long"))


@pytest.fixture(scope="module", params=[1, 2])
def server(request, model):
    with Server(model, "--ranks", request.param, *OPTIONS) as server:
        yield server.ready()


@pytest.fixture(scope="module")
def engine(model):
    return load_engine(model, SingleProcess(), PAGE, EngineOptions())


@pytest.fixture(scope="module")
def tokenizer(model):
    return Tokenizer(model)


@pytest.fixture(scope="module")
def alone(engine):
    """The greedy answer, and its log-probabilities, by an engine that has seen nothing before."""

    def answer(token_ids, border, tokens=TOKENS):
        leader, _ = lead_together(engine, SingleProcess())
        token_ids = np.array(token_ids, np.int32)
        context = leader.scheduler.add_context(token_ids[:border], CONFIG)
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, logprobs=0)
        leader.scheduler.add_question(context, token_ids[border:], params)
        leader.scheduler.release_context(context)
        answer = []
        while (new := leader.step()) is not None:
            answer += [(each.token, each.logprobs.token) for each in new]
        return [token for token, _ in answer], [logprob for _, logprob in answer]

    return answer


def check_completion(server, tokenizer, alone, tokens, cached):
    """Of tokens, whose last `QUESTION` are the question."""
    answer = server.complete(tokens, max_tokens=TOKENS, logprobs=0).json()
    right, logprobs = alone(tokens, len(tokens) - QUESTION)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == cached
    np.testing.assert_allclose(
        answer["choices"][0]["logprobs"]["token_logprobs"], logprobs, atol=CLOSE
    )
    assert answer["choices"][0]["text"] == text_of(tokenizer, right)


def text_of(tokenizer, tokens):
    stream = TextStream(tokenizer)
    return "".join(map(stream.add, tokens)) + stream.finish()


def random_tokens(seed, count):
    return np.random.default_rng(seed).integers(1, 250, count).tolist()


def part(text):
    return {"type": "text", "text": text}


def test_the_example(server, model):
    """Answers are those of the Python API."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")

    def ask(question, **options):
        message = {"role": "user", "content": [part(DOCUMENT), part(question)]}
        return client.chat.completions.create(
            model="tiny", messages=[message], temperature=0, max_tokens=TOKENS, **options
        )

    first = ask("What did the fox do?")
    pieces = ask("What did the dog do?", stream=True, stream_options={"include_usage": True})
    *pieces, last = pieces
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)

    with LLM(model, CONFIG) as llm:
        context = llm.encode(DOCUMENT)
        params = SamplingParams(max_tokens=TOKENS)
        answers = llm.ask(context, ["What did the fox do?", "What did the dog do?"], params)
        assert [first.choices[0].message.content, text] == [answer.text for answer in answers]
        assert first.usage.prompt_tokens_details.cached_tokens == 0
        assert last.usage.prompt_tokens_details.cached_tokens == context.plan.context_len


def test_the_readme(server, tmp_path, monkeypatch, capsys):
    """Its example, with another address and model."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]
    for shown, here in (("http://localhost:8000", server.url), ('"smollm2"', '"tiny"')):
        assert code.count(shown) == 1
        code = code.replace(shown, here)
    (tmp_path / "report.txt").write_text(f"A report of its own.\n{DOCUMENT[:2000]}")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    cached = re.findall(r" (\d+)\n", capsys.readouterr().out)
    assert int(cached[0]) == 0 < int(cached[-1])


def test_several_clients_at_once(server, tokenizer, alone):
    """Each gets the answer that it would get alone, over contexts of its own and shared ones."""
    prompts = [
        random_tokens(100 + index % 3, 600 + 200 * (index % 3)) + random_tokens(index, QUESTION)
        for index in range(9)
    ]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(
            pool.map(lambda p: server.complete(p, max_tokens=TOKENS, logprobs=0).json(), prompts)
        )
    for prompt, answer in zip(prompts, answers, strict=True):
        right, logprobs = alone(prompt, len(prompt) - QUESTION)
        assert answer["choices"][0]["text"] == text_of(tokenizer, right)
        np.testing.assert_allclose(
            answer["choices"][0]["logprobs"]["token_logprobs"], logprobs, atol=CLOSE
        )


def test_later_turns_of_a_conversation(server, tokenizer, alone):
    """The context stays the document until what has been said since fills a block."""
    messages = [("user", ("Of foxes.\n" + DOCUMENT, "Who jumps?"))]
    borders, cached, question = [], [], "And who else jumps over whom, and how often?" * 3

    for _ in range(8):
        chat = tokenizer.chat([Message(*message) for message in messages])
        body = {
            "messages": [
                {"role": role, "content": [*map(part, parts)]} for role, parts in messages
            ],
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": True,
        }
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
        newest = chat.starts[-1][-1]
        border = borders[-1] if borders and newest < borders[-1] + BLOCK else newest
        right, logprobs = alone(chat.token_ids, border)
        assert answer["choices"][0]["message"]["content"] == text_of(tokenizer, right)
        found = [each["logprob"] for each in answer["choices"][0]["logprobs"]["content"]]
        np.testing.assert_allclose(found, logprobs, atol=CLOSE)
        borders.append(border)
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        messages += [("assistant", ("It does.",)), ("user", (question,))]
    assert cached[0] == 0
    assert 2 < len(set(borders)) < 6
    for before, border, count in zip(borders, borders[1:], cached[1:], strict=False):
        # Of the block that is partly there, ranks keep parts.
        least = border if border == before else before // BLOCK * BLOCK
        assert least <= count <= before


def test_a_document_that_grows_or_changes(server, tokenizer, alone):
    """Only blocks that changed are read."""
    document, question = random_tokens(1, 6 * BLOCK + 100), random_tokens(2, QUESTION)
    check_completion(server, tokenizer, alone, document + question, 0)
    check_completion(server, tokenizer, alone, document + random_tokens(3, QUESTION), len(document))
    longer = document + random_tokens(4, 600)
    check_completion(server, tokenizer, alone, longer + question, 6 * BLOCK)
    edited = longer[: 3 * BLOCK + 7] + random_tokens(5, 5) + longer[3 * BLOCK + 12 :]
    check_completion(server, tokenizer, alone, edited + question, len(longer) - BLOCK)
    check_completion(server, tokenizer, alone, longer + question, len(longer))
    anchor = [251, *longer[1:]]  # which all blocks see
    check_completion(server, tokenizer, alone, anchor + question, 0)


def gaps(server, until):
    """Seconds between the tokens of an answer, as a stream tells them, until it is enough."""
    body = {"prompt": random_tokens(9, 40), "temperature": 0, "ignore_eos": True}
    body |= {"max_tokens": 30_000, "stream": True}
    found, before = [], None
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as response:
        for line in response.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                now = time.perf_counter()
                if before is not None:
                    found.append(now - before)
                    if until(found):
                        break
                before = now
    return found


def test_answers_go_on_while_a_context_is_read(server):
    """The gap between tokens is bounded by three times what it is while nothing is read; a pass
    that is not cut for answers takes a quarter of a second, or far longer."""
    server.complete(random_tokens(11, 5000), max_tokens=20)
    reader = threading.Thread(
        target=server.complete, args=(random_tokens(10, 60_000),), kwargs={"max_tokens": 1}
    )
    begins, ends = [], []

    def until(found):
        if len(found) == 100:
            reader.start()
        if len(found) > 100 and not begins and server.metric("contexts_being_read"):
            begins.append(len(found) + 1)
        if begins and not ends and not reader.is_alive():
            ends.append(len(found) - 1)
        return ends and len(found) > ends[0] + 100

    found = np.array(gaps(server, until))
    idle = np.concatenate([found[20:100], found[ends[0] + 5 :]])
    busy = found[begins[0] : ends[0]]
    assert len(busy) > 20
    assert np.percentile(busy, 90) < 4 * np.percentile(idle, 90) + 0.05
