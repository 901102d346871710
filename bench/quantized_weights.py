"""Quantized weights beside plain ones: what they lose, and how much faster products and whole requests are.

    python -m bench.quantized_weights [--runs N] [--candidates] [--check] [--save]

On a CPU, with one thread:

- *Products* of all layers of SmolLM2-135M and of its head, for 1, 8 and 32 rows; layers with the same input are one, as
  the engine has them. The limit is reading the weights once, at the rate at which one large matrix is read. With
  `--candidates`, also PyTorch's operators that were not chosen.
- *Perplexity* of the demo's document, over that in float32.
- *One request*: 128 prompt tokens, 64 new. Engines take turns, each in a process of its own; medians.

On a GPU, a Llama of 8B shape with random weights:

- *Error* of products in FP8 over those of dequantized weights, by the norm, at that shape.
- *One request*: 128 prompt tokens, 257 new, in bfloat16 and in FP8 with the head in bfloat16; milliseconds a token
  after the first, beside reading the weights once.

Without `--runs`, three. Bounds with --check: those of each line.

Bias. SmolLM2's weights were dequantized from 4-bit blocks of 32 (Q4_1), so that int4, which has the same blocks, finds
the numbers that are there already: its perplexity here says that nothing is lost besides, not what 4 bits cost another
model. Texts are English. Random weights say nothing about the accuracy of FP8.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoTokenizer

from bench.baseline import cpu_ceilings
from bench.contenders import Contender, Radixgen
from bench.device import Ceilings, Timer
from bench.engine_process import EngineProcess
from bench.quality import document, perplexity, topic_tokens
from bench.report import Report, benchmark_options, time_each
from bench.shapes import SHAPES, Shape, configuration
from bench.workloads import Ask
from radixgen import Engine, SamplingParams
from radixgen.kernels import fp8_linear, int4_linear, int8_linear, skinny_gemm
from radixgen.model import smollm2

Multiply = Callable[[Tensor], Tensor]

SMOLLM2 = Shape(30, 576, 1536, 9, 3, 49_152, 64)
ROWS = (1, 8, 32)
PERPLEXITY = {"int8": 0.01, "int4": 0.04}
"""Largest relative changes."""
ENGINES: dict[str, str | None] = {"float32": None, "bfloat16": None, "int8": "int8", "int4": "int4"}
"""Quantizations of the engines on a CPU, by description"""
PROMPT, NEW = 128, 64
INT8_SECONDS, FP8_MS = 1.3, 2.6
"""Bounds of one request"""
ERROR = 0.01


def shapes_of(shape: Shape) -> list[tuple[int, int]]:
    """Outputs and inputs of the products of one layer."""
    width = shape.head_dim * (shape.q_heads + 2 * shape.kv_heads)
    return [
        (width, shape.hidden),
        (shape.hidden, shape.head_dim * shape.q_heads),
        (2 * shape.inner, shape.hidden),
        (shape.hidden, shape.inner),
    ]


def plain(weight: Tensor, dtype: torch.dtype) -> tuple[Multiply, int]:
    weight = weight.to(dtype)
    return lambda given: linear(given.to(dtype), weight), weight.nbytes


def by_int8(weight: Tensor) -> tuple[Multiply, int]:
    packed = int8_linear.pack(int8_linear.quantize(weight))
    return lambda given: int8_linear.int8_linear(given, packed), weight.numel() + packed.scales.nbytes


def by_int4(weight: Tensor) -> tuple[Multiply, int]:
    packed = int4_linear.pack(int4_linear.quantize(weight))
    return lambda given: int4_linear.int4_linear(given, packed), packed.codes.nbytes + packed.scales.nbytes


def by_int8pack(weight: Tensor) -> tuple[Multiply, int]:
    """PyTorch's operator for weights of 8 bits and inputs in bfloat16."""
    whole = int8_linear.quantize(weight)
    scales = whole.scales.bfloat16()
    return (
        lambda given: torch.ops.aten._weight_int8pack_mm(given.bfloat16(), whole.codes, scales),
        whole.codes.nbytes,
    )


def by_one_digit(weight: Tensor) -> tuple[Multiply, int]:
    """The operator of oneDNN on inputs of 8 bits, a scale per row."""
    packed = int8_linear.pack(int8_linear.quantize(weight))

    def multiply(given: Tensor) -> Tensor:
        steps = given.abs().amax(1, keepdim=True) / 127
        codes = (given / steps).round().to(torch.int8)
        arguments = (None, 1.0, 0, torch.float32, "none", [], "")
        product: Tensor = torch.ops.onednn.qlinear_pointwise(codes, 1.0, 0, *packed, *arguments)
        return product * steps

    return multiply, weight.numel()


def by_int_mm(weight: Tensor) -> tuple[Multiply, int]:
    """`torch._int_mm` on inputs of 8 bits, a scale per row."""
    whole = int8_linear.quantize(weight)
    codes = whole.codes.t()

    def multiply(given: Tensor) -> Tensor:
        steps = given.abs().amax(1, keepdim=True) / 127
        return torch._int_mm((given / steps).round().to(torch.int8), codes) * steps * whole.scales

    return multiply, weight.numel()


PRODUCTS: dict[str, Callable[[Tensor], tuple[Multiply, int]]] = {
    "float32": partial(plain, dtype=torch.float32),
    "bfloat16": partial(plain, dtype=torch.bfloat16),
    "int8": by_int8,
    "int4": by_int4,
}
CANDIDATES: dict[str, Callable[[Tensor], tuple[Multiply, int]]] = {
    "_weight_int8pack_mm": by_int8pack,
    "oneDNN, inputs of 8 bits": by_one_digit,
    "_int_mm, inputs of 8 bits": by_int_mm,
}


def report_products(report: Report, ceilings: Ceilings, *, candidates: bool) -> None:
    """All products of a step, by number of rows. Every layer has weights of its own."""
    sizes = shapes_of(SMOLLM2) * SMOLLM2.layers + [(SMOLLM2.vocab, SMOLLM2.hidden)]
    made: dict[str, list[tuple[Multiply, int]]] = {}
    for name, make in (PRODUCTS | (CANDIDATES if candidates else {})).items():
        made[name] = [make(0.05 * torch.randn(*size)) for size in sizes]
    for rows in ROWS:
        inputs = {size: torch.randn(rows, size) for _, size in sizes}
        taken = {}
        for name, products in made.items():

            def step(products: list[tuple[Multiply, int]] = products, inputs: dict[int, Tensor] = inputs) -> None:
                for (multiply, _), (_, size) in zip(products, sizes, strict=True):
                    multiply(inputs[size])

            taken[name] = statistics.median(time_each(step, times=5))
        for name, seconds in taken.items():
            size = sum(nbytes for _, nbytes in made[name])
            report.say(
                f"products, {rows:2d} rows, {name:<26} {1e3 * seconds:7.1f} ms; reading {size / 1e6:.0f} MB: "
                f"{1e3 * size / ceilings.read:.1f} ms"
            )
        report.keep(**{f"products_{rows}": taken})
        gain = taken["float32"] / taken["int8"]
        text = f"products, {rows} rows: int8 is {gain:.2f} times as fast as float32"
        report.figure(f"int8_products_{rows}", gain, text, at_least=1.5)


def report_perplexity(report: Report) -> None:
    tokens = document(AutoTokenizer.from_pretrained(smollm2.fetch()))
    found: dict[str | None, float] = {}
    for quantization in (None, *PERPLEXITY):
        with Engine("smollm2", dtype="float32", quantization=quantization, device="cpu", kv_tokens=8192) as engine:
            found[quantization] = perplexity(engine, tokens)
    for name, most in PERPLEXITY.items():
        change = found[name] / found[None] - 1.0
        text = f"perplexity of the document: {found[None]:.4f}, in {name} {found[name]:.4f}, {change:+.2%}"
        report.figure(f"perplexity_{name}", abs(change), text, at_most=most)


def open_engine(label: str) -> AbstractContextManager[Contender]:
    quantization = ENGINES[label]
    dtype = "bfloat16" if label == "bfloat16" else "float32"
    return closing(Radixgen(Engine("smollm2", dtype=dtype, quantization=quantization, device="cpu", kv_tokens=1024)))


def time_request(contender: Contender, ask: Ask) -> float:
    """Seconds of one request, on an empty cache."""
    contender.reset()
    begin = time.perf_counter()
    contender.answer(ask)
    return time.perf_counter() - begin


def report_requests(report: Report, ceilings: Ceilings, runs: int) -> None:
    """One request on a CPU."""
    text = topic_tokens(AutoTokenizer.from_pretrained(smollm2.fetch()))
    asks = [Ask([text[run * PROMPT : (run + 1) * PROMPT]], NEW) for run in range(runs + 1)]
    seconds: dict[str, list[float]] = {label: [] for label in ENGINES}
    with ExitStack() as stack:
        processes = {
            label: stack.enter_context(closing(EngineProcess(partial(open_engine, label), 1))) for label in ENGINES
        }
        for turn, ask in enumerate(asks):
            for label, process in processes.items():
                taken = process.call(time_request, ask)
                if turn:
                    seconds[label].append(taken)
    medians = {label: statistics.median(each) for label, each in seconds.items()}
    numbers = SMOLLM2.layers * sum(out * size for out, size in shapes_of(SMOLLM2)) + SMOLLM2.vocab * SMOLLM2.hidden
    limit = NEW * numbers / ceilings.read
    report.keep(request_seconds=medians, request_runs=seconds)
    report.say(f"one request, reading weights of 8 bits {NEW} times: {limit:.2f} s")
    for label, median in medians.items():
        line = f"one request, {PROMPT} prompt tokens, {NEW} new, {label}: {median:.2f} s"
        report.figure(f"request_{label}", median, line, at_most=INT8_SECONDS if label == "int8" else None)


def report_fp8_products(report: Report, timer: Timer, shape: Shape) -> None:
    """Errors and times of the products of one layer in FP8."""
    for outputs, inputs in shapes_of(shape):
        weight = fp8_linear.quantize(0.02 * torch.randn(outputs, inputs, device=timer.device, dtype=torch.bfloat16))
        fixed = weight._replace(scales=weight.scales.max()[None], input_scale=torch.ones(1, device=timer.device) / 64)
        for label, each in (("a scale per row", weight), ("one scale", fixed)):
            for rows in (1, 3, 33, 512):
                given = torch.randn(rows, inputs, device=timer.device, dtype=torch.bfloat16)
                exact = fp8_linear.fp8_linear_reference(given.float(), each)
                for skinny in {False, rows <= skinny_gemm.MAX_ROWS and skinny_gemm.supports(each.codes)}:
                    torch.compiler.reset()  # each is compiled for its own sizes
                    multiply = torch.compile(partial(fp8_linear.fp8_linear, given, each, skinny=skinny))
                    error = float((multiply().float() - exact).norm() / exact.norm())
                    taken = timer.cold(multiply).median
                    kernel = "our kernel" if skinny else "_scaled_mm"
                    text = f"{outputs} × {inputs}, {rows} rows, {label}, {kernel}: {taken:.1f} us, error {error:.3%}"
                    key = f"fp8_{outputs}_{inputs}_{rows}_{label}_{kernel}".replace(" ", "_")
                    report.figure(key, error, text, at_most=ERROR)


def report_fp8_request(report: Report, ceilings: Ceilings, shape: Shape, runs: int) -> None:
    """One request on a GPU, in bfloat16 and in FP8."""
    layers = shape.layers * sum(out * size for out, size in shapes_of(shape))
    head = shape.vocab * shape.hidden
    with tempfile.TemporaryDirectory() as folder:
        configuration(shape).save_pretrained(Path(folder))
        for quantization in (None, "fp8"):
            with Engine(
                folder, load_format="dummy", dtype="bfloat16", quantization=quantization, kv_tokens=8192
            ) as engine:
                taken = [ms_per_token(engine, shape, turn) for turn in range(runs + 1)][1:]
            median = statistics.median(taken)
            limit = 1e3 * ((1 if quantization else 2) * layers + 2 * head) / ceilings.read
            name = quantization or "bfloat16"
            text = f"one request, 8B shape, {name}: {median:.2f} ms per token; reading the weights: {limit:.2f}"
            report.figure(f"request_{name}_ms", median, text, at_most=FP8_MS if quantization else None)
            torch.cuda.empty_cache()


def ms_per_token(engine: Engine, shape: Shape, turn: int) -> float:
    prompt = [(7_919 * (turn + 1) + 31 * place) % shape.vocab for place in range(PROMPT)]
    seconds = []
    for new in (1, 257):
        begin = time.perf_counter()
        engine.generate([prompt], SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True))
        seconds.append(time.perf_counter() - begin)
        prompt = [prompt[-1], *prompt[:-1]]
    return 1e3 * (seconds[1] - seconds[0]) / 256


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--candidates", action="store_true", help="also operators that were not chosen")
    chosen = parser.parse_args(arguments)
    report = Report("quantized_weights")
    if torch.cuda.is_available():
        with torch.inference_mode():
            timer = Timer(torch.device("cuda"))
            skinny_gemm.register()
            ceilings = timer.ceilings()
            report.say(f"limit: {torch.cuda.get_device_name()} {ceilings.describe()}")
            report_fp8_products(report, timer, SHAPES["8B"])
        report_fp8_request(report, ceilings, SHAPES["8B"], chosen.runs)
        return report.finish(check=chosen.check, save=chosen.save)
    torch.set_num_threads(1)
    ceilings = cpu_ceilings(torch.bfloat16)
    report.say(f"limit: {ceilings.read / 1e9:.1f} GB/s, {ceilings.matrix / 1e9:.0f} GFLOP/s in bfloat16")
    report_requests(report, ceilings, chosen.runs)
    report_perplexity(report)
    with torch.inference_mode():
        report_products(report, ceilings, candidates=chosen.candidates)
    return report.finish(check=chosen.check, save=chosen.save)


if __name__ == "__main__":
    sys.exit(main())
