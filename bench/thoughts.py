"""Game of 24 by a tree of thoughts on SmolLM2: what sharing saves in rows and in seconds.

    python -m bench.thoughts [--check] [--save] [--quick] [--puzzles N] [--breadth N] [--depth N] [--proposals N]

Breadth-first search as in the Tree of Thoughts paper (arXiv 2305.10601), with the prompts of `examples/game24.py`: each
thought is proposed from `--proposals` times and judged by the odds of three words. One thread, one process, float32.

The limit is the time of the matrix products of the distinct tokens (each prefix of anything asked or generated, once)
and of their logits, at the rate of one large product measured in the same run; attention, norms and Python are not
in it. Rows are counted by a hook on the model's embedding. Contenders: radixgen; the same search with `share=False`;
and transformers, which is given the very same requests burst by burst, each burst as padded batches of up to
`--batch` sequences, once from the start and once with the KV of what all prompts begin with kept from a first pass.
With `--quick`, radixgen alone.

Bias: all lines are kept, right or wrong, so that a model of this size has a full tree to search. transformers draws as
many tokens a sequence as the longest of its batch took in the search, greedily; and the search itself, tokenization
and Python, is timed for radixgen alone.
"""

import asyncio
import copy
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.baseline import Generate, layer_operations, matrix_rate
from bench.report import Report, benchmark_options, track
from radixgen import Engine, RequestOutput, SamplingParams
from radixgen.model import smollm2
from radixgen.model.loader import load
from radixgen.thoughts import BreadthFirst, Propose, Result, search_async
from radixgen.thoughts.backend import SearchBackend, serving

sys.path.append(str(Path(__file__).parent.parent / "examples"))

from game24 import HEADER, JUDGE, Numbers, puzzles, root_of

Tokens = list[int]


@dataclass(frozen=True, slots=True)
class Asked:
    """One sequence: its prompt, and what was generated or, where `scored`, scored behind it."""

    prompt: Tokens
    rest: Tokens
    scored: bool


@dataclass(slots=True)
class Recorder:
    """A server that keeps all that goes through it, burst by burst: a burst begins when nothing is under way."""

    server: SearchBackend
    bursts: list[list[Asked]] = field(default_factory=list)
    prompt_tokens: int = 0
    """What would be computed for the prompts with no sharing, each sequence by itself"""
    _open: int = 0

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self.server.eos_token_ids

    async def tokenize(self, text: str, *, special: bool) -> Tokens:
        return await self.server.tokenize(text, special=special)

    async def decode(self, token_ids: Sequence[int]) -> str:
        return await self.server.decode(token_ids)

    async def computed_rows(self) -> int:
        return await self.server.computed_rows()

    async def generate(self, prompt: Sequence[int], params: SamplingParams) -> RequestOutput:
        burst = self._begin()
        output = await self.server.generate(prompt, params)
        self._open -= 1
        burst += [Asked(list(prompt), one.token_ids, False) for one in output.outputs]
        self.prompt_tokens += len(prompt) * len(output.outputs)
        return output

    async def score(self, prompt: Sequence[int], continuation: Sequence[int]) -> RequestOutput:
        burst = self._begin()
        output = await self.server.score(prompt, continuation)
        self._open -= 1
        burst.append(Asked(list(prompt), list(continuation), True))
        self.prompt_tokens += len(prompt) + len(continuation) - 1
        return output

    def _begin(self) -> list[Asked]:
        if not self._open:
            self.bursts.append([])
        self._open += 1
        return self.bursts[-1]


def distinct_tokens(asked: Sequence[Asked]) -> int:
    """How many different prefixes there are to compute; the last token of a sequence is not."""
    trie: dict[int, Any] = {}
    count = 0
    for one in asked:
        node = trie
        for token in [*one.prompt, *one.rest][:-1]:
            if token not in node:
                node[token] = {}
                count += 1
            node = node[token]
    return count


def common_prefix(asked: Sequence[Asked]) -> Tokens:
    """What all prompts begin with, one token short of the shortest."""
    first, last = min(one.prompt for one in asked), max(one.prompt for one in asked)
    shortest = min(len(one.prompt) for one in asked) - 1
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), shortest)
    return first[: min(same, shortest)]


def batches(bursts: Sequence[Sequence[Asked]], size: int) -> Iterator[list[Asked]]:
    for burst in bursts:
        for scored in (False, True):
            kind = [one for one in burst if one.scored == scored]
            yield from (kind[i : i + size] for i in range(0, len(kind), size))


class Replay:
    """Recorded requests through transformers, on top of a prefix whose KV is kept (or of none)."""

    def __init__(self, model: Any, prefix: Tokens) -> None:
        self.model = model
        self.prefix = prefix
        self.cache: Any = None
        if prefix:
            self.cache = model(torch.tensor([prefix]), use_cache=True).past_key_values

    def run(self, batch: Sequence[Asked]) -> torch.Tensor:
        """Of generated sequences all ids; of scored ones the log-probabilities behind the shortest prompt."""
        return self._score(batch) if batch[0].scored else self._generate(batch)

    def _generate(self, batch: Sequence[Asked]) -> torch.Tensor:
        ids, mask = self._padded([one.prompt for one in batch], left=True)
        count = max(len(one.rest) for one in batch)
        out: torch.Tensor = self.model.generate(
            ids,
            attention_mask=mask,
            past_key_values=self._kept(len(batch)),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=0,
        )
        return out

    def _score(self, batch: Sequence[Asked]) -> torch.Tensor:
        ids, mask = self._padded([[*one.prompt, *one.rest] for one in batch], left=False)
        done = len(self.prefix)
        keep = ids.shape[1] - min(len(one.prompt) for one in batch) + 1
        kept = self._kept(len(batch))
        out = self.model(ids[:, done:], attention_mask=mask, past_key_values=kept, logits_to_keep=keep)
        scores: torch.Tensor = out.logits.log_softmax(-1)
        return scores

    def _kept(self, count: int) -> Any:
        """The prefix's KV for `count` sequences."""
        if self.cache is None:
            return None
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(count)
        return cache

    def _padded(self, rows: Sequence[Tokens], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask; padding stands behind the prefix, or at the end."""
        longest, done = max(map(len, rows)), len(self.prefix)
        ids, mask = [], []
        for row in rows:
            pad, rest = [0] * (longest - len(row)), row[done:]
            shown = [1] * len(rest)
            ids.append(self.prefix + (pad + rest if left else rest + pad))
            mask.append([1] * done + (pad + shown if left else shown + pad))
        return torch.tensor(ids), torch.tensor(mask)


class Rows:
    """Rows that went through the model's input embedding."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        model.get_input_embeddings().register_forward_hook(self._see)

    def _see(self, _: Any, inputs: tuple[torch.Tensor], __: Any) -> None:
        self.count += inputs[0].numel()


@dataclass(frozen=True, slots=True)
class Searched:
    """What came of all puzzles in one engine."""

    results: list[Result]
    bursts: list[list[Asked]]
    prompt_tokens: int
    rows: int
    logit_rows: int
    seconds: float


def search_all(path: Path, games: Sequence[Numbers], chosen: Any, *, share: bool) -> Searched:
    loaded = load(str(path), "float32", "cpu")
    rows = Rows(loaded.model)
    results, bursts, prompt_tokens, seconds = [], [], 0, 0.0
    with Engine(loaded.model, tokenizer=loaded.tokenizer, kv_tokens=chosen.kv_tokens, share=share) as engine:
        engine.generate(["warm up"], SamplingParams(max_tokens=2))
        engine.reset_prefix_cache()
        rows.count, before = 0, engine.stats().logit_rows
        for numbers in track(games, f"share={share}"):
            begin = time.perf_counter()
            result, recorder = asyncio.run(search_one(engine, numbers, chosen))
            seconds += time.perf_counter() - begin
            results.append(result)
            bursts += recorder.bursts
            prompt_tokens += recorder.prompt_tokens
        logit_rows = engine.stats().logit_rows - before
    return Searched(results, bursts, prompt_tokens, rows.count, logit_rows, seconds)


async def search_one(engine: Engine, numbers: Numbers, chosen: Any) -> tuple[Result, Recorder]:
    propose = Propose(n=chosen.proposals, params=SamplingParams(max_tokens=chosen.new_tokens, stop="\n"))
    strategy = BreadthFirst(breadth=chosen.breadth, depth=chosen.depth)
    async with serving(engine, "") as server:
        recorder = Recorder(server)
        root = root_of(numbers)
        return await search_async(recorder, root, propose=propose, evaluate=JUDGE, strategy=strategy), recorder


@torch.inference_mode()
def replay_seconds(model: Any, searched: Searched, prefix: Tokens, size: int) -> float:
    begin = time.perf_counter()
    replay = Replay(model, prefix)
    for batch in track(list(batches(searched.bursts, size)), "transformers"):
        replay.run(batch)
    return time.perf_counter() - begin


def main(arguments: list[str] | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("--quick", action="store_true", help="radixgen alone, without contenders")
    parser.add_argument("--model", type=Path, help="a directory; by default SmolLM2")
    parser.add_argument("--puzzles", type=int, default=1)
    parser.add_argument("--breadth", type=int, default=5)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--proposals", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=32, help="of a line, at the most")
    parser.add_argument("--batch", type=int, default=40, help="sequences that transformers is given at once")
    parser.add_argument("--kv-tokens", type=int, default=24_576)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    path = chosen.model or smollm2.fetch()
    report = Report("thoughts")
    games = puzzles(chosen.puzzles)
    shared = search_all(path, games, chosen, share=True)
    asked = [one for burst in shared.bursts for one in burst]
    distinct, generated = distinct_tokens(asked), sum(result.cost.generated_tokens for result in shared.results)
    report.keep(
        puzzles=len(games), breadth=chosen.breadth, depth=chosen.depth, proposals=chosen.proposals,
        sequences=len(asked), generated_tokens=generated, distinct_tokens=distinct,
        expansions=sum(result.expansions for result in shared.results), header_characters=len(HEADER),
    )  # fmt: skip

    row, logit_row = layer_operations(Generate(path).model)
    limit = (distinct * row + shared.logit_rows * logit_row) / matrix_rate(512)
    report.limit(f"matrix products of {distinct:,} distinct tokens", limit)
    report.contender("seconds_shared", "radixgen", shared.seconds)
    submitted = shared.prompt_tokens
    report.figure("prompt_tokens", submitted, f"prompt tokens submitted, each sequence by itself: {submitted:,}")
    report.figure("rows", shared.rows, f"rows computed: {shared.rows:,}")
    over = shared.rows / distinct
    report.figure("rows_over_distinct", over, f"rows over distinct tokens: {over:.4f}", at_most=1.02)
    if not chosen.quick:
        compare(report, path, games, chosen, shared)
    return report.finish(check=chosen.check, save=chosen.save)


def compare(report: Report, path: Path, games: Sequence[Numbers], chosen: Any, shared: Searched) -> None:
    """The contenders, and how many times as long they take."""
    prefix = common_prefix([one for burst in shared.bursts for one in burst])
    model = Generate(path).model
    seconds = {
        "generate_prefix": replay_seconds(model, shared, prefix, chosen.batch),
        "generate": replay_seconds(model, shared, [], chosen.batch),
    }
    unshared = search_all(path, games, chosen, share=False)
    seconds["unshared"] = unshared.seconds
    report.figure("rows_unshared", unshared.rows, f"rows computed with share=False: {unshared.rows:,}")
    names = {
        "generate_prefix": f"transformers, {len(prefix)} kept",
        "generate": "transformers",
        "unshared": "radixgen, share=False",
    }
    for key, name in names.items():
        report.contender(f"seconds_{key}", name, seconds[key])
    for key, name in names.items():
        gain = seconds[key] / shared.seconds
        report.figure(f"{key}_over_shared", gain, f"against {name}: {gain:.2f}×")
    texts = [[one.text for one in result.thoughts] for result in shared.results]
    report.keep(equal_trees=texts == [[one.text for one in result.thoughts] for result in unshared.results])


if __name__ == "__main__":
    sys.exit(main())
