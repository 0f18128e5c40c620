"""The calls of one provider on one work in one direction, and their verification."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import measure
import torch
import verify
from cases import Work, bytes_moved
from inputs import InputSet, make_sets
from providers import Provider
from torch import Tensor

GRAD_DIRECTIONS = ("backward", "both", "forward_grad")
SHARED_DIRECTIONS = ("forward", "backward", "both")  # calls that do not change their inputs


class Bench:
    """The input sets of one work, and the oracle's results for the first one.

    Nothing writes to `sets` and `gradients`. An in-place write to the base of a view makes autograd
    replace the view's backward by as_strided's, which adds a fill and a copy to each timed call.
    """

    def __init__(self, work: Work, count: int, device: torch.device) -> None:
        self.work = work
        self.device = device
        self.sets = make_sets(work, count, device)

    @cached_property
    def gradients(self) -> list[InputSet]:
        """Gradients of the outputs, with the strides and tables of the inputs."""
        return self._drawn(self.sets)

    def copies(self, sets: Sequence[InputSet]) -> list[InputSet]:
        """Copies of these sets with the same strides."""
        copies = self._drawn(sets)
        for copy, x in zip(copies, sets, strict=True):
            copy.q.copy_(x.q)
            copy.k.copy_(x.k)
        return copies

    def _drawn(self, sets: Sequence[InputSet]) -> list[InputSet]:
        """New random q and k with the tables of these sets."""
        drawn = make_sets(self.work, len(sets), self.device)
        return [replace(x, q=new.q, k=new.k) for x, new in zip(sets, drawn, strict=True)]

    @cached_property
    def rotated(self) -> tuple[Tensor, ...]:
        return verify.expected(self.sets[0])

    @cached_property
    def input_gradients(self) -> tuple[Tensor, ...]:
        return verify.expected_gradients(self.sets[0], self.gradients[0])

    def expected(self, direction: str, weight_gradients: bool = True) -> tuple[Tensor, ...]:
        """The results of the first call in float64, in the work's layout."""
        if direction not in ("backward", "both"):
            return self.rotated
        gradients = self.input_gradients if weight_gradients else self.input_gradients[:2]
        return gradients if direction == "backward" else (*self.rotated, *gradients)


class Trial:
    """The calls of one provider, one per input set.

    Calls that may write to their inputs get copies of the sets.
    """

    def __init__(self, bench: Bench, provider: Provider, direction: str) -> None:
        self.bench = bench
        self.provider = provider
        self.direction = direction
        shared = direction in SHARED_DIRECTIONS
        sets = bench.sets if shared else bench.copies(bench.sets)
        gradients = bench.gradients if direction in ("backward", "both") else [None] * len(sets)
        with self.grad_mode():
            self.calls = [self._call(*pair) for pair in zip(sets, gradients, strict=True)]

    def grad_mode(self) -> torch.set_grad_enabled:
        return torch.set_grad_enabled(self.direction in GRAD_DIRECTIONS)

    def _call(self, inputs: InputSet, given: InputSet | None) -> Callable[[], Sequence[Tensor]]:
        """The call on these inputs and, for backward, these gradients of its results."""
        work = self.bench.work
        if self.direction not in GRAD_DIRECTIONS:
            return self.provider.bind(work, inputs, in_place=self.direction == "in_place")
        q, k = (x.detach().requires_grad_() for x in (inputs.q, inputs.k))
        weights = inputs.weights
        if self.provider.weight_gradients:
            weights = tuple(w.detach().requires_grad_() for w in weights)
        leaves = q, k, *(w for w in weights if w.requires_grad)
        inputs = replace(inputs, q=q, k=k, weights=weights)
        forward = self.provider.bind(work, inputs, in_place=False)
        if given is None:
            return forward
        gradients = self.provider.view(work, given.q), self.provider.view(work, given.k)
        if self.direction == "backward":
            out = forward()
            return lambda: torch.autograd.grad(out, leaves, gradients, retain_graph=True)

        def both() -> tuple[Tensor, ...]:
            out = forward()
            return (*out, *torch.autograd.grad(out, leaves, gradients))

        return both

    def _results(self, out: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The results of a call in the work's layout; gradients are in it already."""
        if self.direction == "backward":
            return tuple(out)
        first = self.bench.sets[0]
        count = 2 if first.cache is None else 3
        rotated = self.provider.restore(self.bench.work, first, tuple(out[:count]))
        return tuple(x.detach() for x in (*rotated, *out[count:]))

    def _check(self, what: str, out: Sequence[Tensor]) -> None:
        want = self.bench.expected(self.direction, self.provider.weight_gradients)
        for i, (x, y) in enumerate(zip(self._results(out), want, strict=True)):
            verify.check(f"{what}, tensor {i}", x, y, self.provider.exact)

    def verify(self) -> None:
        """Raises WrongResult unless a call on copies of the first set returns the right results.

        The timed calls and their inputs are not touched.
        """
        first = self.bench.sets[0]
        self.bench.expected(self.direction)  # allocates, so it precedes poison()
        (inputs,) = self.bench.copies([first])
        given = None
        if self.direction in ("backward", "both"):
            (given,) = self.bench.copies(self.bench.gradients[:1])
        with self.grad_mode():
            call = self._call(inputs, given)
            verify.poison(inputs.q, inputs.k)
            if inputs.cache is not None:
                inputs.cache.k_cache.fill_(float("nan"))
                inputs.cache.v_cache.fill_(float("nan"))
            out = call()
        self._check("first call", out)
        if self.direction == "forward":
            verify.unchanged("q", inputs.q, first.q)
            verify.unchanged("k", inputs.k, first.k)
        if self.direction == "in_place":
            verify.same_memory("q", self._results(out)[0], inputs.q)

    def verify_graph(self, graph: measure.Graph) -> None:
        """Raises WrongResult unless a replay overwrites NaN with the right results."""
        if self.direction == "in_place":
            return
        for x in graph.outputs[0]:
            x.detach().fill_(float("nan"))
        graph.replay()
        self._check("replayed graph", graph.outputs[0])

    def capture(self) -> measure.Graph:
        """A CUDA graph of the calls on all sets, captured after a warm-up."""
        moved = bytes_moved(self.bench.work, self.direction)
        with self.grad_mode():
            for call in self.calls[:3]:
                call()
            return measure.Graph(self.calls * measure.rounds(len(self.calls), moved))
