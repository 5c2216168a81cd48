import os
import sys

import pytest

from star_attention.distributed.launch import _split_messages, run_ranks
from star_attention.errors import UserError

FRAME = b"-" * 74 + b"\n"


@pytest.mark.parametrize("size", [1, 3, 50, 10_000])
@pytest.mark.parametrize("begin", [b"one\n--\n 10 %\r", b"one\nis at"])
def test_messages_are_told_from_what_ranks_print(begin, size):
    """However the stream is cut into pieces."""
    data = begin + FRAME + b"prterun noticed\n--- that\n" + FRAME + b"two\nthree"
    read, write = os.pipe()
    messages, text = [], b""
    with os.fdopen(read, "rb") as source:
        split = _split_messages(source)
        for piece in range(0, len(data), size):
            os.write(write, data[piece : piece + size])
        os.close(write)
        for is_message, part in split:
            if is_message:
                messages.append(part)
            else:
                text += part
    assert messages == [b"prterun noticed\n--- that\n"]
    assert text == begin + b"two\nthree"


def test_exit_codes():
    command = [sys.executable, "-c"]
    assert run_ranks([*command, "from mpi4py import MPI"], 2, oversubscribe=True) == 0
    assert run_ranks([*command, "import sys; sys.exit(2)"], 2, oversubscribe=True) == 2


def test_mpirun_speaks_when_no_rank_does(capfdbinary):
    assert run_ranks(["/no/such/program"], 2, oversubscribe=True) != 0
    assert b"/no/such/program" in capfdbinary.readouterr().err


def test_more_ranks_than_cores():
    with pytest.raises(UserError, match="--ranks is 999, but there are"):
        run_ranks(["true"], 999)
