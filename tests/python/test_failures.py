"""A rank that fails takes the whole job down, in seconds, with its reason; and so does whoever
started it."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from helpers import HERE, run_job
from star_attention.distributed.launch import mpirun_command

SECONDS = 10
MOMENTS = ["Open", "Chunk", "Ask", "Decode", "Release"]


class Job:
    """failing_job.py under way."""

    def __init__(self, kind, moment, rank, model, *options):
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, HERE / "failing_job.py", kind, moment, str(rank), model, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "STAR_ATTENTION_TEST_MARK": self.mark},
            # Under nohup, say, tests inherit that it is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )

    def failed(self):
        """When the rank failed, by the monotonic clock; waits for that."""
        for line in self.process.stdout:
            if "failing at" in line:
                return float(line.split("failing at ")[1].split()[0])
        raise AssertionError(self.process.stderr.read())

    def end(self):
        """What the job wrote to stderr."""
        try:
            return self.process.communicate(timeout=120)[1]
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise

    def processes(self):
        """Those that belong to the job, by their environment."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" "))
            except OSError:
                pass
        return found


def check_job_ends(kind, moment, rank, model, *options, seconds=SECONDS):
    job = Job(kind, moment, rank, model, *options)
    failed = job.failed()
    err = job.end()
    assert time.monotonic() - failed < seconds
    assert job.process.returncode not in (0, 2)
    reason = {
        "raise": f"rank {rank} failed: RuntimeError: the disk is on fire",
        "refuse": f"rank {rank} failed: UserError: the disk is on fire",
        "kill": f"rank {rank} was ended by signal 9",
        "stop": f"rank {rank} does not run",
    }
    assert reason[kind] in err
    assert ("memory ran out" in err) == (kind == "kill")
    assert "ORTE" not in err
    assert "prterun" not in err
    assert job.processes() == []


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("moment", MOMENTS)
def test_one_rank_fails(tiny_chat_model, moment, rank):
    check_job_ends("raise", moment, rank, tiny_chat_model)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(
    ("kind", "moment"),
    [("kill", "Chunk"), ("kill", "Decode"), ("stop", "Chunk"), ("stop", "Decode")],
)
def test_one_rank_is_lost(tiny_chat_model, kind, moment, rank):
    check_job_ends(kind, moment, rank, tiny_chat_model)


def test_what_only_one_rank_refuses(tiny_chat_model):
    check_job_ends("refuse", "Ask", 1, tiny_chat_model)


@pytest.mark.parametrize("moment", ["Chunk", "Decode"])
def test_interrupt(tiny_chat_model, moment):
    """Ctrl-C, which the terminal sends to all processes in front."""
    job = Job("hang", moment, 1, tiny_chat_model)
    failed = job.failed()
    os.killpg(job.process.pid, signal.SIGINT)
    job.end()
    assert time.monotonic() - failed < SECONDS
    assert job.process.returncode != 0
    assert job.processes() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_the_ranks_end_with_who_started_them(tiny_chat_model, number):
    job = Job("hang", "Decode", 1, tiny_chat_model)
    job.failed()
    began = time.monotonic()
    job.process.send_signal(number)
    job.end()
    while job.processes():
        assert time.monotonic() - began < SECONDS, job.processes()
        time.sleep(0.1)


def test_a_script_runs_on_rank_0_only(tiny_chat_model):
    """Ranks are configured by rank 0, whatever they say themselves; errors are its alone, and what
    goes on in its loops holds nobody up."""
    code = (
        "import sys, time\n"
        "from star_attention import LLM, SamplingParams, StarConfig, UserError\n"
        "from star_attention.distributed import world_rank\n"
        "llm = LLM(sys.argv[1], StarConfig(block_size=128 * (1 + world_rank())))\n"
        "print('rank', world_rank())\n"
        "try: llm.encode(' ')\n"
        "except UserError as error: print(error)\n"
        "context = llm.encode('The quick brown fox. ' * 99)\n"
        "for piece in llm.stream(context, 'What?', SamplingParams(max_tokens=3)): time.sleep(1)\n"
        "next(llm.stream(context, 'What?'))\n"
        "try:\n"
        "    for piece in llm.stream(context, 'What?'): raise KeyError('mine')\n"
        "except KeyError as error: print(error)\n"
        "print(len(llm.ask(context, 'Why?', SamplingParams(max_tokens=3)).token_ids))\n"
        "sys.exit(7)\n"
    )
    job = run_job(2, "-c", code, tiny_chat_model, timeout=60, check=False)
    assert job.stdout.splitlines() == [
        "rank 0",
        "the context is empty: give it some text",
        "'mine'",
        "3",
    ]
    assert job.returncode == 7


def test_several_models_in_a_script(tiny_chat_model):
    """At the same time, and one after the other."""
    code = (
        "import sys\n"
        "from star_attention import LLM, SamplingParams, StarConfig, UserError\n"
        "params = SamplingParams(max_tokens=5)\n"
        "first, second = (LLM(sys.argv[1], StarConfig(block_size=128)) for _ in range(2))\n"
        "contexts = [llm.encode('The quick brown fox. ' * 99) for llm in (first, second)]\n"
        "print(first.ask(contexts[0], 'Why?', params) == second.ask(contexts[1], 'Why?', params))\n"
        "first.close()\n"
        "first.close()\n"
        "try: first.ask(contexts[0], 'Why?')\n"
        "except UserError as error: print(error)\n"
        "with LLM(sys.argv[1]) as third:\n"
        "    print(len(third.ask(third.encode('A word.'), 'Why?', params).token_ids))\n"
        "print(second.ask(contexts[1], 'Why?', params).finish_reason)\n"
    )
    job = run_job(2, "-c", code, tiny_chat_model, timeout=90)
    assert job.stdout.splitlines() == ["True", "the model was closed: load it again", "5", "length"]


def test_a_rank_that_does_not_reach_the_model(tiny_chat_model):
    code = (
        "import sys, time\n"
        "from star_attention import LLM\n"
        "from star_attention.distributed import watch, world_rank\n"
        "watch._SLOW = 2\n"
        "if world_rank(): time.sleep(5)\n"
        "LLM(sys.argv[1])\n"
    )
    job = run_job(2, "-c", code, tiny_chat_model, timeout=60)
    assert job.stderr.count("rank 0 has waited 2 s for the others: every rank must reach") == 1


def test_a_model_in_a_thread(tiny_chat_model):
    code = (
        "import sys, threading\n"
        "from star_attention import LLM\n"
        "threading.Thread(target=LLM, args=(sys.argv[1],)).start()\n"
    )
    job = run_job(2, "-c", code, tiny_chat_model, timeout=60, check=False)
    assert job.returncode not in (0, 2)
    assert "the first LLM(...) under mpirun belongs into the main thread" in job.stderr


def test_a_program_that_a_rank_starts_is_no_rank(tiny_chat_model):
    code = (
        "import subprocess, sys\n"
        "from star_attention import LLM\n"
        "llm = LLM(sys.argv[1])\n"
        "plan = [sys.executable, '-m', 'star_attention', 'plan', '--context', '4K', '--json']\n"
        "subprocess.run(plan, check=True, timeout=30, stdout=subprocess.DEVNULL)\n"
        "print(llm.report()[1]['rank'])\n"
    )
    assert run_job(2, "-c", code, tiny_chat_model, timeout=60).stdout == "1\n"


def test_a_job_that_is_stopped_as_a_whole_goes_on(tiny_chat_model):
    """Ctrl-Z and fg."""
    code = (
        "import sys, time\n"
        "from star_attention import LLM\n"
        "llm = LLM(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "time.sleep(3)\n"
        "print(len(llm.report()))\n"
    )
    command = [*mpirun_command(2, oversubscribe=True), sys.executable, "-c", code, tiny_chat_model]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert job.stdout.readline() == "ready\n"
    job.send_signal(signal.SIGTSTP)
    time.sleep(7)
    job.send_signal(signal.SIGCONT)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 0
    assert out == "2\n"


def test_uncaught_exception_in_a_script(tiny_chat_model):
    """A program of the user's own that fails, while the others wait for it."""
    code = (
        "import sys\n"
        "from star_attention import LLM\n"
        "llm = LLM(sys.argv[1])\n"
        "raise KeyError('no such report')\n"
    )
    job = run_job(3, "-c", code, tiny_chat_model, timeout=60, check=False)
    assert job.returncode not in (0, 2)
    assert "KeyError: 'no such report'" in job.stderr


def test_ranks_that_have_different_files(tiny_chat_model, tmp_path):
    """One relative path, two folders."""
    import shutil

    for rank in range(2):
        shutil.copytree(tiny_chat_model, tmp_path / f"{rank}" / "model")
    weights = tmp_path / "1" / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    code = (
        "import os, sys\n"
        "from star_attention.distributed import world_rank\n"
        "from star_attention.models import fingerprint\n"
        "from star_attention.runtime import job\n"
        "folder = os.path.join(sys.argv[1], str(world_rank()), 'model')\n"
        "original = job.fingerprint\n"
        "job.fingerprint = lambda path: original(type(path)(folder))\n"
        "from star_attention import LLM, UserError\n"
        "try: LLM(os.path.join(sys.argv[1], '0', 'model'))\n"
        "except UserError as error: print(error)\n"
    )
    job = run_job(2, "-c", code, tmp_path, timeout=60)
    assert "on rank 1" in job.stdout
    assert job.stdout.count("\n") == 1
