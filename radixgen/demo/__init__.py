"""Demo: a burst of overlapping requests on one document, with and without prefix sharing."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.resources import files

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from radixgen.core import RequestOutput, SamplingParams, Stats
from radixgen.engine.engine import Engine
from radixgen.progress import Say, announce_loading, waiting
from radixgen.tree_view import NodeView, picture, snapshot

QUESTIONS = (
    "How tall is the tower?",
    "Who built the light, and how old was she?",
    "Why must the keepers always have a cat?",
    "How tall is the tower?",
    "What happened on the ninth of January 1869?",
    "What did the first lamp burn?",
    "How long could the boat not land in 1927?",
    "What was the Widow?",
    "When does the horn sound today?",
    "What does a ticket cost?",
    "Why are dogs not allowed?",
    "When did the last keepers leave?",
)
SAMPLED = "Write one sentence that invites people to visit the island."
FOLLOW_UP = "And how many steps does it have?"
KV_TOKENS = 32_768
_TOKENS_BEFORE_LOOK = 8

Watch = Callable[[int, RequestOutput], None]


@dataclass(frozen=True, slots=True)
class DemoRequest:
    """Request of the demo."""

    question: str
    prompt: list[int]
    params: SamplingParams


@dataclass(slots=True)
class BurstResult:
    """Outputs and statistics of a burst."""

    outputs: list[RequestOutput]
    seconds: float
    stats: Stats
    tree: list[NodeView] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Figures:
    """Measurements of the demo, printed as JSON in its last line: tokens, bytes, seconds."""

    requests: int
    sequences: int
    prompt_tokens_submitted: int
    """Without sharing, all of them are computed, once for each of a request's `n` sequences."""
    prompt_tokens_computed: int
    tokens_stored: int
    tokens_separate_caches: int
    kv_bytes_read: int
    kv_bytes_unshared: int
    seconds_shared: float
    seconds_unshared: float
    greedy_answers_equal: bool


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Tree and measurements of the demo."""

    tree: list[NodeView]
    figures: Figures

    def print(self, console: Console) -> None:
        """Print the tree and a table of the measurements."""
        console.print(picture(self.tree))
        console.print(summary(self.figures))


def run(model: str, max_tokens: int = 40, console: Console | None = None) -> DemoResult:
    """Run the burst with and without sharing; print answers, tree and measurements, the last line as JSON."""
    console = console or Console()
    document = files(__package__).joinpath("document.md").read_text(encoding="utf-8")
    with waiting(console) as say:
        announce_loading(say, model)
        engine = Engine(model, dtype="float32", kv_tokens=KV_TOKENS, warm_up=False)
    with engine:
        jobs = burst(engine, document, max_tokens)
        console.print(f"[bold]{len(jobs)} requests on one document of {len(document.split())} words[/]")
        with answers(console, jobs) as watch:
            shared = serve(engine, jobs, watch)
        second = follow_up(engine, document, shared.outputs[0].outputs[0].text, max_tokens)
        again = serve(engine, [second])
        _show_follow_up(console, second, again.outputs[0])
    with waiting(console) as say:
        say("the same requests with share=False")
        with Engine(model, dtype="float32", kv_tokens=KV_TOKENS, share=False, warm_up=False) as engine:
            alone = serve(engine, [*jobs, second], _counted(say, len(jobs) + 1))
    figures = _figures([*jobs, second], shared, again, alone)
    result = DemoResult(shared.tree, figures)
    result.print(console)
    console.print(json.dumps(asdict(figures)), soft_wrap=True, highlight=False, markup=False)
    return result


def burst(engine: Engine, document: str, max_tokens: int) -> list[DemoRequest]:
    """A dozen questions about `document`, two of them identical, and a prompt with eight samples."""
    greedy = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    eight = SamplingParams(temperature=0.8, top_p=0.95, n=8, seed=1, max_tokens=max_tokens)
    pairs = [(question, greedy) for question in QUESTIONS] + [(SAMPLED, eight)]
    return [DemoRequest(q, engine.chat_tokens(_messages(document, q)), engine.inputs.for_chat(p)) for q, p in pairs]


def follow_up(engine: Engine, document: str, answer: str, max_tokens: int) -> DemoRequest:
    """The conversation of the first question, with a second question."""
    messages = [
        *_messages(document, QUESTIONS[0]),
        {"role": "assistant", "content": answer},
        {"role": "user", "content": FOLLOW_UP},
    ]
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return DemoRequest(FOLLOW_UP, engine.chat_tokens(messages), engine.inputs.for_chat(params))


def serve(engine: Engine, jobs: Sequence[DemoRequest], watch: Watch = lambda *_: None) -> BurstResult:
    """Submit all requests at once and step until they have finished.

    watch: called with the index of a request and each of its outputs.
    """
    begin = time.perf_counter()
    indices = {engine.submit(job.prompt, job.params): index for index, job in enumerate(jobs)}
    done: dict[int, RequestOutput] = {}
    busiest: list[NodeView] = []
    looking = 0.0
    while engine.has_unfinished:
        for output in engine.step():
            watch(indices[output.request_id], output)
            if output.finished:
                done[indices[output.request_id]] = output
        if not busiest and engine.stats().generated_tokens >= _TOKENS_BEFORE_LOOK * len(jobs):
            looked = time.perf_counter()
            busiest = engine.inspect(lambda core: snapshot(core.tree, engine.decode))
            looking = time.perf_counter() - looked
    seconds = time.perf_counter() - begin - looking
    return BurstResult([done[index] for index in range(len(jobs))], seconds, engine.stats(), busiest)


@contextmanager
def answers(console: Console, jobs: Sequence[DemoRequest]) -> Iterator[Watch]:
    """Show answers as they are generated; if the output is not a terminal, when they are complete."""
    blocks = [Text(f"… {job.question}", style="bold") for job in jobs]
    with Live(console=console, refresh_per_second=8) as live:

        def watch(index: int, output: RequestOutput) -> None:
            mark = ("✓ ", "green") if output.finished else ("… ", "dim")
            texts = [f"\n    {' '.join(completion.text.split())}" for completion in output.outputs]
            blocks[index] = Text.assemble(mark, (jobs[index].question, "bold"), *texts)
            if console.is_terminal:
                live.update(Group(*blocks))
            elif output.finished:
                console.print(blocks[index])

        yield watch


def _counted(say: Say, total: int) -> Watch:
    finished: set[int] = set()

    def watch(index: int, output: RequestOutput) -> None:
        if output.finished:
            finished.add(index)
            say(f"the same requests with share=False: {len(finished)} of {total} done")

    return watch


def _messages(document: str, question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{document}\nAnswer from the text above. {question}"}]


def _show_follow_up(console: Console, job: DemoRequest, output: RequestOutput) -> None:
    console.print(f"[bold]A second turn on the first question:[/] {job.question}")
    console.print(Text(f"    {' '.join(output.outputs[0].text.split())}"))
    console.print(f"    {output.num_cached_tokens} of its {len(job.prompt)} prompt tokens were in the cache\n")


def _figures(jobs: Sequence[DemoRequest], shared: BurstResult, again: BurstResult, alone: BurstResult) -> Figures:
    stats = again.stats
    together = [*shared.outputs, *again.outputs]
    greedy = [i for i, job in enumerate(jobs) if job.params.greedy]
    separate = sum(
        output.num_prompt_tokens + len(completion.token_ids) - 1 for output in together for completion in output.outputs
    )
    return Figures(
        requests=len(jobs),
        sequences=sum(job.params.n for job in jobs),
        prompt_tokens_submitted=sum(len(job.prompt) for job in jobs),
        prompt_tokens_computed=stats.computed_prompt_tokens,
        tokens_stored=stats.kv_tokens_used,
        tokens_separate_caches=separate,
        kv_bytes_read=stats.kv_bytes_read,
        kv_bytes_unshared=stats.kv_bytes_unshared,
        seconds_shared=round(shared.seconds + again.seconds, 2),
        seconds_unshared=round(alone.seconds, 2),
        greedy_answers_equal=all(
            together[i].outputs[0].token_ids == alone.outputs[i].outputs[0].token_ids for i in greedy
        ),
    )


def summary(figures: Figures) -> Table:
    """Table of the measurements."""
    table = Table(title="What sharing saved", title_justify="left")
    for heading in ("", "shared", "separate", "ratio"):
        table.add_column(heading, justify="left" if not heading else "right")
    pairs: list[tuple[str, float, float]] = [
        ("prompt tokens computed", figures.prompt_tokens_computed, figures.prompt_tokens_submitted),
        ("tokens stored", figures.tokens_stored, figures.tokens_separate_caches),
        ("KV bytes read by attention", figures.kv_bytes_read, figures.kv_bytes_unshared),
        ("seconds", figures.seconds_shared, figures.seconds_unshared),
    ]
    for name, ours, others in pairs:
        table.add_row(name, f"{ours:,}", f"{others:,}", f"{others / ours:.1f}×")
    return table
