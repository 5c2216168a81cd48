"""Ranks that do not get as far as to serve, over processes that stand in for them."""

import asyncio
import os
import signal
import sys

import anyio
import pytest

from star_attention.distributed.launch import RankJob
from star_attention.serve.meeting import OwnRanks
from star_attention.serve.process import EngineProcess

LISTENS = """
from star_attention.serve.meeting import meeting_of_rank0
front = meeting_of_rank0().wait_for_front()
"""


@pytest.mark.parametrize("work", ["", LISTENS], ids=["silent", "connected"])
def test_a_rank_that_is_stopped_as_it_starts(work):
    jobs = []

    def start(variables):
        command = [sys.executable, "-c", f"{work}\nimport time; time.sleep(60)"]
        jobs.append(RankJob(command, 1, apart=True, **variables))
        return jobs[-1]

    async def run():
        engine = EngineProcess(OwnRanks(start), restarts=1, patience=0.3)
        await engine.start()
        try:
            with anyio.fail_after(20):
                while not jobs or (work and engine._connection is None):
                    await asyncio.sleep(0.01)
                os.kill(jobs[0]._process.pid, signal.SIGSTOP)
                while not engine.restarts:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            return engine.state, engine.reason, jobs[0].is_running()
        finally:
            await engine.stop(0)

    state, reason, is_running = asyncio.run(run())
    assert state == "starting"
    assert reason == "ranks were stopped for 0.3 s as they started; the ranks are started again"
    assert not is_running
