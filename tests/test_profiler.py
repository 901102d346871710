"""`StepProfiler`: one trace of as many steps as were asked for. No step fails because of it."""

import json
import logging
import threading
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from oracle import StampModel

from radixgen import Engine, InvalidRequest, SamplingParams
from radixgen.engine.profiler import MAX_PROFILE_STEPS, StepProfiler
from radixgen.engine.thread import EngineThread

SECONDS = 60.0


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "radixgen.engine.profiler")
    return caplog


def stamp_engine() -> Engine:
    return Engine(StampModel(4, 64, frozenset([3])), kv_tokens=256)


def generate(engine: Engine, steps: int) -> list[int]:
    """Generate in as many steps, of which the first computes the prompt."""
    params = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True)
    before = engine.num_steps
    (output,) = engine.generate([1, 2, 3], params)
    assert engine.num_steps == before + steps
    return output.outputs[0].token_ids


def events(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["traceEvents"]


def recorded_steps(path: Path) -> int:
    names = [event["name"] for event in events(path) if event.get("cat") == "user_annotation"]
    assert names == [f"step {index}" for index in range(1, len(names) + 1)]
    return len(names)


def test_the_steps_after_the_first_are_recorded(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    folder, model = tmp_path / "new" / "traces", families.build("llama")
    with Engine(model, device="cpu", kv_tokens=64) as engine:
        expected = generate(engine, 6)
        profiler = engine.profile(folder, num_steps=3)
        engine.step()  # without work: not counted
        assert generate(engine, 6) == expected
        (path,) = folder.iterdir()
        assert generate(engine, 6) == expected
    assert [path] == list(folder.iterdir()) and profiler.path == path and path.is_absolute()
    assert recorded_steps(path) == 3
    activations = [event for event in events(path) if event.get("name") == "aten::silu"]
    assert len(activations) == 3 * model.config.num_hidden_layers
    assert log.messages[-1] == f"wrote the profile of 3 steps to {path}"


def test_what_was_recorded_is_written_when_the_engine_s_thread_ends(tmp_path: Path) -> None:
    engine, done = stamp_engine(), threading.Event()
    profiler = engine.profile(tmp_path, num_steps=100)
    thread = EngineThread(engine, lambda outputs: done.set() if outputs and outputs[-1].finished else None, print)
    thread.start()
    thread.call(lambda: engine.submit([1, 2], SamplingParams(max_tokens=5, ignore_eos=True))).result(SECONDS)
    assert done.wait(SECONDS) and not list(tmp_path.iterdir())
    thread.stop()
    assert thread.join(SECONDS)
    assert [profiler.path] == list(tmp_path.iterdir()) and recorded_steps(profiler.path) == 4


def test_it_ends_with_its_block(tmp_path: Path) -> None:
    with stamp_engine() as engine:
        with engine.profile(tmp_path) as profiler:
            generate(engine, 3)
        assert profiler.path is not None and recorded_steps(profiler.path) == 2
        generate(engine, 3)
        profiler.close()
    assert [profiler.path] == list(tmp_path.iterdir())


def test_a_second_profile_ends_the_first(tmp_path: Path) -> None:
    with stamp_engine() as engine:
        first = engine.profile(tmp_path)
        generate(engine, 4)
        second = engine.profile(tmp_path, num_steps=1)
        generate(engine, 4)
    assert first.path and second.path and first.path != second.path
    assert (recorded_steps(first.path), recorded_steps(second.path)) == (3, 1)


def test_without_a_second_step_nothing_is_written(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    for steps in (0, 1):
        with stamp_engine() as engine:
            profiler = engine.profile(tmp_path)
            if steps:
                generate(engine, steps)
        assert profiler.path is None and not list(tmp_path.iterdir())
        assert log.messages == ["the profile is empty: no step followed the first"]
        log.clear()


def test_a_step_that_fails_is_recorded(tmp_path: Path) -> None:
    model = StampModel(4, 64, frozenset([3]))
    with Engine(model, kv_tokens=256) as engine:
        expected = generate(engine, 4)
        profiler = engine.profile(tmp_path)
        generate(engine, 1)
        model.fail_next = RuntimeError("once")
        (output,) = engine.generate([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
        assert output.outputs[0].token_ids == expected
    assert profiler.path is not None and recorded_steps(profiler.path) == 5


@pytest.mark.parametrize("name", ["file", "file/below", "\0"])
def test_a_directory_that_cannot_be_written_to_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with stamp_engine() as engine:
        with pytest.raises(InvalidRequest, match=r"profile='.*': must be a directory that can be written to"):
            engine.profile(str(tmp_path / name))
        generate(engine, 2)


@pytest.mark.parametrize("num_steps", [0, MAX_PROFILE_STEPS + 1, True, "3", None])
def test_a_number_of_steps_out_of_bounds_is_refused(tmp_path: Path, num_steps: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"profile_steps=.* from 1 to {MAX_PROFILE_STEPS}"):
        StepProfiler(tmp_path / "new", num_steps)
    assert not list(tmp_path.iterdir())


def failure(log: pytest.LogCaptureFixture) -> str:
    (record,) = [record for record in log.records if record.message == "the profile failed"]
    assert record.levelno == logging.ERROR and record.exc_info is not None
    return str(record.exc_info[1])


def test_a_trace_that_cannot_be_written_is_logged(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    with stamp_engine() as engine:
        expected = generate(engine, 6)
        profiler = engine.profile(tmp_path / "gone", num_steps=2)
        (tmp_path / "gone").rmdir()
        assert generate(engine, 6) == expected
    assert profiler.path is None and "No such file" in failure(log)


def test_a_trace_that_is_cut_off_is_logged(
    tmp_path: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(_: object, path: str) -> None:
        Path(path).write_text('{"traceEvents": [')

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", export)
    with stamp_engine() as engine:
        profiler = engine.profile(tmp_path, num_steps=2)
        generate(engine, 6)
    assert profiler.path is None and "is incomplete" in failure(log)


def test_beside_another_profiler_it_is_not_started(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    with stamp_engine() as engine:
        expected = generate(engine, 4)
        profiler = engine.profile(tmp_path)
        with torch.profiler.profile():
            assert generate(engine, 4) == expected
        assert generate(engine, 4) == expected
    assert profiler.path is None and "another torch profiler is active" in failure(log)


def test_in_another_thread_it_does_not_end(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    """torch would crash when it writes the trace."""
    profiler = StepProfiler(tmp_path)
    began, ended = threading.Event(), threading.Event()

    def run() -> None:
        profiler.after_step()
        trace = profiler._trace
        began.set()
        ended.wait(SECONDS)
        trace.stop()

    thread = threading.Thread(target=run)
    thread.start()
    assert began.wait(SECONDS)
    profiler.close()
    ended.set()
    thread.join(SECONDS)
    assert profiler.path is None and "in the thread in which it began" in failure(log)
