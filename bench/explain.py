"""`radixgen explain` on a log with a timestamp near the top of each prompt.

`python -m bench.explain [--check] [--prompts N] [--tokens N]`

A system prompt of rules with the time of the request on its second line, documents that some requests have in common,
and a question of each request's own; SmolLM2's tokenizer, one process. Timed is what the command does, from the file to
the report. The limit is reading the file as JSON; tokenizing all of it whole, as a command would that knows nothing of
lines, is timed on a hundredth of the prompts and multiplied.

Bias: the log is ours. Nine lines in ten of a prompt stand in other prompts too and are tokenized once; with `--fresh`
that holds for the system prompt's alone. Its words are the demo document's and some thousand made-up ones, so that few
words are tokenized; a log in which each word is new would take the time of tokenizing it whole.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import Report, benchmark_options
from radixgen.cli.prompts import read_requests
from radixgen.explain import PromptText, explain
from radixgen.model.loader import load_tokenizer

MAX_SECONDS = 20.0
_LINE_WORDS = 16
_SYLLABLES = ("re", "con", "ta", "li", "mo", "ver", "sen", "da", "pro", "ki", "lu", "ne", "ras", "ti", "bo", "gen")


def prompts(count: int, tokens: int, tokenizer: Any, seed: int, *, fresh: bool = False) -> Iterator[str]:
    """`count` prompts of about so many tokens each."""
    rng = np.random.default_rng(seed)
    document = resources.files("radixgen.demo").joinpath("document.md").read_text(encoding="utf-8").split()
    made_up = ["".join(rng.choice(_SYLLABLES, rng.integers(2, 4))) for _ in range(len(document) // 8)]
    words = np.array([*document, *made_up])

    def lines(number: int) -> list[str]:
        return [f"- {' '.join(line)}." for line in rng.choice(words, (number, _LINE_WORDS))]

    per_line = len(tokenizer("\n".join(lines(50)))["input_ids"]) / 50
    size = max(4, round(tokens / per_line) - 3)
    rules, documents = lines(size * 6 // 10), [lines(size * 3 // 10) for _ in range(40)]
    time_of_request = datetime(2026, 1, 5, 8, tzinfo=UTC)
    for _ in range(count):
        time_of_request += timedelta(seconds=float(rng.exponential(7.0)))
        chosen = lines(size * 3 // 10) if fresh else documents[rng.integers(len(documents))]
        question = lines(size - len(rules) - len(chosen))
        head = ["You answer from the documents below.", f"Current time: {time_of_request:%Y-%m-%d %H:%M:%S}"]
        yield "\n".join([*head, *rules, *chosen, *question])


def write(path: Path, texts: Iterator[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"prompt": text}) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="no document stands in two prompts")
    parser.add_argument("--model", default="smollm2")
    chosen = parser.parse_args(arguments)
    tokenizer = load_tokenizer(chosen.model)
    report = Report("explain")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.jsonl"
        write(path, prompts(chosen.prompts, chosen.tokens, tokenizer, chosen.seed, fresh=chosen.fresh))
        begin = time.perf_counter()
        texts = [PromptText(request["prompt"]) for request in read_requests(None, path)]
        report.limit(f"reading {path.stat().st_size / 1e6:.0f} MB of JSON", time.perf_counter() - begin)
        sample = [one.text for one in texts[:: min(100, len(texts))]]
        begin = time.perf_counter()
        tokenizer(sample)
        whole = (time.perf_counter() - begin) * len(texts) / len(sample)
        begin = time.perf_counter()
        processor = time.process_time()
        logged = [PromptText(request["prompt"]) for request in read_requests(None, path)]
        found = explain(logged, load_tokenizer(chosen.model))
        seconds = time.perf_counter() - begin
        report.keep(processor_seconds=time.process_time() - processor)
    report.keep(prompts=found.prompts, tokens=found.tokens, distinct_tokens=found.distinct_tokens)
    report.contender("seconds_whole", "tokenizing it whole", whole)
    report.contender("seconds_explain", "radixgen explain", seconds)
    told = f"{seconds:.1f} s for {found.prompts:,} prompts of {found.tokens:,} tokens"
    report.figure("seconds", seconds, told, at_most=MAX_SECONDS)
    first = found.divergences[0] if found.divergences else None
    named = first is not None and first.kind == "timestamp" and first.line == 2
    report.figure("timestamp_first", float(named), "the timestamp on line 2 is named first", at_least=1)
    report.keep(divergences=found.as_dict()["divergences"])
    return report.finish(check=chosen.check, save=chosen.save)


if __name__ == "__main__":
    sys.exit(main())
