"""Agents that work at once under one system prompt: turns of conversations, each with a tool's result.

`python -m bench.agents [--check] [--save] [--agents N] [--turns N] [--system-tokens N] [--new-tokens N]`

One thread, one process, SmolLM2 in float32, greedy, special tokens suppressed so that every answer has its full length.
All agents take their turn as one burst, and wait for one another. Contenders: `AsyncEngine.conversation`; the same with
share=False, which computes each turn's whole prompt; transformers' `generate`, one conversation after another, each
with a `DynamicCache` of its own that is passed again every turn, and that begins as a copy of the system prompt's.

The limit is the time of the matrix products of the distinct tokens (each prefix of any conversation once, and logits of
each generated token) at the rate of one large product measured in the same run; attention, norms and Python are not in
it. Rows are counted by a hook at the model's input embedding, and are bounded: 2 % above the distinct tokens at most.

Bias: all agents act in step, so their bursts are as large as can be, and no tool keeps anyone waiting. `generate` can't
batch conversations that each have a cache. It is given our prompts, and what its cache has beyond them is cropped.
"""

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from bench.baseline import Generate, layer_operations, matrix_rate
from bench.report import Report, benchmark_options
from radixgen import AsyncConversation, AsyncEngine, Engine, RequestOutput, SamplingParams
from radixgen.chat.history import num_common
from radixgen.model import smollm2
from radixgen.model.quiet import quiet_transformers

TURN_TOKENS = 48
"""Room in the pool for what a turn adds beside the answer."""
NAMES = (
    "weather",
    "calendar",
    "search",
    "mail",
    "files",
    "maps",
    "stocks",
    "notes",
    "timer",
    "translate",
    "news",
    "math",
)


class RowCounter:
    """Counts the rows that go through a model's input embedding."""

    def __init__(self, model: nn.Module) -> None:
        self.rows = 0
        self._hook = model.get_input_embeddings().register_forward_hook(self._count)  # type: ignore[operator]

    def _count(self, _: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        self.rows += inputs[0].numel()

    def remove(self) -> None:
        self._hook.remove()


def system_prompt(tokenizer: Any, tokens: int) -> str:
    """Tools as JSON schemas after one sentence: about `tokens` tokens."""
    lines = ["You are a careful agent. You may call these tools:"]
    while len(ids := tokenizer("\n".join(lines), add_special_tokens=False)["input_ids"]) < tokens:
        name = f"{NAMES[len(lines) % len(NAMES)]}_{len(lines)}"
        arguments = {"query": {"type": "string"}, "limit": {"type": "integer"}}
        lines.append(json.dumps({"name": name, "parameters": {"type": "object", "properties": arguments}}))
    return str(tokenizer.decode(ids[:tokens]))


def message(agent: int, turn: int) -> dict[str, str]:
    """What an agent is told in a turn: its task, then what its tools gave."""
    if turn == 0:
        return {"role": "user", "content": f"Task {agent}: plan a day in city number {7 * agent + 3}."}
    found = {"tool": NAMES[(agent + turn) % len(NAMES)], "result": [agent * 31 + turn, agent + turn * 17]}
    return {"role": "tool", "content": json.dumps(found)}


class Agents:
    """What every contender is given, and how the first one answered."""

    def __init__(self, agents: int, turns: int, system: str, params: SamplingParams) -> None:
        self.agents = agents
        self.turns = turns
        self.system = system
        self.params = params
        self.outputs: list[list[RequestOutput]] = []
        """By turn, then by agent."""

    async def serve(self, engine: Engine) -> float:
        """Seconds for all turns of all agents."""
        async with AsyncEngine(engine) as served:
            talks = [served.conversation(self.system, params=self.params) for _ in range(self.agents)]
            begin = time.perf_counter()
            self.outputs = [await self._burst(talks, turn) for turn in range(self.turns)]
            seconds = time.perf_counter() - begin
            for talk in talks:
                assert not talk.breaks, talk.breaks
                await talk.close()
        return seconds

    async def _burst(self, talks: Sequence[AsyncConversation], turn: int) -> list[RequestOutput]:
        return await asyncio.gather(*(talk.say(message(agent, turn)) for agent, talk in enumerate(talks)))

    @property
    def sequences(self) -> list[list[int]]:
        """Each conversation whole, without the last token, which nobody needs."""
        return [output.prompt_token_ids + output.outputs[0].token_ids[:-1] for output in self.outputs[-1]]

    @property
    def submitted(self) -> int:
        """Tokens of all prompts."""
        return sum(len(output.prompt_token_ids) for burst in self.outputs for output in burst)

    @property
    def generated(self) -> int:
        return sum(len(output.outputs[0].token_ids) for burst in self.outputs for output in burst)

    @property
    def distinct(self) -> int:
        """Prefixes of any conversation, each once."""
        prefixes = set()
        for tokens in self.sequences:
            found = 0
            for token in tokens:
                found = hash((found, token))
                prefixes.add(found)
        return len(prefixes)

    def generate(self, model: Any, suppress: list[int]) -> float:
        """Seconds of transformers for the same turns."""
        begin = time.perf_counter()
        with torch.inference_mode():
            system = self._system_cache(model)
            for agent in range(self.agents):
                cache, cached = deepcopy(system), self._shared
                for burst in self.outputs:
                    prompt = burst[agent].prompt_token_ids
                    if surplus := len(cached) - num_common(cached, prompt):
                        cache.crop(-surplus)
                    cached = self._generate(model, cache, prompt, suppress)
        return time.perf_counter() - begin

    @property
    def _shared(self) -> list[int]:
        """What the first prompts begin with in common; all but their last token at the most."""
        prompts = [output.prompt_token_ids for output in self.outputs[0]]
        return prompts[0][: min(num_common(prompts[0][:-1], other) for other in prompts)]

    def _system_cache(self, model: Any) -> DynamicCache:
        cache = DynamicCache(config=model.config)
        model(torch.tensor([self._shared]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def _generate(self, model: Any, cache: DynamicCache, prompt: list[int], suppress: list[int]) -> list[int]:
        """The tokens that the cache holds afterwards."""
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            do_sample=False,
            min_new_tokens=self.params.max_tokens,
            max_new_tokens=self.params.max_tokens,
            suppress_tokens=suppress,
            pad_token_id=0,
        )
        return list(out[0, :-1].tolist())


def load(path: Path) -> Any:
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def serve(agents: Agents, model: Any, tokenizer: Any, slots: int, *, share: bool) -> tuple[float, int]:
    """Seconds, and rows through the embedding, of an engine that starts with nothing cached."""
    with Engine(model, tokenizer=tokenizer, kv_tokens=slots, share=share) as engine:
        engine.generate([[1, 2, 3]] * 2, SamplingParams(max_tokens=3))
        engine.reset_prefix_cache()
        counter = RowCounter(model)
        seconds = asyncio.run(agents.serve(engine))
        counter.remove()
    return seconds, counter.rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("--agents", type=int, default=32)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--system-tokens", type=int, default=600)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--model", type=Path, help="a directory; by default SmolLM2")
    parser.add_argument("--alone", action="store_true", help="no other contenders: they take most of the time")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    path = chosen.model or smollm2.fetch()
    tokenizer, model = AutoTokenizer.from_pretrained(path), load(path)
    quiet = dict.fromkeys(tokenizer.all_special_ids, -100.0)
    params = SamplingParams(temperature=0.0, max_tokens=chosen.new_tokens, logit_bias=quiet)
    agents = Agents(chosen.agents, chosen.turns, system_prompt(tokenizer, chosen.system_tokens), params)
    report = Report("agents")
    report.keep(**{name: getattr(chosen, name) for name in ("agents", "turns", "system_tokens", "new_tokens")})

    longest = chosen.system_tokens + chosen.turns * (chosen.new_tokens + TURN_TOKENS)
    slots = chosen.agents * longest
    seconds, rows = serve(agents, model, tokenizer, slots, share=True)
    submitted, generated, distinct = agents.submitted, agents.generated, agents.distinct
    row, logit_row = layer_operations(model)
    limit = (distinct * row + generated * logit_row) / matrix_rate(512)
    report.limit("matrix products of the distinct tokens", limit)
    report.contender("seconds_shared", "radixgen", seconds)
    report.keep(prompt_tokens=submitted, generated_tokens=generated, distinct_tokens=distinct, computed_rows=rows)
    text = f"{submitted:,} prompt tokens, {generated:,} generated, {distinct:,} distinct; {rows:,} rows: "
    report.figure("rows_over_distinct", rows / distinct, f"{text}{rows / distinct:.4f}", at_most=1.02)
    report.figure("submitted_over_rows", submitted / rows, f"prompt tokens over rows: {submitted / rows:.1f}")

    others = {}
    if not chosen.alone:
        others["generate"] = ("transformers generate", agents.generate(Generate(path).model, list(quiet)))
        others["unshared"] = ("radixgen, share=False", serve(agents, model, tokenizer, slots, share=False)[0])
    for key, (name, took) in others.items():
        report.contender(f"seconds_{key}", name, took)
        report.figure(f"{key}_over_shared", took / seconds, f"against {name}: {took / seconds:.2f}×")
    return report.finish(check=chosen.check, save=chosen.save)


if __name__ == "__main__":
    sys.exit(main())
