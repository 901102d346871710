"""Reports in the terminal."""

import json
from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from radixgen.core.reading import reading_to_json
from radixgen.explain import Divergence, Report
from radixgen.explain.reading import ReadingReport, UnreadAttention
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


def render_reading(report: ReadingReport) -> Iterator[RenderableType]:
    """Parts of the report on a reading policy: a summary, and the prompts that were measured."""
    overall = report.overall
    yield Text(json.dumps(reading_to_json(report.reading)), style="dim")
    yield Text.assemble(
        f"rows read {overall.keys_read:,.0f} of {overall.keys:,.0f} keys, and leave ",
        (f"{overall.unread:.1%}", "bold yellow"),
        " of their attention unread",
    )
    table = Table(title=f"{len(report.measured):,} of {report.prompts:,} prompts", title_justify="left")
    table.caption = "unread: share of attention in keys that are not read, on average over rows, layers and heads"
    table.caption_justify = "left"
    for name in ("prompt", "tokens", "rows", "keys", "read", "unread", "worst head"):
        table.add_column(name, justify="right")
    for one in report.measured:
        table.add_row(f"{one.prompt + 1:,}", f"{one.tokens:,}", *_cells(one.attention))
    table.add_section()
    table.add_row("all", "", *_cells(overall))
    yield table


def _cells(attention: UnreadAttention) -> tuple[str, ...]:
    return (
        f"{attention.rows:,}",
        f"{attention.keys:,.0f}",
        f"{attention.keys_read:,.0f}",
        f"{attention.unread:.1%}",
        f"{attention.worst_unread:.1%} (layer {attention.worst_layer}, head {attention.worst_head})",
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
