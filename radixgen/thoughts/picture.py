"""Drawing of a tree of thoughts, in the terminal and as SVG. All text is escaped."""

from html import escape

from rich.text import Text
from rich.tree import Tree

from radixgen.thoughts.result import Result
from radixgen.thoughts.thought import Thought

_SHOWN_CHARS = 60
_WIDTH, _GAP, _HEIGHT, _ROW = 250, 40, 34, 44
"""Pixels: width of a box, gap between columns, height of a box, distance of rows"""
_COLORS = {"solved": "#2da44e", "dead end": "#cf222e", "pruned": "#8c959f", "expanded": "#0969da", "open": "#57606a"}
_STYLES = {"solved": "bold green", "dead end": "red", "pruned": "bright_black", "expanded": "bold", "open": ""}


def picture(result: Result) -> Tree:
    """Rich tree with a line per thought: its score, its state and its text."""
    drawing = Tree(_label(result.root))
    branches = {result.root: drawing}
    for thought in result.thoughts[1:]:
        assert thought.parent is not None
        branches[thought] = branches[thought.parent].add(_label(thought))
    return drawing


def svg(result: Result) -> str:
    """SVG with a box per thought, in a column per depth; colors are states, and hovering shows the whole text."""
    rows = _rows(result)
    corners = {
        thought: (_GAP + thought.depth * (_WIDTH + _GAP), _GAP / 2 + row * _ROW) for thought, row in rows.items()
    }
    width = max(x for x, _ in corners.values()) + _WIDTH + _GAP
    height = max(y for _, y in corners.values()) + _ROW + _GAP / 2
    lines = [_line(corners[thought.parent], corners[thought]) for thought in corners if thought.parent is not None]
    boxes = [_box(thought, *corner) for thought, corner in corners.items()]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
            f'height="{height:g}" font-family="ui-monospace, monospace" font-size="11">',
            f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>',
            *lines,
            *boxes,
            "</svg>\n",
        ]
    )


def _rows(result: Result) -> dict[Thought, float]:
    """Row of each thought: leaves in order, parents at the middle of their children."""
    order: list[Thought] = []
    todo = [result.root]
    while todo:
        order.append(thought := todo.pop())
        todo += reversed(thought.children)
    leaves = (thought for thought in order if not thought.children)
    rows = {leaf: float(row) for row, leaf in enumerate(leaves)}
    for thought in reversed(order):
        if thought.children:
            rows[thought] = (rows[thought.children[0]] + rows[thought.children[-1]]) / 2
    return rows


def _line(parent: tuple[float, float], child: tuple[float, float]) -> str:
    x0, y0, x1, y1 = parent[0] + _WIDTH, parent[1] + _HEIGHT / 2, child[0], child[1] + _HEIGHT / 2
    middle = (x0 + x1) / 2
    curve = f"M{x0:g},{y0:g} C{middle:g},{y0:g} {middle:g},{y1:g} {x1:g},{y1:g}"
    return f'<path d="{curve}" fill="none" stroke="#d0d7de"/>'


def _box(thought: Thought, x: float, y: float) -> str:
    color = _COLORS[_state(thought)]
    return (
        f"<g><title>{_escaped(thought.text)}</title>"
        f'<rect x="{x:g}" y="{y:g}" width="{_WIDTH}" height="{_HEIGHT}" rx="5" fill="#f6f8fa" stroke="{color}"/>'
        f'<text x="{x + 8:g}" y="{y + 14:g}">{_escaped(_short(thought.text, 36))}</text>'
        f'<text x="{x + 8:g}" y="{y + 28:g}" fill="{color}">{_escaped(_facts(thought))}</text></g>'
    )


def _label(thought: Thought) -> Text:
    label = Text.assemble((f"{_facts(thought)}  ", _STYLES[_state(thought)]), (_short(thought.text), "italic"))
    label.no_wrap, label.overflow = True, "ellipsis"
    return label


def _facts(thought: Thought) -> str:
    """Score, state, and counts that are not 0."""
    facts = [] if thought.score is None else [f"{thought.score:.3g}"]
    facts.append(_state(thought))
    facts += [f"{count} {name}" for name, count in (("visits", thought.visits), ("merged", thought.merged)) if count]
    return " · ".join(facts)


def _state(thought: Thought) -> str:
    if thought.solved:
        return "solved"
    if thought.error is not None:
        return "dead end"
    return "pruned" if thought.pruned else "expanded" if thought.expanded else "open"


def _short(text: str, most: int = _SHOWN_CHARS) -> str:
    """`text` in one line, cut at its beginning if it is long: problems often follow examples."""
    text = _printable(" ⏎ ".join(text.split("\n")).strip())
    return text if len(text) <= most else "…" + text[-most + 1 :]


def _escaped(text: str) -> str:
    return escape(_printable(text))


def _printable(text: str) -> str:
    """`text` without control characters, which XML rejects and terminals interpret."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)
