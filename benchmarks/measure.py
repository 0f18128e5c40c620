"""GPU time of graphs, host time of a call, CPU time, peak memory, and their baselines."""

from __future__ import annotations

import ctypes
import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

AnyCall = Callable[[], Any]

GRAPH_BYTES = 8e9  # moved by one graph, about 2 ms, which makes its launch negligible
GRAPH_CALLS = 512  # at most
L2_MULTIPLE = 3
PACE_BYTES = 128 << 20  # more than an L2 cache
SLOWED = 1.03  # of the best copy time: more than the noise of a copy


@dataclass(frozen=True)
class Effort:
    """Limits on the repetitions of one figure."""

    seconds: float = 0.4
    least: int = 7
    most: int = 30
    host_calls: int = 300
    host_blocks: int = 21
    most_sets: int | None = None

    def repeats(self, one: float) -> int:
        """How often to repeat a measurement of `one` seconds."""
        return max(self.least, min(self.most, int(self.seconds / max(one, 1e-9))))


FULL = Effort()
QUICK = Effort(seconds=0.02, least=3, most=5, host_calls=50, host_blocks=5, most_sets=4)


@dataclass(frozen=True)
class Figure:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float


def figure_of(samples: Sequence[float]) -> Figure:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Figure(median, low, high)


def cache_bytes(device: torch.device) -> int:
    """The size of a GPU's L2 cache; for a CPU, of a typical last-level cache."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return 32 << 20


def set_count(bytes_of_one: int, cache: int, effort: Effort) -> int:
    """How many input sets exceed three times the cache; at least two."""
    sets = max(2, L2_MULTIPLE * cache // bytes_of_one + 1)
    return min(sets, effort.most_sets or sets)


def rounds(sets: int, bytes_of_a_call: int) -> int:
    """How often a graph iterates over all sets."""
    calls = min(GRAPH_CALLS, GRAPH_BYTES / bytes_of_a_call)
    return max(1, round(calls / sets))


DEVICE_NODES = (0, 1, 2)  # of CUgraphNodeType: kernel, copy, fill


def device_nodes(graph: int) -> int:
    """The number of kernels, copies and fills in a captured cudaGraph_t."""
    driver = ctypes.CDLL("libcuda.so.1")

    def ask(name: str, *arguments: Any) -> None:
        status = getattr(driver, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} returned {status}")

    handle, count, kind = ctypes.c_void_p(graph), ctypes.c_size_t(), ctypes.c_int()
    ask("cuGraphGetNodes", handle, None, ctypes.byref(count))
    nodes = (ctypes.c_void_p * count.value)()
    ask("cuGraphGetNodes", handle, nodes, ctypes.byref(count))
    found = 0
    for node in nodes:
        ask("cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(kind))
        found += kind.value in DEVICE_NODES
    return found


class Graph:
    """Calls captured in a CUDA graph; it keeps their results alive, so each has its own memory."""

    def __init__(self, calls: Sequence[AnyCall]) -> None:
        self.calls = len(calls)
        self._inputs = list(calls)  # replays read their memory
        self.outputs: list[Any] = []
        self._graph = torch.cuda.CUDAGraph(keep_graph=True)  # to count its nodes
        with torch.cuda.graph(self._graph, stream=torch.cuda.current_stream()):
            for call in calls:
                self.outputs.append(call())
        self._graph.instantiate()

    @property
    def kernels(self) -> float:
        """Kernels, copies and fills per call."""
        nodes = device_nodes(self._graph.raw_cuda_graph())
        return nodes / self.calls if nodes % self.calls else nodes // self.calls

    def replay(self) -> None:
        self._graph.replay()

    def time(self, effort: Effort) -> Figure:
        """GPU microseconds per call. Replays are enqueued ahead, so host time is excluded."""
        for _ in range(2):
            self.replay()
        one = self._seconds(1)[0]
        samples = self._seconds(effort.repeats(one) + 1)[1:]
        return figure_of([sample * 1e6 / self.calls for sample in samples])

    def _seconds(self, replays: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        torch.cuda.synchronize()
        events[0].record()
        for event in events[1:]:
            self.replay()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) * 1e-3 for a, b in itertools.pairwise(events)]


class CloneGraph(Graph):
    """The baseline on a GPU: a flat clone that reads and writes `bytes_of_a_call` in total."""

    def __init__(
        self, bytes_of_a_call: int, cache: int, device: torch.device, effort: Effort
    ) -> None:
        elements = max(bytes_of_a_call // 4, 1)  # bfloat16, read once and written once
        sets = set_count(2 * elements, cache, effort)
        source = torch.randn(sets, elements, dtype=torch.bfloat16, device=device)
        source[0].clone()
        super().__init__([x.clone for x in source] * rounds(sets, bytes_of_a_call))


class Pace:
    """Detects thermal and power throttling: compares a copy with the best one of this process.

    Throttling lasts seconds to minutes and slows instruction-bound kernels more than copies.
    """

    def __init__(self, device: torch.device) -> None:
        source = torch.randn(PACE_BYTES // 2, dtype=torch.bfloat16, device=device)
        copy = functools.partial(source.clone().copy_, source)
        self._graph = Graph([copy] * 8)
        self._best = float("inf")

    def slowed(self) -> bool:
        return self.is_slow(self._graph.time(QUICK).median)

    def is_slow(self, copy_us: float) -> bool:
        """Whether copies take `SLOWED` times as long as the best ones."""
        self._best = min(self._best, copy_us)
        return copy_us > SLOWED * self._best


def pace_of(device: torch.device) -> Pace | None:
    """The pace of a GPU; None for a CPU."""
    return Pace(device) if device.type == "cuda" else None


@contextmanager
def no_collection() -> Iterator[None]:
    """Disables Python's garbage collector."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_time(call: AnyCall, device: torch.device, effort: Effort) -> Figure:
    """Host microseconds per call: the median of blocks without synchronization inside."""

    def block(calls: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in itertools.repeat(None, calls):
            call()
        return (time.perf_counter() - start) * 1e6 / calls

    with no_collection():
        block(effort.host_calls)
        samples = [block(effort.host_calls) for _ in range(effort.host_blocks)]
    synchronize(device)
    return figure_of(samples)


def add_time(device: torch.device, effort: Effort) -> float:
    """The baseline of host time: torch.add on one element."""
    x, add = torch.ones(1, device=device), torch.add
    with torch.no_grad():
        return host_time(lambda: add(x, x), device, effort).median


def cpu_time(calls: Sequence[AnyCall], effort: Effort) -> Figure:
    """CPU microseconds per call; a sample is one pass over all calls."""

    def one_pass() -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return time.perf_counter() - start

    with no_collection():
        one_pass()
        repeats = effort.repeats(one_pass())
        return figure_of([one_pass() * 1e6 / len(calls) for _ in range(repeats)])


class Memcpy:
    """The baseline on a CPU: copy_ into existing memory, on the same threads."""

    def __init__(self, bytes_of_a_call: int, cache: int, effort: Effort) -> None:
        elements = max(bytes_of_a_call // 4, 1)
        sets = set_count(4 * elements, cache, effort)
        source = torch.randn(elements).bfloat16().expand(sets, elements).contiguous()
        target = source.clone()
        self._calls = [
            functools.partial(to.copy_, of) for to, of in zip(target, source, strict=True)
        ]

    def time(self, effort: Effort) -> Figure:
        return cpu_time(self._calls, effort)


def peak_bytes(call: AnyCall, device: torch.device) -> int:
    """The most bytes that one call has allocated at a time, including its results."""
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = call()
    synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del held
    return peak
