"""Runs the front on a free port, in a thread, for tests."""

import asyncio
import contextlib
import socket
import threading
import time

from fake_engine import FakeEngine
from fake_tokenizer import ByteTokenizer
from star_attention.serve.app import create_app
from star_attention.serve.options import ServeOptions
from star_attention.serve.server import make_server


class Running:
    """A server that runs. `call` runs a function in its event loop."""

    def __init__(self, app, engine, server, loop, port):
        self.app, self.engine, self.server, self.loop = app, engine, server, loop
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def call(self, function, *args):
        async def run():
            return function(*args)

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def wait_until(self, condition, seconds=10):
        until = time.monotonic() + seconds
        while not self.call(condition):
            assert time.monotonic() < until, "it did not happen"
            time.sleep(0.01)

    def wait_until_idle(self):
        """Nothing is in flight, and no generator is open but those of pinned contexts."""
        self.wait_until(
            lambda: not self.app.in_flight and self.engine.open == len(self.engine.held)
        )


@contextlib.contextmanager
def serving(tokenizer=None, engine=None, **options):
    tokenizer = tokenizer or ByteTokenizer()
    engine = engine or FakeEngine(tokenizer)
    options = {"model_names": ("tiny", "alias"), "block_tokens": 128, **options}
    app = create_app(engine, tokenizer, ServeOptions(**options))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(512)
        port = listener.getsockname()[1]
        server = make_server(app, port)
        loops = []

        def run():
            loop = asyncio.new_event_loop()
            loops.append(loop)
            loop.run_until_complete(server.serve([listener]))
            loop.close()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            until = time.monotonic() + 20
            while not server.started:
                assert time.monotonic() < until
                assert thread.is_alive()
                time.sleep(0.01)
            yield Running(app, engine, server, loops[0], port)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
