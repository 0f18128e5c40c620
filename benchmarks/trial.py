"""One provider on one piece of work in one direction: its calls, verified before they are timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import measure
import torch
import verify
from cases import Work, bytes_moved
from inputs import InputSet, make_sets
from providers import Pair, Provider
from torch import Tensor

GRAD_DIRECTIONS = ("backward", "both", "forward_grad")


class Bench:
    """The input sets of one piece of work, and what the oracle says of the first of them."""

    def __init__(self, work: Work, count: int, device: torch.device) -> None:
        self.work = work
        self.device = device
        self.sets = make_sets(work, count, device)
        self.first_values = self.sets[0].q.clone(), self.sets[0].k.clone()

    @cached_property
    def gradients(self) -> list[InputSet]:
        """Gradients of the outputs: in the memory of the inputs, with the tables of the inputs."""
        drawn = make_sets(self.work, len(self.sets), self.device)
        return [replace(x, q=g.q, k=g.k) for x, g in zip(self.sets, drawn, strict=True)]

    @cached_property
    def rotated(self) -> Pair:
        self.reset()
        return verify.expected(self.sets[0])

    @cached_property
    def rotated_gradients(self) -> Pair:
        return verify.expected(self.gradients[0], inverse=True)

    def reset(self) -> None:
        """Undoes what calls in place did to the first set."""
        for x, before in zip((self.sets[0].q, self.sets[0].k), self.first_values, strict=True):
            x.copy_(before)

    def expected(self, direction: str) -> tuple[Tensor, ...]:
        """float64 results of the first call, in the work's layout."""
        if direction == "backward":
            return self.rotated_gradients
        return (*self.rotated, *(self.rotated_gradients if direction == "both" else ()))


class Trial:
    """The calls of one provider, one for each input set."""

    def __init__(self, bench: Bench, provider: Provider, direction: str) -> None:
        self.bench = bench
        self.provider = provider
        self.direction = direction
        with self.grad_mode():
            self.calls = [self._call(i) for i in range(len(bench.sets))]

    def grad_mode(self) -> torch.set_grad_enabled:
        return torch.set_grad_enabled(self.direction in GRAD_DIRECTIONS)

    def _call(self, i: int) -> Callable[[], Sequence[Tensor]]:
        work, inputs = self.bench.work, self.bench.sets[i]
        if self.direction not in GRAD_DIRECTIONS:
            return self.provider.bind(work, inputs, in_place=self.direction == "in_place")
        q, k = (x.detach().requires_grad_() for x in (inputs.q, inputs.k))
        forward = self.provider.bind(work, replace(inputs, q=q, k=k), in_place=False)
        if self.direction == "forward_grad":
            return forward
        given = self.bench.gradients[i]
        gradients = self.provider.view(work, given.q), self.provider.view(work, given.k)
        if self.direction == "backward":
            out = forward()
            return lambda: torch.autograd.grad(out, (q, k), gradients, retain_graph=True)

        def both() -> tuple[Tensor, ...]:
            out = forward()
            return (*out, *torch.autograd.grad(out, (q, k), gradients))

        return both

    def _results(self, out: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the first call returned, in the work's layout, which gradients have already."""
        if self.direction == "backward":
            return tuple(out)
        rotated = self.provider.restore(self.bench.work, self.bench.sets[0], (out[0], out[1]))
        return tuple(x.detach() for x in (*rotated, *out[2:]))

    def _check(self, what: str, out: Sequence[Tensor]) -> None:
        want = self.bench.expected(self.direction)
        for i, (x, y) in enumerate(zip(self._results(out), want, strict=True)):
            verify.check(f"{what}, tensor {i}", x, y, self.provider.exact)

    def verify(self) -> None:
        """Raises WrongResult unless the first call does what its direction says."""
        first = self.bench.sets[0]
        self.bench.expected(self.direction)  # needs memory: before the poison
        self.bench.reset()
        verify.poison(first.q, first.k)
        with self.grad_mode():
            out = self.calls[0]()
        self._check("first call", out)
        if self.direction == "forward":
            for name, x, before in zip(
                "qk", (first.q, first.k), self.bench.first_values, strict=True
            ):
                verify.unchanged(name, x, before)
        if self.direction == "in_place":
            verify.same_memory("q", self._results(out)[0], first.q)
        self.bench.reset()

    def verify_graph(self, graph: measure.Graph) -> None:
        """Raises WrongResult unless a replay writes the results of the first call anew."""
        if self.direction == "in_place":
            return
        for x in graph.outputs[0]:
            x.detach().fill_(float("nan"))
        graph.replay()
        self._check("replayed graph", graph.outputs[0])

    def capture(self) -> measure.Graph:
        """A CUDA graph that goes through all sets, after a warm-up."""
        moved = bytes_moved(self.bench.work, self.direction)
        with self.grad_mode():
            for call in self.calls[:3]:
                call()
            return measure.Graph(self.calls * measure.rounds(len(self.calls), moved))
