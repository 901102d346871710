"""The log line about throughput: rates of the time in which there was work."""

import logging
from dataclasses import replace

import pytest
from oracle import StampModel

from radixgen import Engine
from radixgen.core import Stats
from radixgen.engine.throughput import ThroughputLog, describe


@pytest.fixture(scope="module")
def idle() -> Stats:
    with Engine(StampModel(), kv_tokens=200) as engine:
        return engine.stats()


def test_a_line_says_what_was_done_and_what_is_left(idle: Stats) -> None:
    after = replace(
        idle,
        prompt_tokens=40_000,
        cached_prompt_tokens=30_000,
        generated_tokens=500,
        num_running=3,
        num_waiting=2,
        kv_tokens_used=50,
    )
    assert describe(idle, after, 10.0) == (
        "prompts: 4,000.0 tokens/s (75.0% cached), generation: 50.0 tokens/s, running: 3, waiting: 2, "
        "KV cache: 25.0% used"
    )
    assert "0.0 tokens/s (0.0% cached)" in describe(after, after, 10.0)


def test_time_without_work_is_not_counted(idle: Stats, caplog: pytest.LogCaptureFixture) -> None:
    now, generated, looks = 0.0, 0, 0

    def stats() -> Stats:
        nonlocal looks
        looks += 1
        return replace(idle, generated_tokens=generated)

    log = ThroughputLog(stats, seconds=10.0, clock=lambda: now)
    with caplog.at_level(logging.INFO, "radixgen.engine.throughput"):
        log.step()
        now = 9.0
        log.step()
        assert looks == 1 and not caplog.messages
        log.pause()
        now = 1_000.0
        log.step()
        now, generated = 1_010.0, 100
        log.step()
        now, generated = 1_020.0, 300
        log.step()
    rates = [message.split("generation: ")[1].split(" tokens/s")[0] for message in caplog.messages]
    assert rates == ["10.0", "20.0"] and looks == 4
