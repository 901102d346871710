"""The index of runs, against a search that compares everything with everything."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radixgen.cache import ExtentPool, RadixTree, Run, RunIndex, blended_namespace, marked
from radixgen.cache.run_index import window_hashes

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
