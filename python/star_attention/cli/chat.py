"""`star-attn chat`."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from star_attention.cli import terminal
from star_attention.cli.event_loop import EventLoop
from star_attention.cli.front import engine_maker, run_with_ranks
from star_attention.cli.lines import are_typed, lines
from star_attention.cli.options import (
    check_run,
    check_sampling,
    check_text,
    engine_options,
    model_options,
    run_options,
    sampling_of,
    sampling_options,
    take_model,
)
from star_attention.cli.ranks import check_ranks
from star_attention.cli.texts import read_texts
from star_attention.errors import RankError, UserError, counted, say
from star_attention.models.checkpoint import find_model

if TYPE_CHECKING:
    from star_attention.serve.conversation import Conversation
    from star_attention.serve.front import Front

_LOOK_SECONDS = 0.05
_STOP_SECONDS = 60.0  # in which what was read is saved
# Of the server's options, those that a conversation of one has no use for.
_AS_THE_SERVER = {
    "host_cache_gib": 0.0,
    "disk_cache_gib": 64.0,
    "max_gap": None,
    "restarts": 3,
    "stuck_timeout": 12.0,
}


@click.command()
@model_options
@click.option(
    "--context-file",
    "context_files",
    multiple=True,
    help="Text to talk about. Several are read one after the other.",
)
@click.option("--system", help="The system message.")
@click.option(
    "--context-dir",
    type=click.Path(file_okay=False),
    help="Where what is read is kept, for the next time.",
)
@run_options
@engine_options
@functools.partial(sampling_options, max_tokens=1024)
def chat(**options: Any) -> int:
    """Talk about long texts: they are read once, and answers remember the turns before.

    Without a terminal, each line of standard input is a question, and only answers are printed.
    """
    take_model(options)
    check_ranks(options["ranks"], options["tp"])
    check_run(options)
    check_sampling(options)
    check_text("--system", options["system"] or "")
    if "-" in options["context_files"]:
        raise UserError("--context-file - is where the questions come from: name a file")
    return run_with_ranks({**_AS_THE_SERVER, **options}, lambda: _run_front(options))


def _run_front(options: dict[str, Any]) -> int:
    from star_attention.models.tokenizer import Tokenizer
    from star_attention.serve.conversation import Conversation, File
    from star_attention.serve.division import DENSE_TOKENS
    from star_attention.serve.front import Front
    from star_attention.serve.options import ServeOptions

    path = find_model(options["model"], options["load_format"] != "dummy")
    names = options["context_files"]
    files = list(map(File, names, read_texts("--context-file", names)))
    tokenizer = Tokenizer(path, options["template"], allow_special=options["allow_special"])
    if not tokenizer.uses_chat:
        raise UserError("chat needs a chat template, which is not used here: use star-attn ask")
    codes: list[int] = []
    engine = engine_maker({**_AS_THE_SERVER, **options}, tokenizer)(codes.append)
    params = sampling_of(options)
    front = Front(
        engine,
        tokenizer,
        ServeOptions(
            (options["model"],),
            block_tokens=options["block_size"] or DENSE_TOKENS,
            max_tokens=params.max_tokens,
        ),
    )
    loop = EventLoop()
    try:
        loop.run(engine.start())
        conversation = Conversation(front, params, files, options["system"])
        with _status("loading the model"):
            while engine.state == "starting":
                time.sleep(_LOOK_SECONDS)
        if engine.state == "lost":
            return codes[0] if codes else 1  # the ranks said why
        return _Chat(front, conversation, loop).run()
    finally:
        loop.run(engine.stop(_STOP_SECONDS))
        loop.close()
        front.close()


@contextlib.contextmanager
def _status(what: str) -> Iterator[None]:
    if not terminal.is_interactive():
        yield
        return
    with Console(stderr=True).status(what):
        yield


class _Chat:
    """Reads questions and commands, and writes answers."""

    def __init__(self, front: Front, conversation: Conversation, loop: EventLoop) -> None:
        self._front, self._conversation, self._loop = front, conversation, loop
        self._console = Console(highlight=False)
        self._has_failed = False
        self._commands: dict[str, tuple[Callable[[], None], str]] = {
            "/context": (self._print_context, "what is read, how it is divided, what was cached"),
            "/stats": (self._print_stats, "what the last answer took, and what the ranks hold"),
            "/clear": (self._clear, "forget the turns; what was read stays"),
            "/help": (self._print_help, "this"),
            "/exit": (lambda: None, "leave; so does Ctrl-D. Ctrl-C ends an answer"),
        }

    def run(self) -> int:
        """Until nothing more comes. The exit code: where nobody looks, 1 if an answer failed.

        Raises:
            UserError: the files do not fit.
            RankError: the ranks were lost while they read them.
        """
        if self._conversation.files:
            self._read()
        for line in lines(self._commands):
            if line == "/exit":
                break
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._answer(line)
        return int(self._has_failed and not are_typed())

    def _read(self) -> None:
        from star_attention.serve.engine import EngineLostError, EngineRefusalError

        reading = self._loop.iterate(self._conversation.read())
        try:
            with terminal.progress(True) as on_progress, reading as shares:
                for share in shares:
                    on_progress(share)
        except EngineRefusalError as error:
            raise UserError(str(error)) from None
        except EngineLostError as error:
            raise RankError(str(error)) from None
        if are_typed():
            self._print_context()

    def _command(self, line: str) -> None:
        if line in self._commands:
            self._commands[line][0]()
        else:
            say(f"there is no command {line.split()[0]}: /help lists them")

    def _answer(self, question: str) -> None:
        with self._failures_are_told(), self._loop.iterate(self._conversation.ask(question)) as new:
            try:
                for text in new:
                    click.echo(text, nl=False)
            except KeyboardInterrupt:
                click.echo(" ...", nl=False)
            click.echo()

    @contextlib.contextmanager
    def _failures_are_told(self) -> Iterator[None]:
        from star_attention.serve.engine import EngineLostError, EngineRefusalError

        try:
            yield
        except (UserError, EngineRefusalError, EngineLostError) as error:
            self._has_failed = True
            say(f"error: {error}")

    def _clear(self) -> None:
        self._conversation.clear()

    def _print_help(self) -> None:
        table = terminal.small_table("command", "what it does")
        for name, (_, what) in self._commands.items():
            table.add_row(name, what)
        self._console.print(table)

    def _print_context(self) -> None:
        conversation = self._conversation
        if conversation.files:
            table = terminal.small_table("file", "tokens")
            counts = conversation.file_tokens()
            for file, count in zip(conversation.files, counts, strict=True):
                table.add_row(file.name, f"{count:,}")
            self._console.print(table)
        opened = conversation.opened
        if opened is None:
            self._console.print("Nothing is read yet.")
            return
        ranks = {block.rank for block in opened.blocks}
        self._console.print(
            f"{counted(opened.context_tokens, 'token')} of context in "
            f"{counted(len(opened.blocks), 'block')} on {counted(len(ranks), 'rank')}, "
            f"{opened.cached_tokens:,} of them cached; {counted(conversation.turns, 'turn')} so far"
        )

    def _print_stats(self) -> None:
        last, statistics = self._conversation.last, self._front.engine.statistics
        if last is None:
            self._console.print("Nothing was asked yet.")
        else:
            table = terminal.small_table("last answer", "")
            for row in _rows_of(last):
                table.add_row(*row)
            self._console.print(table)
        if statistics is not None:
            held = ", ".join(
                f"{tier} {counted(statistics.cached_blocks[tier], 'block')} "
                f"({terminal.size(statistics.cached_bytes[tier])})"
                for tier in statistics.cached_blocks
            )
            self._console.print(f"The ranks hold: {held}")


def _rows_of(turn: Any) -> list[tuple[str, str]]:
    usage = turn.usage
    rows = [
        ("prompt", f"{counted(usage.prompt_tokens, 'token')}, {usage.cached_tokens:,} cached"),
        ("answer", counted(usage.completion_tokens, "token")),
    ]
    if turn.first is not None:
        rows.append(("first token after", f"{turn.first:.2f} s"))
        more, seconds = usage.completion_tokens - 1, turn.seconds - turn.first
        if more and seconds:
            rows.append(("then", f"{more / seconds:.1f} tokens/s"))
    return rows
