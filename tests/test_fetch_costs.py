"""`FetchCosts`: the part of a prefix that is fetched is the one that takes the least time."""

import itertools

import pytest

from radixgen.cache.fetch_costs import FetchCosts


def measured(computed: float, fetched: float, read: float) -> FetchCosts:
    costs = FetchCosts()
    costs.stepped(0.0, 0)
    costs.stepped(1000 * computed, 1000)
    costs.fetched(10, 10 * fetched)
    costs.read(10, 10 * read)
    return costs


@pytest.mark.parametrize(
    ("first", "in_host", "stop"), [(0, 0, 9), (0, 5, 9), (3, 5, 9), (5, 3, 9), (0, 9, 9), (7, 9, 9)]
)
def test_no_other_end_takes_less_time(first: int, in_host: int, stop: int) -> None:
    rates = (1.0, 0.99, 0.5, 3.0)
    for computed, fetched, read in itertools.product(rates, rates, rates):
        for queued, queued_reads in itertools.product((0, 1, 20), repeat=2):

            def seconds(end: int) -> float:
                fetching = (queued + end - first) * fetched if end > first else 0.0  # noqa: B023
                reading = (queued_reads + end - in_host) * read if end > max(in_host, first) else 0.0  # noqa: B023
                return fetching + reading + (stop - end) * computed  # noqa: B023

            costs = measured(computed, fetched, read)
            end = costs.best_end(first, in_host, stop, queued=queued, queued_reads=queued_reads)
            assert first <= end <= stop
            assert seconds(end) == pytest.approx(min(seconds(other) for other in range(first, stop + 1)))


def test_all_is_fetched_until_computing_was_measured() -> None:
    costs = FetchCosts()
    costs.fetched(1, 100.0)
    costs.stepped(0.0, 0)
    costs.stepped(1.0, 255)
    assert costs.best_end(0, 4, 9, queued=0, queued_reads=0) == 9
    costs.stepped(2.0, 256)
    assert costs.best_end(0, 4, 9, queued=0, queued_reads=0) == 0


def test_rates_are_forgotten_after_a_minute() -> None:
    costs = measured(1e-3, 1e-4, 1.0)
    for now, end in ((2.0, 4), (61.0, 4), (62.0, 9), (63.0, 9)):
        costs.stepped(now, 0)
        assert costs.best_end(0, 4, 9, queued=0, queued_reads=0) == end
    costs.read(1, 1.0)
    assert costs.best_end(0, 4, 9, queued=0, queued_reads=0) == 4
