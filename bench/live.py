"""What the live page costs: a reading of the tree between two steps, and drawing it in a browser.

    python -m bench.live [--check] [--save] [--nodes N] [--huge N] [--seconds N]

256 sequences decode in a tree of nearly 2,000 nodes, four levels deep, and in one of 10,000, of which 2,000 are drawn;
the model costs nothing. Timed is what keeps the engine's thread from its next step; then, apart, what another thread
does with it: rows, differences, JSON. Bound, with --check: a median of 0.6 ms a reading, and 4 ms where not all is
drawn; the feed then reads less often, so that the engine gives no more than a fiftieth of its time.

The limit is what NumPy needs to copy five columns of that many nodes.

Then Chromium draws the 2,000 nodes at 10 updates a second while sequences decode, and tells how many frames a second it
draws by its own count, every second. Bound: 30 in the slowest second.

Bias. Every sequence grows between two readings, and none begins or ends, so that no node is new; one that is costs a
microsecond more. No text is made while readings are timed. The browser draws on the processor, in a window of 1,440 by
900, on the cores that the engine steps on, at 50 steps a second.
"""

import asyncio
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import FastAPI

from bench.browser import WANTED, chromium, installed, look_like, serving
from bench.null import NullModel
from bench.report import Report, benchmark_options, time_each
from radixgen import AsyncEngine, Engine, Limits, SamplingParams
from radixgen.model.loader import load_tokenizer
from radixgen.serve.live.feed import Feed
from radixgen.serve.live.frames import EMPTY, Frame, TreeReader, figures
from radixgen.serve.live.routes import tree_routes

SEQUENCES = 256
READINGS = 200
MILLISECONDS, HUGE_MILLISECONDS = 0.6, 4.0
FRAMES = 30
STEP_SECONDS = 0.02
INTERVAL = 0.1


class Paced(NullModel):
    """Takes as long for a step as a model may."""

    def run(self, *arguments: Any) -> Any:
        time.sleep(STEP_SECONDS)
        return super().run(*arguments)


def grown(engine: Engine, nodes: int, sequences: int) -> None:
    """Let the tree have about so many nodes, and so many sequences decode in it."""
    rng = np.random.default_rng(0)
    systems = [rng.integers(32, 127, 200) for _ in range(4)]
    documents = [np.concatenate([systems[rng.integers(4)], rng.integers(32, 127, 60)]) for _ in range(40)]
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    prompts: list[np.ndarray] = []
    while engine._core.tree.num_nodes < nodes:
        more = [np.concatenate([documents[rng.integers(40)], rng.integers(32, 127, 20)]) for _ in range(250)]
        engine.generate(more[: nodes - engine._core.tree.num_nodes], params)
        prompts += more[: nodes - engine._core.tree.num_nodes]
    lasting = SamplingParams(max_tokens=engine.max_model_len - 300, ignore_eos=True)
    for index in range(sequences):
        engine.submit(prompts[index % len(prompts)], lasting, output_kind="final")
    while engine.stats().generated_tokens < len(prompts) + 3 * sequences:
        engine.step()


def time_readings(engine: Engine, limits: Limits) -> tuple[list[float], list[float]]:
    """Seconds in the engine's thread, and those of making a frame of it elsewhere."""
    reader, before = TreeReader(limits), EMPTY
    reading, making = [], []
    for serial in range(READINGS + 1):
        engine.step()
        begin = time.perf_counter()
        read = reader.read(engine._core)
        middle = time.perf_counter()
        table = read.table()
        changed, gone = table.since(before)
        Frame(serial, 0.0, False, changed, gone, [], {}, figures(read.stats, read.num_nodes)).encode()
        reading.append(middle - begin)
        making.append(time.perf_counter() - middle)
        before = table
    return reading[1:], making[1:]


def frames_per_second(nodes: int, sequences: int, seconds: int) -> tuple[list[float], list[float], int]:
    """What the page says of itself, once a second: frames, updates; and how many nodes it drew at last."""
    inner = Engine(Paced(), tokenizer=load_tokenizer("smollm2"), kv_tokens=1 << 19, max_step_tokens=8_192)
    grown(inner, nodes, sequences)
    engine = AsyncEngine(inner)
    app = FastAPI()
    app.include_router(tree_routes(engine, feed=Feed(engine, interval=INTERVAL)))
    found: list[list[str]] = []
    says = "return ['fps', 'updates', 'drawn'].map((id) => document.getElementById(id).textContent)"
    try:
        with serving(app) as address, chromium() as driver:
            look_like(driver, 1440, 900, dark=True)
            driver.get(f"{address}/tree")
            time.sleep(5)
            for _ in range(seconds):
                time.sleep(1)
                found.append(driver.execute_script(says))
    finally:
        asyncio.run(engine.close())
    frames, updates = ([float(one[which]) for one in found] for which in (0, 1))
    return frames, updates, int(found[-1][2].replace(",", ""))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("--nodes", type=int, default=1_900)
    parser.add_argument("--huge", type=int, default=10_000)
    parser.add_argument("--seconds", type=int, default=15, help="of watching the browser; 0 leaves it out")
    options = parser.parse_args(arguments)
    report, limits = Report("live"), Limits()
    source, ids = np.arange(limits.max_shown_nodes, dtype=np.int32), np.arange(limits.max_shown_nodes)
    copying = 5 * float(np.median(time_each(lambda: source[ids].astype(np.int64), times=READINGS)))
    report.limit("copying five columns", copying)
    report.say(f"  = {1e3 * copying:.3f} ms")
    for name, nodes, bound in (("nodes", options.nodes, MILLISECONDS), ("huge", options.huge, HUGE_MILLISECONDS)):
        with Engine(NullModel(), kv_tokens=1 << 22, max_step_tokens=8_192, limits=limits) as engine:
            grown(engine, nodes, min(SEQUENCES, nodes))
            count = engine._core.tree.num_nodes
            reading, making = time_readings(engine, limits)
        median, worst, other = 1e3 * float(np.median(reading)), 1e3 * max(reading), 1e3 * float(np.median(making))
        text = f"{count:>7,} nodes: {median:.3f} ms a reading, {median / 1e3 / copying:.0f} × limit; worst {worst:.2f}"
        report.figure(f"{name}_ms", median, f"{text}; {other:.2f} ms elsewhere", at_most=bound)
        report.keep(**{f"{name}_count": count, f"{name}_worst_ms": worst, f"{name}_elsewhere_ms": other})
    if options.seconds and not installed():
        report.say(f"the page was not drawn: it {WANTED}")
    elif options.seconds:
        frames, updates, drawn = frames_per_second(options.nodes, SEQUENCES, options.seconds)
        text = (
            f"{drawn:,} nodes drawn at {np.median(updates):.1f} updates/s: {np.median(frames):.0f} frames/s, median of"
        )
        report.figure("frames", min(frames), f"{text} {len(frames)} s; slowest {min(frames):.0f}", at_least=FRAMES)
        report.keep(updates=updates, every_second=frames)
    return report.finish(check=options.check, save=options.save)


if __name__ == "__main__":
    sys.exit(main())
