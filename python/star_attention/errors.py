"""What is the user's to fix, what ends a job, and how either is said."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Input that cannot be served. The message is one line that names the option, the value and
    what would be right; the command line prints it and exits with code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # what it quotes may have several


class RankError(Exception):
    """A rank failed in the middle of its work, or is lost: the job cannot go on."""


_LONGEST_REASON = 300


def reason_of(error: BaseException) -> str:
    """What an error of a library says, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} ..."


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Whatever a library raises inside over what it is given becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # Rust's
            raise
        raise UserError(f"{what}: {reason_of(error)}") from None


def counted(count: int, noun: str, several: str | None = None) -> str:
    """`1 block`, `2,000 blocks`."""
    return f"{count:,} {noun if count == 1 else several or noun + 's'}"


def say(message: str) -> None:
    """One line for the user, apart from the result."""
    print(f"star-attn: {message}", file=sys.stderr, flush=True)
