"""Real servers (`star-attn serve` and its ranks), for tests."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import httpx

from helpers import save_tiny_model, train_tokenizer
from star_attention.distributed.launch import mpirun_command
from star_attention.models.tokenizer import Tokenizer

SERVE = [sys.executable, "-m", "star_attention", "serve"]
START_SECONDS = 90


def save_long_model(folder):
    """A random model that takes long contexts, with a chat template."""
    train_tokenizer(folder, "llama3")
    size = Tokenizer(folder).vocab_size
    save_tiny_model(folder, vocab_size=size, max_position_embeddings=160 * 1024)
    return folder


def wait_until(condition, seconds=30, what="it did not happen"):
    """The first true value of `condition()`."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, what() if callable(what) else what
        time.sleep(0.02)
    return value


class Server:
    """`star-attn serve` on a free port; with `outer`, so many ranks that mpirun starts first."""

    def __init__(self, model, *options, outer=0):
        self.mark = uuid.uuid4().hex
        self.folder = Path(tempfile.mkdtemp(prefix="sa-"))
        self._log = (self.folder / "log").open("w")
        launcher = mpirun_command(outer, oversubscribe=True) if outer else []
        self.process = subprocess.Popen(
            [*launcher, *SERVE, *self._arguments(model, options)],
            stdin=subprocess.DEVNULL,
            stderr=self._log,
            start_new_session=True,
            env={
                **os.environ,
                "STAR_ATTENTION_TEST_MARK": self.mark,
                "TMPDIR": str(self.folder),
            },
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )
        self.url = None

    @staticmethod
    def _arguments(model, options):
        named = ("--served-model-name", "tiny", "--port", 0)
        return map(str, ("--model", model, *named, *options))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.process.wait(30)
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def log(self):
        return (self.folder / "log").read_text()

    def ready(self):
        """Waits until it serves; returns itself."""

        def url():
            assert self.process.poll() is None, self.log
            return re.search(r"serving tiny at (http://\S+)", self.log)

        self.url = wait_until(url, START_SECONDS, lambda: self.log)[1]
        return self

    def processes(self, kind=""):
        """Those of this server, by their environment, whose command line has `kind` in it."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes()
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if self.mark.encode() in environment and kind in command and state not in "XZ":
                found[int(folder.name)] = command, environment
        return found

    def rank(self, number):
        """The process of a rank; with one rank it is the front's child."""
        for pid, (command, environment) in self.processes("-m star_attention").items():
            variables = dict(
                each.split(b"=", 1) for each in environment.split(b"\0") if b"=" in each
            )
            is_front = b"STAR_ATTENTION_OUTER_RANK0" in variables or pid == self.process.pid
            if is_front or "--bind-to" in command:
                continue
            if int(variables.get(b"OMPI_COMM_WORLD_RANK", 0)) == number:
                return pid
        return None

    def mpirun(self):
        return next(iter(self.processes("--bind-to none")))

    def health(self):
        return httpx.get(f"{self.url}/health", timeout=10)

    def wait_until_well(self):
        wait_until(lambda: self.health().status_code == 200, START_SECONDS, lambda: self.log)

    def metric(self, name):
        """A metric's value; None: it is not there now."""
        text = httpx.get(f"{self.url}/metrics", timeout=10).text
        found = re.search(rf"^star_attention:{name} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else None

    def complete(self, prompt, **options):
        """POST /v1/completions, greedy."""
        body = {"prompt": prompt, "temperature": 0, "ignore_eos": True, **options}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)

    def nothing_is_left(self, seconds=10):
        """Waits until its processes are gone; its socket's folder is too."""
        wait_until(lambda: not self.processes(), seconds, lambda: str(self.processes()))
        assert list(self.folder.glob("star-attention-*")) == []
