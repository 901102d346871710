"""Tables of docs/cluster.md: routing, several GPUs, replicas."""

import json
from typing import Any

from bench.report import RESULTS


def parallel() -> str:
    """What docs/cluster.md shows of `bench.parallel`: sums over GPUs, and a model over several beside one."""
    found: dict[str, Any] = json.loads((RESULTS / "parallel.json").read_text(encoding="utf-8"))
    ranks, reduces, exact = found["ranks"], found["reduce"]["us"], found.get("exact")
    lines = ["| all-reduce, bfloat16 | our kernel | NCCL | speedup |", "| --- | --- | --- | --- |"]
    for size in (size for size in reduces if not size.endswith(" by nccl")):
        ours, theirs = reduces[size], reduces[f"{size} by nccl"]
        lines.append(f"| {size.replace('x', '×')} | {ours:.1f} µs | {theirs:.1f} µs | {theirs / ours:.2f}× |")
    lines += [
        "",
        f"| workload | 1 GPU | {ranks} GPUs | speedup | a step on {ranks} GPUs | limit of that step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    words = {
        ("many", "latency"): "8B shape, one request",
        ("many", "prefix"): "8B shape, 256 requests on one prefix",
        ("many", "prefill"): "8B shape, prompts that share nothing",
        ("large", "wide"): "70B shape, 64 requests that share nothing",
    }
    lines += [f"| {what} | {' | '.join(_over_gpus(found, *key))} |" for key, what in words.items() if key[0] in found]
    compared = "Its part `exact`, which compares tokens with those of one process, was not run."
    if exact:
        count = exact["equal"] + len(exact["different"])
        compared = f"{exact['equal']} of {count} answers of tiny models were equal to those of one process."
    return "\n".join(
        [
            *lines,
            "",
            f"`python -m bench.parallel --ranks {ranks}` on {ranks} × {found['device']}, torch {found['torch']}, "
            f"{found['date']}, commit {found['commit']}; weights are random, in bfloat16. The limit of a step is "
            "reading weights and keys once, divided by the ranks, and two all-reduces per layer as measured above. "
            f"{compared}",
        ]
    )


def draws() -> str:
    """What docs/cluster.md shows of `bench.parallel_draws`."""
    found: dict[str, Any] = json.loads((RESULTS / "parallel_draws.json").read_text(encoding="utf-8"))
    lines = ["| a step, by what draws | own logits | all gathered | |", "| --- | --- | --- | --- |"]
    for name, figures in found.items():
        if isinstance(figures, dict):
            own, gathered = figures["ms"], figures["gathered_ms"]
            lines.append(f"| {name} | {own:.2f} ms | {gathered:.2f} ms | {gathered / own:.3f}× |")
    where = f"{found['ranks']} × {found['device']}, torch {found['torch']}, {found['date']}, commit {found['commit']}"
    return "\n".join(
        [*lines, "", f"`python -m bench.parallel_draws` on {where}; top-p without top-k gathers either way."]
    )


def replicas() -> str:
    """What docs/cluster.md shows of `bench.data_parallel`: replicas with a GPU each beside one."""
    found: dict[str, Any] = json.loads((RESULTS / "data_parallel.json").read_text(encoding="utf-8"))
    lines = ["| replicas × agents | tokens/s | speedup | prompt tokens not computed |", "| --- | --- | --- | --- |"]
    rows = [(name, figures) for name, figures in found.items() if " x " in name]
    for name, figures in rows:
        ratio = figures["throughput"] / rows[0][1]["throughput"]
        cells = f"{figures['throughput']:,.0f} | {ratio:.2f}× | {figures['hit_rate']:.1%}"
        lines.append(f"| {name.replace(' x ', ' × ')} | {cells} |")
    about = f"`python -m bench.data_parallel` on {found['device']}s, torch {found['torch']}, {found['date']}"
    return "\n".join([*lines, "", f"{about}, commit {found['commit']}; 8B shape, random weights, bfloat16."])


def _over_gpus(found: dict[str, Any], part: str, name: str) -> list[str]:
    """Cells of one workload: seconds on one GPU and on all, their ratio, milliseconds of a step and their limit."""
    figures = found[part]
    ours, one = figures["workloads"][name], found.get("one", {}).get("workloads", {}).get(name)
    cells = [f"{one['seconds']:.2f} s" if one else "–", f"{ours['seconds']:.2f} s"]
    cells.append(f"{one['seconds'] / ours['seconds']:.2f}×" if one else "–")
    if "limit_ms" not in ours:
        return [*cells, "–", "–"]
    reduce = found["reduce"]["us"][f"{ours['rows']} x {figures['hidden']}"]
    limit = ours["limit_ms"] + 2 * figures["layers"] * reduce / 1e3
    return [*cells, f"{ours['ms_a_step']:.2f} ms ({ours['ms_a_step'] / limit:.2f}× the limit)", f"{limit:.2f} ms"]


def routing() -> str:
    """What docs/cluster.md shows of `bench.cluster`: hit rates and p99 waits of each contender and setting."""
    found: dict[str, Any] = json.loads((RESULTS / "cluster.json").read_text(encoding="utf-8"))
    settings = found["settings"]
    tried = [one for one in settings if "variants" in one]
    faults = [{**one, "contenders": one["faults"]} for one in tried]
    return "\n".join(
        [
            "Token hit rate, and p99 of the wait for the first token:",
            "",
            *_waits(settings, settings[0]["contenders"]),
            "",
            "With replicas that die and return (one pool does not):",
            "",
            *_waits(faults, faults[0]["contenders"]),
            "",
            "Other settings of our rule, and other rules:",
            "",
            *_variants(tried),
            "",
            f"`bench.cluster`, {found['date']}; times are the simulated clock's.",
        ]
    )


def _waits(settings: list[dict[str, Any]], contenders: list[dict[str, Any]]) -> list[str]:
    """A row a setting: one pool of the sum, then the contenders."""
    names = [one["contender"] for one in contenders]
    lines = [
        f"| workload | replicas | sessions | one pool | {' | '.join(names)} |",
        "| --- |" + " --- |" * (len(names) + 3),
    ]
    for one in settings:
        cells = [_wait(row) for row in (one["limit"], *one["contenders"])]
        lines.append(f"| {one['workload']} | {one['replicas']} | {one['sessions']:,} | {' | '.join(cells)} |")
    return lines


def _variants(settings: list[dict[str, Any]]) -> list[str]:
    """A row a rule, a column a setting."""
    titles = [f"{one['replicas']} replicas" for one in settings]
    lines = [f"| {settings[0]['workload']}, {settings[0]['sessions']:,} sessions | {' | '.join(titles)} |"]
    lines.append("| --- |" + " --- |" * len(titles))
    columns = zip(*([one["contenders"][0], *one["variants"]] for one in settings), strict=True)
    lines += [f"| {rows[0]['contender']} | {' | '.join(_wait(row) for row in rows)} |" for rows in columns]
    return lines


def _wait(row: dict[str, Any]) -> str:
    return f"{row['hit_rate']:.1%}, {row['wait_p99_seconds']:.1f} s"
