"""The index of runs, against a search that compares everything with everything."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radixgen.cache import ExtentPool, RadixTree, Run, RunIndex, blended_namespace, marked, run_index
from radixgen.cache.run_index import _parts_between, window_hashes

TOKENS = st.lists(st.integers(0, 5), max_size=40)


def insert(tree: RadixTree, tokens: list[int], namespace: str = "") -> None:
    """Make tokens known and computed, as the engine does, then unlock them."""
    lock = tree.insert(tokens, namespace)
    for part in lock.held.unscheduled_path():
        tree.schedule(part, part.known - part.scheduled)
    tree.commit(lock.held)
    tree.unlock(lock)


def parts(tree: RadixTree, namespace: str, least: int) -> set[tuple[int, ...]]:
    """All sequences of at least `least` tokens that are computed in a namespace."""
    paths = [n.path_tokens(0, n.start + n.computed).tolist() for n in tree.nodes() if n.namespace == namespace]
    return {
        tuple(path[at : at + length])
        for path in paths
        for length in range(least, len(path) + 1)
        for at in range(len(path) - length + 1)
    }


def longest_runs(tokens: list[int], tree: RadixTree, least: int) -> list[tuple[int, int]]:
    """Start and length of the longest run of `tokens` that is cached, then that of what is left of `tokens`, and so on.
    Of equal ones exact KV comes first, then the leftmost.
    """
    exact, blended = (parts(tree, namespace, least) for namespace in ("", blended_namespace("")))
    free, runs = [True] * len(tokens), []
    for length in range(len(tokens), least - 1, -1):
        for known, start in product((exact, blended), range(len(tokens) - length + 1)):
            if all(free[start : start + length]) and tuple(tokens[start : start + length]) in known:
                free[start : start + length] = [False] * length
                runs.append((start, length))
    return runs


@settings(max_examples=300, deadline=None)
@given(st.lists(TOKENS.filter(bool), max_size=6), TOKENS, st.integers(1, 9), st.integers(0, 60), st.integers(0, 3))
def test_finds_the_longest_runs(
    texts: list[list[int]], prompt: list[int], least: int, evicted: int, first: int
) -> None:
    tree = RadixTree(ExtentPool(1000))
    index = RunIndex(tree, least)
    for number, text in enumerate(texts):
        insert(tree, text, blended_namespace("") if number % 3 == 2 else "")
        if number == 2:
            index.check()
    tree.evict(evicted)
    index.check()
    first = min(first, len(prompt))
    runs = index.find(np.array(prompt, np.int32), "", first, len(prompt))
    for run in runs:
        source = run.node.path_tokens(run.source, run.source + run.length).tolist()
        assert source == prompt[run.start : run.stop] and run.slots().size == run.length
        assert run.source + run.length <= run.node.start + run.node.computed
    expected = longest_runs(prompt[first:], tree, least)
    assert [(run.start - first, run.length) for run in runs] == expected


def test_runs_of_other_namespaces_are_not_found() -> None:
    tree = RadixTree(ExtentPool(100))
    index = RunIndex(tree, 4)
    insert(tree, [9, 1, 2, 3, 4, 5], "tenant")
    prompt = np.array([1, 2, 3, 4, 5], np.int32)
    assert index.find(prompt, "", 0, 5) == []
    (run,) = index.find(prompt, "tenant", 0, 5)
    assert (run.start, run.source, run.length) == (0, 1, 5)
    insert(tree, [1, 2, 3, 4, 5], "tenant\0" + "7.0")
    assert len(index.find(prompt, "tenant", 0, 5)) == 1


def test_a_run_goes_on_below_the_node_where_its_window_ends() -> None:
    tree = RadixTree(ExtentPool(100))
    index = RunIndex(tree, 4)
    insert(tree, [7, 7, 1, 2, 3, 4, 5, 6])
    insert(tree, [7, 7, 1, 2, 3, 9, 9])  # splits the run
    (run,) = index.find(np.array([1, 2, 3, 4, 5, 6], np.int32), "", 0, 6)
    assert (run.source, run.length) == (2, 6) and run.node.parent is not None and run.node.parent.known == 5
    index.check()


def test_exact_kv_is_preferred() -> None:
    tree = RadixTree(ExtentPool(100))
    index = RunIndex(tree, 4)
    insert(tree, [8, 1, 2, 3, 4], blended_namespace(""))
    insert(tree, [9, 9, 1, 2, 3, 4])
    (run,) = index.find(np.array([1, 2, 3, 4], np.int32), "", 0, 4)
    assert run.node.namespace == ""


def test_tokens_that_were_read_inexactly_are_not_found() -> None:
    tree = RadixTree(ExtentPool(100))
    index = RunIndex(tree, 4)
    insert(tree, [9, 1, 2, 3, 4, marked(5, 1), 6, 7, 8, 9])
    assert index.find(np.array([6, 7, 8, 9], np.int32), "", 0, 4) == []
    (run,) = index.find(np.array([1, 2, 3, 4, 5, 6, 7, 8, 9], np.int32), "", 0, 9)
    assert (run.start, run.source, run.length) == (0, 1, 4)
    index.check()


def test_repeated_tokens_cost_little() -> None:
    tree = RadixTree(ExtentPool(20_000))
    index = RunIndex(tree, 64)
    insert(tree, [5] * 8_000)
    runs = index.find(np.full(8_000, 5, np.int32), "", 0, 7_999)
    assert runs[0] == Run(runs[0].start, runs[0].source, runs[0].length, runs[0].node) and runs[0].length == 7_999


@pytest.mark.parametrize("window", [1, 2, 7, 33])
def test_hashes_depend_on_the_windows_alone(window: int) -> None:
    tokens = np.random.default_rng(0).integers(0, 2, 200).astype(np.int32)
    hashes = window_hashes(tokens, window)
    assert hashes.size == 200 - window + 1
    by_content: dict[bytes, int] = {}
    for at, value in enumerate(hashes.tolist()):
        assert by_content.setdefault(tokens[at : at + window].tobytes(), value) == value
    assert len(set(by_content.values())) == len(by_content)


class Counter:
    """Counts the tokens that an index reads of its tree, apart from those that a search compares."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, index: RunIndex) -> None:
        self.index, self.tokens = index, 0
        monkeypatch.setattr(run_index, "window_hashes", self._counted(run_index.window_hashes))
        monkeypatch.setattr(run_index, "exact_len", self._counted(run_index.exact_len))

    def _counted(self, function: Callable) -> Callable:
        def counted(tokens: np.ndarray, *arguments: int) -> object:
            self.tokens += tokens.size
            return function(tokens, *arguments)

        return counted

    def update(self) -> int:
        """The tokens that are read because of what has changed."""
        self.tokens = 0
        self.index.find(np.empty(0, np.int32), "", 0, 0)
        return self.tokens


def test_what_is_new_alone_is_indexed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long path grows by a token a step, another branches off it, and both lose their ends."""
    rng = np.random.default_rng(5)
    tree = RadixTree(ExtentPool(50_000))
    index = RunIndex(tree, 16)
    counter = Counter(monkeypatch, index)
    long = rng.integers(0, 1_000, 20_000).tolist()
    insert(tree, long)
    assert 20_000 <= counter.update() <= 2 * 20_000
    lock = tree.insert([*long, 1_001])
    for step in range(50):
        grown = lock.held
        tree.schedule(grown, grown.known - grown.scheduled)
        tree.commit(grown)
        assert counter.update() <= 2 + 8
        tree.advance([lock], 2_000 + step)
    insert(tree, [*long[:15_000], *range(3_000, 3_100)])
    assert counter.update() <= 2 * (100 + 8)
    insert(tree, [*long[:14_990], *range(4_000, 4_100)])
    assert counter.update() <= 2 * (100 + 8)
    tree.unlock(lock)
    tree.evict(5_000)
    assert counter.update() == 0
    index.check()


def test_tokens_after_a_mark_are_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = RadixTree(ExtentPool(9_000))
    index = RunIndex(tree, 16)
    counter = Counter(monkeypatch, index)
    insert(tree, [*range(4_000), marked(7, 1), *range(4_000)])
    assert counter.update() <= 2 * 8_001
    insert(tree, [*range(4_000), marked(7, 1), *range(4_050)])
    assert counter.update() == 0


def test_parts_are_what_is_left_between_ranges() -> None:
    rng = np.random.default_rng(6)
    tree = RadixTree(ExtentPool(10))
    lock = tree.insert([1])
    for _ in range(300):
        bounds = np.unique(rng.integers(0, 60, 2 * rng.integers(0, 8)))
        taken = [(int(a), int(b)) for a, b in zip(bounds[::2], bounds[1::2], strict=False)]
        first = int(rng.integers(0, 50))
        run = Run(first, 7, int(rng.integers(1, 20)), lock.held)
        free = [at for at in range(run.start, run.stop) if not any(a <= at < b for a, b in taken)]
        parts = list(_parts_between(run, taken))
        assert [at for part in parts for at in range(part.start, part.stop)] == free
        assert all(part.source - part.start == run.source - run.start for part in parts)
        assert all(a.stop < b.start for a, b in zip(parts, parts[1:], strict=False))
