"""KV on disk: the first token of a restarted engine, with its system prompt read from disk or computed again.

    python -m bench.restart [--check] [--save] [--folder DIR] [--toy]

An engine computes a prompt of 1,000 tokens, writes its KV and is closed. The files are dropped from the page cache, and
another engine, over the same weights, serves the same prompt. The limit is the time in which this disk reads the files
one after the other. Bounds with --check: the first token takes at most a fifth of computing the prompt, even with the
time to open the folder, in which the weights are hashed and the files listed.

SmolLM2 in float32 on a CPU, in bfloat16 on a GPU; --toy is a tiny model, for tests.

Bias. Medians of three restarts within one process, so the weights are in the page cache, and nothing else uses the
disk. What the disk or a hypervisor caches by itself is not dropped.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import PreTrainedModel

from bench.report import Report, benchmark_options
from bench.shapes import SHAPES, build
from radixgen import Engine, SamplingParams
from radixgen.model import smollm2
from radixgen.model.kv_dir import open_kv_dir

RESTARTS = 3
FIRST_TOKEN = SamplingParams(temperature=0.0, max_tokens=1)


class Bench:
    """A model, a prompt, and a folder for its KV."""

    def __init__(self, network: PreTrainedModel, length: int, folder: Path) -> None:
        vocab = network.config.get_text_config().vocab_size
        self.network, self.folder = network, folder
        self.prompt: list[int] = np.random.default_rng(0).integers(3, vocab, length).tolist()
        self.other: list[int] = np.random.default_rng(1).integers(3, vocab, 16).tolist()

    def engine(self, folder: Path | None) -> Engine:
        kv_tokens = 2 * len(self.prompt)
        options = {"torch_compile": False, "warm_up": False}
        host = kv_tokens if folder else 0
        return Engine(self.network, kv_tokens=kv_tokens, host_kv_tokens=host, kv_dir=folder, **options)

    def first_token(self, folder: Path | None) -> tuple[float, int]:
        """Seconds of a new engine until the prompt's first token, after another request; and the tokens read."""
        with self.engine(folder) as engine:
            engine.generate(self.other, FIRST_TOKEN)
            seconds = timed(lambda: engine.generate(self.prompt, FIRST_TOKEN))
            return seconds, engine.stats().disk_read_tokens

    def opening(self) -> float:
        """Seconds that the folder adds to the start of an engine."""
        with self.engine(None) as engine:
            model = engine._model
            host = model.host_kv(2 * len(self.prompt))
            opened = []
            seconds = timed(lambda: opened.append(open_kv_dir(model, host, self.folder, None)))
            opened[0].close()
            host.release()
            return seconds

    def drop_from_page_cache(self) -> None:
        for path in self.folder.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def timed(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def measure_reading(bench: Bench) -> tuple[int, float]:
    """Bytes of the files of the prompt, and the median rate at which they are read, in bytes a second."""
    paths = sorted(bench.folder.iterdir())
    size = sum(path.stat().st_size for path in paths)
    seconds = []
    for _ in range(RESTARTS):
        bench.drop_from_page_cache()
        seconds.append(timed(lambda: [path.read_bytes() for path in paths]))
    return size, size / median(seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; by default the one for temporary files")
    parser.add_argument("--toy", action="store_true", help="a tiny model, for tests")
    options = parser.parse_args(arguments)
    report = Report("restart")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = build(SHAPES["toy"], device) if options.toy else load(device)
    length = 150 if options.toy else 1000
    with TemporaryDirectory(dir=options.folder) as folder:
        bench = Bench(network, length, Path(folder) / "kv")
        computed = median(bench.first_token(None)[0] for _ in range(RESTARTS))
        bench.first_token(bench.folder)
        size, rate = measure_reading(bench)
        report.say(f"{length:,} tokens: {size / 1e6:.1f} MB in {len(list(bench.folder.iterdir()))} files")
        report.limit(f"reading them at {rate / 1e9:.2f} GB/s", size / rate)
        restored, read = [], 0
        for _ in range(RESTARTS):
            bench.drop_from_page_cache()
            seconds, read = bench.first_token(bench.folder)
            restored.append(seconds)
        opening = median(bench.opening() for _ in range(RESTARTS))
    seconds = median(restored)
    report.contender("seconds_computed", "computed", computed)
    report.contender("seconds_restored", "read from disk", seconds)
    report.keep(tokens=length, bytes=size, read_rate=rate, read_tokens=read, seconds_opening=opening)
    first = f"first token from disk {1e3 * seconds:.0f} ms, computed {1e3 * computed:.0f} ms"
    report.figure("first_token", seconds / computed, f"{first}: {seconds / computed:.3f}", at_most=1 / 5)
    whole = f"with {1e3 * opening:.0f} ms to open the folder"
    ratio = (seconds + opening) / computed
    report.figure("with_opening", ratio, f"{whole}: {ratio:.3f}", at_most=1 / 5)
    return report.finish(check=options.check, save=options.save)


def load(device: torch.device) -> PreTrainedModel:
    """Load SmolLM2."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(smollm2.fetch(), dtype=dtype)
    return model.to(device).eval()


if __name__ == "__main__":
    sys.exit(main())
