"""Timing on a GPU: in CUDA graphs, warm and with the cache flushed, and the chip's own ceilings."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

CALLS = 10
"""Calls in one graph: a replay's launch is shared by them."""
FLUSH_BYTES = 192 << 20


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the chip was measured to do."""

    read: float
    """Bytes per second of a sum over memory that no cache holds"""
    copy: float
    """Bytes per second, read and written together"""
    matrix: float
    """Operations per second of a large bfloat16 matrix product"""

    def describe(self) -> str:
        return (
            f"reads {self.read / 1e12:.2f} TB/s, copies {self.copy / 1e12:.2f} TB/s, "
            f"multiplies {self.matrix / 1e12:.0f} TFLOP/s in bfloat16"
        )


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one call."""

    median: float
    p10: float
    p90: float


class Timer:
    """Times what runs on one device, many calls to a graph."""

    def __init__(self, device: torch.device, replays: int = 12) -> None:
        self.device = device
        self.replays = replays
        self._flushed = torch.empty(FLUSH_BYTES // 4, dtype=torch.float32, device=device)
        self._flush_graph = self._capture(self._flush, CALLS)

    def warm(self, call: Callable[[], object]) -> Timing:
        """One call after the other, on whatever the last one left in the cache."""
        return _timing(self._replay(self._capture(call, CALLS)))

    def cold(self, call: Callable[[], object]) -> Timing:
        """Each call after 192 MiB have been written, whose own time, measured in turn with it, is taken off."""

        def flushed() -> None:
            self._flush()
            call()

        graph = self._capture(flushed, CALLS)
        both, flush = np.empty(self.replays), np.empty(self.replays)
        self._replay(self._flush_graph, replays=self.replays)
        for turn in range(self.replays):
            both[turn] = self._replay(graph, replays=1)[0]
            flush[turn] = self._replay(self._flush_graph, replays=1)[0]
        return _timing(both - float(np.median(flush)))

    def warm_us(self, call: Callable[[], object]) -> float:
        """The median of `warm`."""
        return self.warm(call).median

    def graph_us(self, call: Callable[[], object]) -> float:
        """The median of a call that is long enough to be captured alone."""
        return float(np.median(self._replay(self._capture(call, 1), 1)))

    def host_us(self, call: Callable[[], object]) -> float:
        """The median of a call as its caller waits for it, host work and the device's included."""
        taken = []
        for _ in range(self.replays + 3):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            torch.cuda.synchronize()
            taken.append(1e6 * (time.perf_counter() - begin))
        return float(np.median(taken[3:]))

    def ceilings(self) -> Ceilings:
        """Measured now; best rather than median, because a limit is what the chip does undisturbed."""
        size = 1 << 30
        source = torch.zeros(size // 4, dtype=torch.float32, device=self.device)
        target = torch.empty_like(source)
        factor = torch.randn(8192, 8192, dtype=torch.bfloat16, device=self.device)
        read = self._replay(self._capture(source.sum, 4), 4).min()
        copy = self._replay(self._capture(lambda: target.copy_(source), 4), 4).min()
        multiply = self._replay(self._capture(lambda: factor @ factor, 4), 4).min()
        return Ceilings(1e6 * size / read, 2e6 * size / copy, 2e6 * 8192**3 / multiply)

    def _flush(self) -> None:
        self._flushed.fill_(1.0)

    @staticmethod
    def _capture(call: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
            call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        return graph

    def _replay(self, graph: torch.cuda.CUDAGraph, calls: int = CALLS, replays: int | None = None) -> np.ndarray:
        """Microseconds of a call, averaged over each replay."""
        taken = []
        if replays is None:
            graph.replay()
        for _ in range(replays or self.replays):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            taken.append(1e3 * begin.elapsed_time(end) / calls)
        return np.array(taken)


def _timing(taken: np.ndarray) -> Timing:
    p10, median, p90 = np.percentile(taken, [10, 50, 90])
    return Timing(float(median), float(p10), float(p90))
