"""`star-attn chat` at a terminal and through a pipe, and the conversation below it."""

import asyncio
import fcntl
import os
import pty
import re
import subprocess
import sys
import termios
import threading
import time

import pytest

from fake_engine import FakeEngine, spelled
from fake_tokenizer import ByteTokenizer
from star_attention import SamplingParams, UserError
from star_attention.cli.event_loop import EventLoop
from star_attention.distributed.launch import mpirun_command
from star_attention.serve.conversation import Conversation, File
from star_attention.serve.engine import EngineLostError
from star_attention.serve.front import Front
from star_attention.serve.options import ServeOptions
from test_cli import check_refusal, star_attn
from test_llm import QUESTION, TEXT

CHAT = ["chat", "--tokens-per-block", "32", "--block-size", "128", "--max-tokens", "16", "--model"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "report.txt"
    path.write_text(TEXT)
    return path


class Terminal:
    """A program at a terminal of its own."""

    def __init__(self, *command, code="", **environment):
        self._master, slave = pty.openpty()
        program = ["-c", code] if code else ["-m", "star_attention"]
        self.process = subprocess.Popen(
            [sys.executable, *program, *map(str, command)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm", **environment},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self._shown, self._seen = b"", 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        while True:
            try:
                self._shown += os.read(self._master, 65536)
            except OSError:
                return

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait(30)
        self._reader.join(10)
        os.close(self._master)

    def type(self, text):
        os.write(self._master, text.encode())

    def wait_for(self, pattern, seconds=90):
        """What is shown up to a pattern, since the last one."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern.encode(), self._shown[self._seen :])):
            assert time.monotonic() < end, self._shown.decode(errors="replace")
            assert self.process.poll() is None, self._shown.decode(errors="replace")
            time.sleep(0.02)
        begin, self._seen = self._seen, self._seen + found.end()
        return self._shown[begin : self._seen].decode(errors="replace")

    def end(self):
        return self.process.wait(30)


PROMPT = "> "


def test_at_a_terminal(report, smollm2_folder, tmp_path):
    state = {"XDG_STATE_HOME": str(tmp_path)}
    command = [*CHAT, smollm2_folder, "--context-file", report]
    with Terminal(*command, **state) as chat:
        shown = chat.wait_for(PROMPT)
        assert "report.txt" in shown
        assert "of context in 2 blocks on 1 rank" in shown
        chat.type(f"{QUESTION}\n")
        assert "Tomasz" in chat.wait_for(f"{PROMPT}$")
        chat.type("/st\t\n")
        assert "tokens/s" in chat.wait_for(f"{PROMPT}$")
        chat.type("/help\n")
        assert "/clear" in chat.wait_for(f"{PROMPT}$")
        chat.type("half a line\x03")
        chat.wait_for(f"{PROMPT}$")
        chat.type("\x04")
        assert chat.end() == 0
    history = tmp_path / "star_attention" / "chat_history"
    assert QUESTION in history.read_text()
    assert "half" not in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600
    with Terminal(*command, **state) as chat:
        chat.wait_for(PROMPT)
        chat.type("\x1b[A" * 3 + "\n")  # the third line from the end, the question
        assert "Tomasz" in chat.wait_for(f"{PROMPT}$")
        chat.type("/exit\n")
        assert chat.end() == 0


def test_without_readline(tiny_chat_model, tmp_path):
    code = (
        "import sys; sys.modules['readline'] = None\n"
        "from star_attention.cli import main; main.main()"
    )
    environment = {"XDG_STATE_HOME": str(tmp_path)}
    with Terminal(*CHAT, tiny_chat_model, code=code, **environment) as chat:
        chat.wait_for(PROMPT)
        chat.type("/help\n")
        assert "/clear" in chat.wait_for(f"{PROMPT}$")
        chat.type("\x04")
        assert chat.end() == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_interrupt_ends_the_answer_and_not_the_program(tiny_chat_model, ranks):
    options = ["--ranks", ranks, "--oversubscribe", "--max-tokens", 1500]
    with Terminal(*CHAT, tiny_chat_model, *options, "--repetition-penalty", 2) as chat:
        chat.wait_for(PROMPT)
        chat.type("How are you?\n")
        chat.wait_for(r"How are you\?\r\n.*\S+")
        chat.type("\x03")
        chat.wait_for(f"{PROMPT}$", 30)
        chat.type("/stats\n")
        shown = chat.wait_for(f"{PROMPT}$")
        assert 0 < int(re.search(r"answer +([\d,]+) token", shown)[1].replace(",", "")) < 1500
        chat.type("\x04")
        assert chat.end() == 0


def test_through_a_pipe(report, smollm2_folder):
    lines = f"{QUESTION}\n\nSay his name again.\n/clear\n/nothing\n"
    command = [*CHAT, smollm2_folder, "--context-file", report, "--ranks", 2, "--oversubscribe"]
    run = star_attn(*command, input=lines)
    assert run.returncode == 0, run.stderr
    first, second = run.stdout.splitlines()
    assert "Tomasz" in first
    assert "Tomasz" in second
    assert run.stderr == "star-attn: there is no command /nothing: /help lists them\n"


def test_under_mpirun(report, smollm2_folder):
    """Open MPI does not pass the end of its input on: /exit leaves."""
    chat = [*CHAT, smollm2_folder, "--context-file", report]
    command = [*mpirun_command(2, oversubscribe=True), sys.executable, "-m", "star_attention"]
    run = subprocess.run(
        list(map(str, [*command, *chat])),
        input=f"{QUESTION}\n/exit\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "Tomasz" in run.stdout


def test_what_does_not_fit(tmp_path, tiny_chat_model):
    """Of files, before anything is asked; of questions, which are told and passed over."""
    (tmp_path / "long").write_text(TEXT * 9)
    command = [*CHAT, tiny_chat_model, "--kv-cache-gib", 0.0006]
    run = star_attn(*command, "--context-file", tmp_path / "long", input="Hi\n")
    check_refusal(run, "tokens of KV cache on a rank, there is room for")
    run = star_attn(*command, input="why " * 2500 + "\nHi\n")
    assert run.returncode == 1, run.stderr
    assert run.stderr.startswith("star-attn: error: the prompt has")
    assert run.stderr.count("\n") == 1
    assert len(run.stdout.strip()) > 3


def test_what_was_read_is_there_the_next_time(report, tiny_chat_model, tmp_path):
    command = [*CHAT, tiny_chat_model, "--context-file", report, "--context-dir", tmp_path / "kept"]
    cached = [
        re.search(r"([\d,]+) of them cached", star_attn(*command, input="/context\n").stdout)[1]
        for _ in range(2)
    ]
    assert cached[0] == "0"
    assert cached[1] != "0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--context-file -", "--context-file - is where the questions come from: name a file"),
        ("--context-file /nothing", "--context-file /nothing cannot be read: No such file"),
        ("--template none", "chat needs a chat template, which is not used here: use star-attn"),
        ("--block-size 100", "block size 100 is not a multiple"),
        ("--top-k 5", "--top-k does nothing with --temperature 0"),
        ("--system \udcff", "--system is not UTF-8 text"),
    ],
)
def test_bad_options(tiny_chat_model, options, message):
    check_refusal(star_attn(*CHAT, tiny_chat_model, *options.split(), input="Hi\n"), message)


def test_ranks_that_refuse_the_model(tiny_chat_model, tmp_path):
    run = star_attn(*CHAT, tiny_chat_model, "--kv-cache-gib", 1e-6, input="Hi\n")
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1, run.stderr
    assert run.stdout == ""


# The conversation, over an engine without a model


TOKENIZER = ByteTokenizer()


def conversation(engine=None, files=(), max_tokens=100, **options):
    engine = engine or FakeEngine(TOKENIZER)
    front = Front(engine, TOKENIZER, ServeOptions(("tiny",), block_tokens=128, max_tokens=200))
    params = SamplingParams(max_tokens=max_tokens)
    return engine, Conversation(front, params, files, **options)


def answer(talk, text):
    async def collect():
        return "".join([piece async for piece in talk.ask(text)])

    return asyncio.run(collect())


def asked(engine):
    """The text of the last question's context, and of the question."""
    token_ids, border, _ = engine.asked[-1]
    return TOKENIZER.decode(token_ids[:border]), TOKENIZER.decode(token_ids[border:])


FILES = [File("a", "The first file.\n"), File("b", "The second.")]


def test_files_are_the_context_and_turns_follow():
    engine, talk = conversation(files=FILES)
    first = answer(talk, "What is it?")
    assert first == spelled(engine.asked[-1][0])
    context, question = asked(engine)
    assert context == "user\nThe first file.\nThe second.\n"
    assert question == "What is it?assistant\n"
    answer(talk, "And now?")
    context, question = asked(engine)
    assert context.startswith("user\nThe first file.\nThe second.\nWhat is it?assistant\n" + first)
    assert question == "And now?assistant\n"
    assert talk.turns == 2
    talk.clear()
    answer(talk, "And now?")
    assert "What is it?" not in "".join(asked(engine))


def test_without_files():
    engine, talk = conversation(system="Be brief.")
    answer(talk, "Hello")
    assert asked(engine) == ("system\nBe brief.user\n", "Helloassistant\n")


def test_a_system_message_stands_before_the_files():
    engine, talk = conversation(files=FILES, system="Be brief.")
    answer(talk, "Hello")
    assert asked(engine)[0].startswith("system\nBe brief.user\nThe first file.")


def test_file_tokens():
    assert conversation(files=FILES)[1].file_tokens() == [16, 11]


def test_an_answer_that_is_ended_early_is_a_turn():
    engine, talk = conversation(FakeEngine(TOKENIZER, step=0.001))

    async def some():
        pieces = talk.ask("Hello")
        text = await anext(pieces) + await anext(pieces)
        await pieces.aclose()
        return text

    text = asyncio.run(some())
    assert engine.open == 0
    assert talk.turns == 1
    answer(talk, "Go on")
    assert asked(engine)[0].endswith(f"Helloassistant\n{text}user\n")


def test_what_cannot_be_asked():
    engine, talk = conversation(FakeEngine(TOKENIZER, max_tokens=100), files=FILES)
    with pytest.raises(UserError, match="prompt and answer may have 100 tokens together"):
        answer(talk, "x" * 200)
    assert talk.turns == 0
    engine.lose()
    with pytest.raises(UserError, match="the engine is starting"):
        answer(talk, "Hello")


def test_stop_strings():
    _, talk = conversation()
    talk._params = SamplingParams(max_tokens=100, stop=" seed")
    assert re.fullmatch("[0-9a-f]{16}", answer(talk, "Hello"))


def test_event_loop():
    loop, closed = EventLoop(), []

    async def count():
        try:
            for number in range(1000):
                yield number
                await asyncio.sleep(0)
        finally:
            closed.append(True)

    async def fail():
        yield 1
        raise EngineLostError("gone")

    with loop.iterate(count()) as numbers:
        assert next(numbers) == 0
    assert closed == [True]
    with pytest.raises(EngineLostError, match="gone"), loop.iterate(fail()) as numbers:
        list(numbers)
    with loop.iterate(count()) as numbers:
        assert list(numbers) == list(range(1000))
    loop.close()
