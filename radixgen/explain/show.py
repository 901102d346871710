"""Report in the terminal."""

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from radixgen.explain import Divergence, Report
from radixgen.tree_view import Decode, picture, snapshot

_MARKS = str.maketrans({"\n": "⏎", "\t": "→", "\r": "␍"})


def render_report(report: Report, decode: Decode) -> Iterator[RenderableType]:
    """Parts of the report: the tree, a summary, and the divergences. `decode` converts tokens to text."""
    yield picture(snapshot(report.tree, decode), children=4, depth=3)
    yield Text.assemble(
        f"{report.prompts:,} prompts of {report.tokens:,} tokens, {report.distinct_tokens:,} distinct: sharing saves ",
        (f"{report.saving:.1%}", "bold green"),
        " at best",
    )
    if report.inexact_prompts:
        yield Text.assemble(
            'with reuse="segments", sharing would save ',
            (f"{report.saving_segments:.1%}", "bold green"),
            f", with inexact outputs for {report.inexact_prompts:,} prompts",
        )
    if not report.divergences:
        yield Text("no divergence costs much: prompts differ after it, too", style="dim")
        return
    yield _table(report.divergences, report.tokens)
    yield Text.assemble(
        "with all of them remedied, sharing would save ", (f"{report.saving_remedied:.1%}", "bold green")
    )


def _table(divergences: Sequence[Divergence], tokens: int) -> Table:
    table = Table(title="Divergences of prompts with equal continuations", title_justify="left", title_style="bold")
    table.caption, table.caption_justify = (
        "lines and tokens are those of rendered prompts, including the chat template",
        "left",
    )
    for name in ("", "differs", "where", "in"):
        table.add_column(name)
    for name in ("prompts", "would save"):
        table.add_column(name, justify="right")
    for number, divergence in enumerate(divergences, 1):
        texts = (
            Text.assemble(_marked(divergence.frame, divergence.kind), "\n", _pair(divergence))
            if divergence.frame
            else _pair(divergence)
        )
        saved = f"{divergence.saved_tokens / tokens:.1%}"
        if number > 1:
            saved += f"\nalone {divergence.saved_alone / tokens:.1%}"
        table.add_row(
            str(number),
            Text.assemble((divergence.kind, "bold"), f"\n{divergence.remedy}"),
            f"line {divergence.line}\ntoken {divergence.position}",
            texts,
            f"{divergence.prompts:,}\n{divergence.variants:,} variants",
            saved,
        )
    return table


def _pair(divergence: Divergence) -> Text:
    here, there = _marked(divergence.here, divergence.kind), _marked(divergence.there, divergence.kind)
    return Text.assemble((here, "yellow"), (" / ", "dim"), (there, "cyan"))


def _marked(text: str, kind: str) -> str:
    """`text` in one line, with visible white space if that is what differs."""
    marked = text.translate(_MARKS)
    return marked.replace(" ", "·") if kind == "white space" else marked
