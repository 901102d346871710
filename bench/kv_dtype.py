"""Keys and values in 8 bits beside the model's own: what they lose, what they hold, and how fast they are read.

    python -m bench.kv_dtype [--check] [--save]

- *Error*: normally distributed numbers, written and read again; the norm of the difference over the norm.
- *Capacity*: tokens that the same memory holds, over those in 16 bits.
- *Model*: SmolLM2-135M in float32. Perplexity of the demo's document and of the first 8,000 tokens of the Python
  documentation's topics, and how many of 32 greedy continuations of 32 tokens stay equal, and for how long.
- *Speed*: attention of one layer. On a CPU, one row over 16,384 keys, with 9 query and 3 KV heads of 64 dimensions, in
  float32. On a GPU, 32 query and 8 KV heads of 128, in bfloat16, with a cold cache: trees whose keys are mostly
  private, where memory is the limit, and prefixes of many rows, where products are.

fp8 is measured where the engine has it, on GPUs. Bounds with --check: those of each line.

Bias. Weights are of a small model, which quantization harms more than large ones; texts are English. The greedy
continuations stop agreeing at the first near-tie.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from bench.device import Timer
from bench.quality import LONG_TEXT, Agreement, continue_each, document, perplexity, topic_tokens
from bench.report import Report, benchmark_options, time_each
from bench.trees import Tree, lay_out, levels, shared_prefix
from radixgen import Engine
from radixgen.cache.storage import LayerShape
from radixgen.calibration import cost_models
from radixgen.kernels.backend import Attention, backend
from radixgen.kernels.geometry import Geometry
from radixgen.kernels.quantized import KV, KV_DTYPES, allocate, read, write
from radixgen.model import smollm2
from radixgen.scheduler.planner import plan

ERRORS = {"int8": 0.01, "fp8": 0.04}
CAPACITY = {64: 1.85, 128: 1.9}
PERPLEXITY = 0.005
"""Largest relative change."""
CONTINUATIONS, CONTINUATION, CONTEXT = 32, 32, 200
TREES: dict[str, tuple[Tree, float | None, float | None]] = {
    "256 rows, 2,048 own keys": (shared_prefix(256, 256, 2048), 1.6, None),
    "64 rows, 1,024 own keys": (shared_prefix(64, 256, 1024), 1.6, None),
    "10 rows, 400 own keys on 4,000": (levels("1,10 / 4000,400"), 1.0, None),
    "1,024 rows on 4,096 keys": (shared_prefix(1024, 4096, 32), None, 1.15),
    "256 rows on 16,256 keys": (shared_prefix(256, 16_256, 32), None, 1.15),
}
"""By description: the tree, the least speed over bfloat16 and the longest time over bfloat16."""


def report_errors(report: Report, device: torch.device) -> None:
    """Lost by writing, and room won."""
    numbers = torch.randn((4_096, 8, 128), generator=torch.Generator().manual_seed(0)).to(device)
    for name, dtype in KV_DTYPES.items():
        pool = allocate(*numbers.shape, dtype, device)
        write(pool, torch.arange(numbers.shape[0], device=device), numbers)
        error = float((read(pool, slice(0, numbers.shape[0]), torch.float32) - numbers).norm() / numbers.norm())
        report.figure(f"error_{name}", error, f"error of {name}: {error:.2%}", at_most=ERRORS[name])
        for head_dim, least in CAPACITY.items():
            plain, small = (LayerShape(8, head_dim, head_dim, each) for each in (torch.bfloat16, dtype))
            ratio = plain.bytes_per_token / small.bytes_per_token
            text = f"tokens in {name} over those in 16 bits, head_dim {head_dim}: {ratio:.2f}×"
            report.figure(f"capacity_{name}_{head_dim}", ratio, text, at_least=least)


def report_model(report: Report, names: Sequence[str]) -> None:
    """Perplexities and greedy continuations of SmolLM2."""
    found = {name: measure_model(name) for name in ("auto", *names)}
    exact, greedy = found["auto"]
    for name in names:
        perplexities, tokens = found[name]
        for text, value in perplexities.items():
            change = value / exact[text] - 1.0
            line = f"perplexity of {text}: {exact[text]:.4f}, in {name} {value:.4f}, {change:+.3%}"
            report.figure(f"perplexity_{name}_{text.replace(' ', '_')}", abs(change), line, at_most=PERPLEXITY)
        agreement = Agreement.between(greedy, tokens)
        report.say(
            f"greedy in {name}: {agreement.equal} of {agreement.of} continuations equal; the first "
            f"{agreement.tokens:.1f} of {CONTINUATION} tokens on average"
        )
        report.keep(**{f"greedy_{name}": asdict(agreement)})


def measure_model(kv_dtype: str) -> tuple[dict[str, float], list[list[int]]]:
    """Perplexity by text, and greedy continuations of parts of the document."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2.fetch())
    topics = topic_tokens(tokenizer)
    texts = {"the document": document(tokenizer), "the long text": topics[:LONG_TEXT]}
    with Engine("smollm2", dtype="float32", kv_dtype=kv_dtype, kv_tokens=16_384, warm_up=False) as engine:
        perplexities = {name: perplexity(engine, tokens) for name, tokens in texts.items()}
        rest = topics[LONG_TEXT:]
        prompts = [rest[start : start + CONTEXT] for start in range(0, CONTINUATIONS * CONTEXT, CONTEXT)]
        return perplexities, continue_each(engine, prompts, CONTINUATION)


class Layer:
    """Attention of one layer over a tree, with keys in several dtypes."""

    def __init__(
        self, tree: Tree, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        forest, nodes, positions = lay_out(tree)
        slots = int((forest.extent_starts + forest.extent_lengths).max())
        generator = torch.Generator().manual_seed(0)
        self.q, self.k, self.v = (
            torch.randn((rows, count, head_dim), generator=generator).to(device, dtype)
            for rows, count in ((nodes.size, heads[0]), (slots, heads[1]), (slots, heads[1]))
        )
        self._lay_out, self._device = (forest, nodes, positions), device

    def attention(self, kv_dtype: torch.dtype | None) -> Callable[[], tuple[Tensor, Tensor]]:
        """A call of the device's own kernels; `kv_dtype`: None for that of the queries."""
        k, v = (self._pool(pool, kv_dtype) for pool in (self.k, self.v))
        geometry = Geometry.of(self.q, k, v)
        costs = cost_models(self._device, geometry) if self._device.type == "cuda" else (None,)
        made = [plan(*self._lay_out, cost=cost) for cost in costs]
        best = min(made, key=lambda one: one.predicted)
        own: Attention = backend("auto", self._device).attention(best, None, self._device)
        q, scale = self.q[torch.from_numpy(best.row_order).to(self._device)], self.q.shape[2] ** -0.5
        return lambda: own(q, k, v, scale)

    @staticmethod
    def _pool(pool: Tensor, kv_dtype: torch.dtype | None) -> KV:
        if kv_dtype is None:
            return pool
        quantized = allocate(*pool.shape, kv_dtype, pool.device)
        write(quantized, torch.arange(pool.shape[0], device=pool.device), pool)
        return quantized


def report_cpu(report: Report, keys: int) -> None:
    """One row over many keys, by the backend of the processor."""
    layer = Layer(([-1], [keys], [0]), (9, 3), 64, torch.float32, torch.device("cpu"))
    plain, small = layer.attention(None), layer.attention(torch.int8)
    size = layer.k.nbytes + layer.v.nbytes
    seconds = {
        name: float(np.median(time_each(call, times=50))) for name, call in (("float32", plain), ("int8", small))
    }
    report.say(f"{keys:,} keys are {size / 1e6:.1f} MB in float32, {size / 4e6:.1f} MB in int8")
    for name, taken in seconds.items():
        report.say(f"a row over {keys:,} keys in {name}: {1e6 * taken:.0f} µs")
        report.keep(**{f"cpu_{name}_us": 1e6 * taken})
    ratio = seconds["float32"] / seconds["int8"]
    report.figure("cpu_int8", ratio, f"int8 over float32: {ratio:.2f}× as fast", at_least=1.0)


def report_gpu(report: Report, device: torch.device) -> None:
    """Trees on which memory or products are the limit."""
    timer = Timer(device)
    report.say(timer.ceilings().describe())
    for what, (tree, faster, slower) in TREES.items():
        layer = Layer(tree, (32, 8), 128, torch.bfloat16, device)
        plain = timer.cold(layer.attention(None)).median
        report.say(f"{what}, bfloat16: {plain:.0f} µs, {(layer.k.nbytes + layer.v.nbytes) / 1e6:.0f} MB of keys")
        for name, dtype in KV_DTYPES.items():
            taken = timer.cold(layer.attention(dtype)).median
            figure, text = f"{name}: {what}", f"{what}, {name}: {taken:.0f} µs"
            if slower is None:
                report.figure(figure, plain / taken, f"{text}, {plain / taken:.2f}× as fast", at_least=faster)
            else:
                report.figure(figure, taken / plain, f"{text}, {taken / plain:.2f}× the time", at_most=slower)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("--keys", type=int, default=16_384, help="keys of a row on a CPU")
    parser.add_argument("--no-model", action="store_true", help="leave SmolLM2 out, which takes minutes")
    options = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    report = Report("kv_dtype_gpu" if cuda else "kv_dtype")
    device = torch.device("cuda" if cuda else "cpu")
    report.keep(threads=torch.get_num_threads())
    report_errors(report, device)
    if cuda:
        report_gpu(report, device)
    else:
        report_cpu(report, options.keys)
    if not options.no_model:
        report_model(report, list(KV_DTYPES) if cuda else ["int8"])
    return report.finish(check=options.check, save=options.save)


if __name__ == "__main__":
    sys.exit(main())
