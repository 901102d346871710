"""Drawing of the radix tree in the terminal."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.text import Text
from rich.tree import Tree

from radixgen.cache import Node, RadixTree

Decode = Callable[[Sequence[int]], str]

_PREVIEW_TOKENS = 8
_SHOWN_CHILDREN = 16


@dataclass(slots=True)
class NodeView:
    """Snapshot of a node. `live`: number of sequences at it or below it."""

    text: str
    known: int
    computed: int
    live: int
    children: list["NodeView"] = field(default_factory=list)

    @property
    def weight(self) -> tuple[int, int]:
        """Sort key: busier nodes first, then longer ones."""
        return self.live, self.known


def snapshot(tree: RadixTree, decode: Decode) -> list[NodeView]:
    """Snapshot of every root with its descendants, the busiest children first."""
    nodes = list(tree.roots())
    for node in nodes:
        nodes.extend(node.children.values())
    views: dict[Node, NodeView] = {}
    for node in reversed(nodes):
        children = [views.pop(child) for child in node.children.values()]
        live = node.lock_count + sum(child.live for child in children)
        children.sort(key=lambda view: view.weight, reverse=True)
        views[node] = NodeView(_preview(node, decode), node.known, node.computed, live, children)
    return [views[root] for root in tree.roots()]


def picture(roots: Sequence[NodeView], *, children: int = _SHOWN_CHILDREN, depth: int | None = None) -> Tree:
    """Rich tree with a line per node: its tokens, the sequences that share it, and its text.

    children: maximum number of drawn children per node.
    depth: level below which no children are drawn.
    """
    drawing = Tree(Text("radix tree", style="bold"))
    todo = [(drawing, root, 0) for root in roots]
    while todo:
        branch, view, level = todo.pop()
        drawn = view.children[: children if level != depth else 0]
        branches = [(branch.add(_label(child)), child, level + 1) for child in drawn]
        if rest := view.children[len(drawn) :]:
            tokens = sum(child.known for child in rest)
            branch.add(Text(f"… {len(rest)} more nodes of {tokens} tokens", style="dim"))
        todo.extend(branches)
    return drawing


def _label(view: NodeView) -> Text:
    shared = f"{view.live} live" if view.live else "cached"
    style = "bold green" if view.live > 1 else "green" if view.live else "bright_black"
    label = Text.assemble((f"{view.known:>4} tokens  {shared:<7} ", style), (view.text, "italic"))
    label.no_wrap, label.overflow = True, "ellipsis"
    return label


def _preview(node: Node, decode: Decode) -> str:
    tokens = node.token_ids.tolist()
    if len(tokens) <= 2 * _PREVIEW_TOKENS:
        return _single_line(decode(tokens))
    head, tail = decode(tokens[:_PREVIEW_TOKENS]), decode(tokens[-_PREVIEW_TOKENS:])
    return f"{_single_line(head)} … {_single_line(tail)}"


def _single_line(text: str) -> str:
    return text.replace("\n", "⏎")
