"""Writes what was measured into README.md (the demo, and workloads beside vLLM, transformers and llama.cpp), into
docs/benchmarks.md (all tables, and every miss), into docs/cluster.md (routing, several GPUs) and into docs/inexact.md
(reading policies).

`python -m bench.readme [--demo]`

The tables come from `bench/results/*.json`, which the benchmarks write with `--save`. `--demo` runs the demo on this
machine first and keeps its picture.
"""

import argparse
import json
import re
from collections.abc import Iterable
from io import StringIO
from typing import Any

import numpy as np
from rich.console import Console

from bench import cpu
from bench.attention import OWN
from bench.cluster_tables import draws, parallel, replicas, routing
from bench.compare import table
from bench.plots import cold
from bench.report import RESULTS
from bench.workloads import FULL, Scale, describe
from radixgen.demo import run, summary
from radixgen.model import smollm2

ROOT = RESULTS.parent.parent
README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
CLUSTER = ROOT / "docs" / "cluster.md"
INEXACT = ROOT / "docs" / "inexact.md"
PICTURE = ROOT / "docs" / "demo.svg"

TABLE = (
    "prefix", "unrelated", "agents", "thoughts", "explain", "serve", "http", "soak", "live", "tree", "admission",
    "plan", "step", "simulate", "cluster", "startup", "kv_dtype", "kv_dtype_gpu",
    "host_tier", "tiers", "restart", "top_blocks", "segments", "segments_gpu",
)  # fmt: skip
"""Benchmarks with bounds, in the order of docs/benchmarks.md."""
SHOWN = ("latency", "agents", "parallel", "prefix", "unshared")
"""The workloads of `bench.compare` that README.md shows"""
TRANSFORMERS = {
    "prefix": "{questions} questions on one document",
    "thoughts": "a tree of thoughts, {sequences} sequences",
    "agents": "{agents} agents, {turns} turns each",
    "unrelated": "{prompts} prompts that share nothing",
}
"""Benchmarks against transformers' `generate`, and what each runs, with fields of its results"""
ENGINES = {"W2": "W2, prefix of", "W3": "W3, two levels"}
CONTENDERS = {
    "auto": "radixgen", "unshared": "the same tree, read path by path", "private": "private copies, as many as fit",
    "prefix": "one common prefix only",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", action="store_true", help="run the demo and keep its output and picture")
    if parser.parse_args().demo:
        _keep_demo()
    text = README.read_text(encoding="utf-8")
    shown = (RESULTS / "demo.txt").read_text(encoding="utf-8").rstrip()
    text = _replace(text, "demo", f"```console\n{shown}\n```")
    README.write_text(_replace(text, "results", "\n".join(highlights())), encoding="utf-8")
    text = _replace(BENCHMARKS.read_text(encoding="utf-8"), "results", tables())
    BENCHMARKS.write_text(_replace(text, "misses", "\n".join(misses())), encoding="utf-8")
    text = _replace(CLUSTER.read_text(encoding="utf-8"), "routing", routing())
    text = _replace(text, "parallel", parallel())
    text = _replace(text, "draws", draws())
    CLUSTER.write_text(_replace(text, "replicas", replicas()), encoding="utf-8")
    INEXACT.write_text(_replace(INEXACT.read_text(encoding="utf-8"), "policies", policies()), encoding="utf-8")


def highlights() -> list[str]:
    """For README.md: some of the workloads beside vLLM, and what was measured against transformers."""
    found: dict[str, Any] = json.loads((RESULTS / "compare.json").read_text(encoding="utf-8"))
    ours, theirs = found["engines"]["radixgen"], found["engines"]["vllm"]
    words = in_words(FULL)
    lines = ["| workload | vLLM | radixgen | speedup |", "| --- | --- | --- | --- |"]
    for name in SHOWN:
        seconds = [one[name]["seconds"] for one in (theirs, ours)]
        lines.append(f"| {words[name]} | {seconds[0]:.2f} s | {seconds[1]:.2f} s | {seconds[0] / seconds[1]:.2f}× |")
    engines = [f"{name} {one['about']['version']}" for name, one in (("radixgen", ours), ("vLLM", theirs))]
    steps = [f"{one['about']['step_tokens']:,}" for one in (ours, theirs)]
    return [
        *lines,
        "",
        f"A Llama of 8B shape in bfloat16 on one {found['device']}: {' and '.join(engines)}, in steps of up to "
        f"{' and '.join(dict.fromkeys(steps))} tokens, torch {found['torch']}, {found['date']}.",
        "",
        *_against_transformers(),
        "",
        *_against_llama_cpp(),
    ]


def in_words(scale: Scale) -> dict[str, str]:
    """The workloads that README.md shows, for readers who have not seen their numbers before."""
    return {
        "latency": f"1 request: {scale.latency_prompt:,} prompt tokens, {scale.new} new",
        "agents": f"{scale.agents} agents, {scale.turns} turns each, one system prompt of {scale.system:,} tokens",
        "parallel": f"{scale.problems} prompts of {scale.root + scale.question:,} tokens, {scale.candidates} samples "
        f"of {scale.candidate} tokens each",
        "prefix": f"{scale.requests} requests on one cached prefix of {scale.prefix:,} tokens, {scale.new} new each",
        "unshared": f"{scale.unshared} requests that share nothing: {scale.latency_prompt:,} prompt tokens, "
        f"{scale.new} new each",
    }


def _against_transformers() -> list[str]:
    """SmolLM2 on a CPU: seconds of radixgen and of transformers' `generate`, the faster of the ways it was called."""
    lines = ["| workload | transformers | radixgen | speedup |", "| --- | --- | --- | --- |"]
    dates, versions = list[str](), list[str]()
    for name, words in TRANSFORMERS.items():
        found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        ours = found["seconds_radixgen" if "seconds_radixgen" in found else "seconds_shared"]
        theirs = min(seconds for key, seconds in found.items() if key.startswith("seconds_generate"))
        lines.append(f"| {words.format(**found)} | {theirs:.1f} s | {ours:.1f} s | {theirs / ours:.2f}× |")
        dates.append(found["date"])
        versions.append(f"transformers {found['transformers']}, torch {found['torch']}, {found['processor']}")
    about = "; ".join(dict.fromkeys(versions))
    return [*lines, "", f"SmolLM2-135M in float32: {about}, {min(dates)} to {max(dates)}."]


def _against_llama_cpp() -> list[str]:
    """SmolLM2 on a CPU: seconds in float32, and the speedup in bfloat16."""
    found: dict[str, Any] = json.loads((RESULTS / "cpu.json").read_text(encoding="utf-8"))
    lines = ["| workload | llama.cpp | radixgen | speedup | in bfloat16 |", "| --- | --- | --- | --- | --- |"]
    for name in filter(found.get, cpu.WORKLOADS):
        seconds = found[name]["seconds"]
        pairs = [(seconds[theirs], seconds[ours]) for theirs, ours in cpu.OURS.items()]
        gains = [f"{theirs / ours:.2f}×" for theirs, ours in pairs]
        theirs, ours = pairs[0]
        lines.append(f"| {found[name]['words']} | {theirs:.2f} s | {ours:.2f} s | {' | '.join(gains)} |")
    return [*lines, "", f"SmolLM2-135M in float32, threads: {found['threads']}; {_cpu_engines(found)}."]


def _cpu_engines(found: dict[str, Any]) -> str:
    """What `bench.cpu` ran, and where."""
    wide = [name for name in found["llama_cpp_features"] if name.startswith(("AVX", "AMX"))]
    versions = {**found["versions"], "torch": found["torch"]}
    names = [f"{name} {version}" for name, version in versions.items()]
    return f"{', '.join(names)}; llama.cpp uses {', '.join(wide)}; {found['processor']}, {found['date']}"


def _cpu() -> list[str]:
    """All contenders of `bench.cpu`."""
    found: dict[str, Any] = json.loads((RESULTS / "cpu.json").read_text(encoding="utf-8"))
    names, dtypes = list(filter(found.get, cpu.WORKLOADS)), list(cpu.DTYPES)
    labels = list(found[names[0]]["seconds"])
    heads = [*labels, *(f"limit in {dtype}" for dtype in dtypes)]
    lines = [
        f"`bench.cpu`, SmolLM2-135M, medians of {found['runs']}, threads: {found['threads']}; "
        f"{_cpu_engines(found)}. The bias is in its first lines.",
        "",
        f"| workload | {' | '.join(heads)} |",
        "| --- |" + " --- |" * len(heads),
    ]
    for name in names:
        seconds, limits = found[name]["seconds"], found[name]["limits"]
        cells = [f"{value:.2f} s" for value in (*map(seconds.get, labels), *map(limits.get, dtypes))]
        lines.append(f"| {found[name]['words']} | {' | '.join(cells)} |")
    return lines


def policies() -> str:
    """What docs/inexact.md shows of `bench.reading`: each policy at each share of keys, beside exact reading."""
    path = RESULTS / "reading.json"
    if not path.exists():
        return "No results are kept yet: `python -m bench.reading --save`, then `python -m bench.readme`."
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    length, context, of = found["needle_length"], found["context"], found["needles"]
    exact = found["exact_needles"][str(length)]
    lines = [
        "| policy | keys read | needles | equal tokens | decoding | needles, prompts too | perplexity | prefill |",
        "| --- |" + " --- |" * 7,
        f"| exact | {context:,} | {exact} of {of} | {found['continuation']} | 1 | {exact} of {of} | 1 | 1 |",
    ]
    for row in found["rows"]:
        cells = [f"{row['needles']} of {of}", f"{row['agreement']['tokens']:.1f}", f"{row['decode']:.2f}×"]
        prompts = ["–"] * 3
        if "perplexity" in row:
            prompts = [f"{row['needles_prompts']} of {of}", f"{row['perplexity']:.3f}×", f"{row['prefill']:.2f}×"]
        if "needles_together" in row:
            cells[0] += f" ({row['needles_together']} together)"
        lines.append(f"| {row['policy']} | {row['keys']:,} | {' | '.join(cells + prompts)} |")
    tried = ", ".join(f"{count} at {int(size):,}" for size, count in found["exact_needles"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"`python -m bench.reading`: SmolLM2-135M in float32, {found['processor']}, torch {found['torch']}, "
            f"{found['date']}, commit {found['commit']}. Needles in a text of {length:,} tokens; exact reading finds "
            f"{tried}. Everything else after {context:,} tokens; times are medians of {found['repeats']}.",
        ]
    )


def misses() -> list[str]:
    """Every bound that was missed, in any results, for docs/benchmarks.md."""
    lines = ["| benchmark | measured | bound |", "| --- | --- | --- |"]
    for path in sorted(RESULTS.glob("*.json")):
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        name, where = _module(path.stem), found.get("device", found["processor"])
        for text, bound in found["bounds"]:
            if bound.endswith(": missed") or _counted_as_missed(text, found["missed"]):
                lines.append(f"| {name}, {where} | {' '.join(text.split())} | {bound.split(':')[0]} |")
    return lines


def _module(results: str) -> str:
    """The benchmark that wrote results of this name, which may end with a workload or `gpu`."""
    return f"`bench.{re.sub('_(W[0-9]+|gpu)$', '', results)}`"


def _counted_as_missed(text: str, missed: Iterable[str]) -> bool:
    """Whether a bound of results that name only its key, as those of `bench.loads`, is among the missed ones."""
    keys = [key.split(": ") for key in missed if ": " in key]
    return any(text.startswith(tree) and text[len(tree) :].split(maxsplit=1)[0] == figure for tree, figure in keys)


def _compared(names: Iterable[str]) -> list[str]:
    """Workloads on whole engines, side by side."""
    found: dict[str, Any] = json.loads((RESULTS / "compare.json").read_text(encoding="utf-8"))
    engines = {one["about"]["engine"]: one["about"] for one in found["engines"].values()}
    about = " and ".join(f"{name} {one['version']} (steps of {one['step_tokens']:,})" for name, one in engines.items())
    return [
        *table(found["engines"], list(names), describe(FULL)),
        "",
        f"A Llama of 8B shape in bfloat16 by {about}, on one {found['device']}, torch {found['torch']}, "
        f"{found['date']}; behind each time its ratio to the least that the chip could take.",
    ]


def _host_tiers() -> list[str]:
    """Agents whose conversations the pool cannot hold, by both engines."""
    names = {"radixgen": "host_tier", "vLLM, by its offloading connector": "host_tier_vllm"}
    lines = [
        "| agents; the pool holds a third | without host memory | with | |",
        "| --- | --- | --- | --- |",
    ]
    for engine, name in names.items():
        found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        rates = [found[f"agents, {one}"]["tokens_per_second"] for one in ("without", "with")]
        lines.append(f"| {engine} | {rates[0]:,.0f} tokens/s | {rates[1]:,.0f} tokens/s | {found['agents']:.2f} × |")
    return lines


def _families() -> list[str]:
    """Steps of models of other shapes, as multiples of their limits."""
    found: dict[str, Any] = json.loads((RESULTS / "families.json").read_text(encoding="utf-8"))
    lines = [
        f"`bench.families` on one {found['device']} (torch {found['torch']}, {found['date']}): decoding steps of "
        "models of other shapes, 12 layers (DeepSeek 6, the 13B all), bfloat16.",
        "",
        "| model | rows | ms a step | of the limit |",
        "| --- | --- | --- | --- |",
    ]
    for key in [key.removesuffix("_limit_ms") for key in found if key.endswith("_limit_ms")]:
        name, rows = key.rsplit("_", 1)
        lines.append(f"| {name} | {rows} | {found[f'{key}_ms']:.2f} | {found[key]:.2f}× |")
    return lines


def _keep_demo() -> None:
    shown = run(smollm2.NAME)
    text = Console(record=True, width=110, file=StringIO())
    text.print(summary(shown.figures))
    lines = [line.rstrip() for line in text.export_text().splitlines()]
    (RESULTS / "demo.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    picture = Console(record=True, width=110, file=StringIO(), force_terminal=True)
    shown.print(picture)
    picture.save_svg(str(PICTURE), title="radixgen demo")


def tables() -> str:
    """What docs/benchmarks.md shows."""
    rows = ["| benchmark | measured | bound |", "| --- | --- | --- |"]
    places = []
    for name in TABLE:
        found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        where = f", {found['device']}" if "device" in found else ""
        rows += [f"| {_module(name)}{where} | {text} | {bound} |" for text, bound in found["bounds"]]
        places.append(f"{found.get('device', found['processor'])}, torch {found['torch']}, {found['date']}")
    return "\n".join(
        [
            *rows,
            "",
            "; ".join(dict.fromkeys(places)) + ".",
            "",
            *_compared(describe(FULL)),
            "",
            *_host_tiers(),
            "",
            *_families(),
            "",
            *_cpu(),
            "",
            *_simulated(),
            "",
            *_attention(),
            "",
            *_model(),
            "",
            *_engines(),
        ]
    )


def _attention() -> list[str]:
    """Our plan on a GPU, against the other plans and the peers, by workload and head shape."""
    found = json.loads((RESULTS / "attention.json").read_text(encoding="utf-8"))
    read, matrix = found["ceilings"]["read"], found["ceilings"]["matrix"]
    lines = [
        f"`bench.attention` on one {found['device']} ({read / 1e12:.2f} TB/s read, {matrix / 1e12:.0f} TFLOP/s, "
        f"measured; torch {found['torch']}, {found['date']}): one layer's attention, cold. The best other is the "
        f"fastest of our own unshared, one-prefix and naive plans by the same kernels, and {_peers(found['rows'])}.",
        "",
        "| workload | heads | trees | over the best other | over the best peer | over unshared | of the roofline |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for workload, heads in dict.fromkeys((row["workload"], tuple(row["heads"])) for row in found["rows"]):
        rows = [row for row in found["rows"] if (row["workload"], tuple(row["heads"])) == (workload, heads)]
        ours = np.array([row["contenders"]["radixgen"]["cold_us"] for row in rows])
        peers = np.array([cold(row, [name for name in row["contenders"] if name not in OWN]) for row in rows])
        others = np.fmin(peers, [cold(row, OWN[1:]) for row in rows])
        unshared = np.array([cold(row, ["unshared"]) for row in rows])
        share = np.array([row["roofline_us"] for row in rows]) / ours
        lines.append(
            f"| {workload} | {heads[0]}/{heads[1]} | {len(rows)} | {_mean(others / ours)} | {_mean(peers / ours)} "
            f"| {_mean(unshared / ours)} | {share.min():.0%} to {share.max():.0%} |"
        )
    return lines


def _engines() -> list[str]:
    """Whole engines on a GPU: what a decoding step took each contender."""
    lines = [
        "`bench.engine`, random weights of true shapes: sequences on one prefix, 13B (W2); 8 problems of 128 "
        "candidates each on one root, 8B (W3). The limit is that of so many sequences, held as the contender holds "
        "them.",
        "",
        "| workload | contender | sequences | ms a step | tokens/s | of the limit |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    notes = []
    for name, label in ENGINES.items():
        found: dict[str, Any] = json.loads((RESULTS / f"engine_{name}.json").read_text(encoding="utf-8"))
        steps = [(key.split("_")[1:], one) for key, one in found.items() if isinstance(one, dict) and "ms" in one]
        for (*place, contender), one in sorted(steps, key=lambda step: (len(step[0]), *map(int, step[0][:-1]))):
            what = " ".join([label, *(f"{int(prefix):,}" for prefix in place)])
            lines.append(
                f"| {what} | {CONTENDERS.get(contender, contender)} | {one['rows']:,} | {one['ms']:.1f} "
                f"| {1e3 * one['rows'] / one['ms']:,.0f} | {one['limit_ms'] / one['ms']:.0%} |"
            )
        bounds = [f"{text} ({bound})" for text, bound in found["bounds"]]
        merged = [found["merged"]] if "merged" in found else []
        measured = f"{name}: one {found['device']}, torch {found['torch']}, {found['date']}"
        notes.append("; ".join([measured, *bounds, *merged]) + ".")
    return [*lines, "", " ".join(notes)]


def _model() -> list[str]:
    """A model's step on a GPU, by the number of rows, as multiples of its limit."""
    found = json.loads((RESULTS / "model.json").read_text(encoding="utf-8"))
    kinds = {
        "eager": "transformers' own", "fused": "layers with one input fused", "compiled": "and compiled",
        "step": "whole step",
    }  # fmt: skip
    counts = [key.removeprefix("eager_") for key in found if re.fullmatch(r"eager_\d+", key)]
    return [
        f"`bench.model` on one {found['device']} (torch {found['torch']}, {found['date']}): Llama of {found['shape']} "
        "in CUDA graphs without attention, against reading its weights or multiplying by them; and a whole compiled "
        "step, each row with 64 tokens of its own on 4,096 shared ones, against that and reading each distinct key.",
        "",
        f"| rows | {' | '.join(kinds.values())} |",
        "| --- |" + " --- |" * len(kinds),
        *(f"| {rows} | " + " | ".join(f"{found[f'{kind}_{rows}']:.2f}×" for kind in kinds) + " |" for rows in counts),
    ]


def _peers(rows: list[dict[str, Any]]) -> str:
    """The other systems that were timed on any tree, in words."""
    words = {"pytorch": "PyTorch over private copies", "flashinfer": "FlashInfer", "fa3": "FlashAttention-3"}
    timed = {name.split("_")[0] for row in rows for name, one in row["contenders"].items() if "cold_us" in one}
    return " and ".join(text for name, text in words.items() if name in timed)


def _mean(ratios: Any) -> str:
    """Of those that are known."""
    known = ratios[~np.isnan(ratios)]
    return f"{np.exp(np.log(known).mean()):.2f}× ({known.min():.2f} to {known.max():.2f})" if known.size else "—"


def _simulated() -> list[str]:
    """Hit rates of the trace that went through the whole engine."""
    found = json.loads((RESULTS / "simulate.json").read_text(encoding="utf-8"))
    rows = [
        f"`bench.simulate`: {found['requests']:,} requests of a trace of conversations through the whole engine, on a "
        f"simulated clock. Ideal token hit rate {found['ideal_hit_rate']:.1%}.",
        "",
        "| KV pool, tokens | admitted by | token hit rate | of the ideal | median latency | × real time |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rows += [
        f"| {one['slots']:,} | {one['order']} | {one['hit_rate']:.1%} | {one['of_ideal']:.0%} "
        f"| {one['latency_p50_seconds']:.0f} s | {one['times_real_time']:.0f} |"
        for one in found["runs"]
    ]
    return rows + _mixes(found.get("mixes", []))


def _mixes(mixes: list[dict[str, Any]]) -> list[str]:
    """Mixes of requests in several orders of admission; nothing where none were kept."""
    if not mixes:
        return []
    rows = [
        "",
        "Mixes of requests in a KV pool of a quarter of their working set. *Unlimited* is a pool in which everything "
        "stays; *prompts free* is first come if prompts cost nothing to compute.",
        "",
        "| mix | admitted | requests a second | over first come | wait, p50 and p99 | prompt tokens computed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    return rows + [
        f"| {mix['mix']} | {one['order']} | {one['requests_per_second']:.2f} | {one['over_first_come']:.2f}× "
        f"| {one['wait_p50_seconds']:.0f} s, {one['wait_p99_seconds']:.0f} s | {one['computed']:.0%} |"
        for mix in mixes
        for one in mix["runs"]
    ]


def _replace(text: str, name: str, body: str) -> str:
    pattern = rf"(<!-- {name}: .*? -->\n).*?(<!-- end of {name} -->)"
    return re.sub(pattern, lambda m: f"{m[1]}{body}\n{m[2]}", text, flags=re.DOTALL)


if __name__ == "__main__":
    main()
