"""Rewrites the `__call__` of an attention processor.

A rotary function that is defined inside becomes a free variable. With norms, a norm of queries or
keys runs with the rotation that follows it:

    query = attn.norm_q(query)                          query = defer(attn.norm_q, query)
    query = torch.cat([text, query], dim=1)     ->      query = join([text, query], 1)
    query = apply_rotary_emb(query, table)              query, key = rotate(f, (query, key), table)

`defer` returns a tensor, or an object that waits. Before any other statement that uses a waiting
name, a statement is inserted that normalizes it, so that no value changes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from .._patching.sources import (
    Refusal,
    compile_with,
    definition_of,
    load,
    placed,
    store,
    writes_in_place,
)

__all__ = ["Calls", "Rewritten", "rewrite"]

_NORM = re.compile("norm")
_PREFIX = "_fused_rope_"
_CALLS = ("defer", "join", "rotate", "normalize")


@dataclass(frozen=True)
class Calls:
    """What a rewritten processor calls.

    Attributes:
        defer: (norm, x) -> the normalized x, or an object that waits for the rotation.
        join: (xs, dim) -> their concatenation, or an object that waits.
        rotate: (function, xs, *arguments) -> a tuple of the rotated xs, normalized if they wait.
        normalize: (x) -> x, normalized if it waits.
    """

    defer: Callable[..., Any]
    join: Callable[..., Any]
    rotate: Callable[..., Any]
    normalize: Callable[..., Any]


@dataclass(frozen=True)
class Rewritten:
    """A rewritten processor.

    Attributes:
        make: builds the function from what it calls and from the functions that it defined.
        norms: the attributes of the norms that wait for a rotation.
    """

    make: Callable[[Calls, Mapping[str, Any]], Any]
    norms: tuple[str, ...]


def rewrite(
    owner: type, call: Any, nested: Iterable[str], rotary: Set[str], fuse: bool
) -> Rewritten | str:
    """A processor whose functions are given and whose norms wait, or the reason for none.

    Args:
        owner: the class.
        call: its `__call__`.
        nested: the names of functions that it defines and that are given.
        rotary: the names of rotary functions whose norms may wait.
        fuse: whether norms wait.
    """
    names = tuple(nested)
    try:
        definition = definition_of(owner, call)
    except Refusal as refusal:
        return str(refusal)
    definition = _Functions(names).visit(definition)
    rewriter = _Norms(rotary)
    if fuse:
        rewriter.function(definition)
    free = [_PREFIX + name for name in (*_CALLS, *names)]
    factory = compile_with(definition, call, free)

    def make(calls: Calls, functions: Mapping[str, Any]) -> Any:
        values = [getattr(calls, name) for name in _CALLS]
        return factory(*values, *(functions[name] for name in names))

    return Rewritten(make, tuple(dict.fromkeys(rewriter.norms)))


class _Functions(ast.NodeTransformer):
    """Replaces definitions of functions by assignments."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if node.name not in self.names:
            return self.generic_visit(node)
        given: ast.AST = placed(ast.Assign([store(node.name)], load(_PREFIX + node.name)), node)
        return given


class _Norms:
    """Defers the norms of one function.

    A name waits after its norm was deferred and until it is rotated, or normalized by an inserted
    statement. `waiting` holds the names that may wait, and the attribute of each one's norm.
    """

    def __init__(self, rotary: Set[str]) -> None:
        self.rotary = rotary
        self.norms: list[str] = []
        self._attributes: dict[str, list[str]] = {}
        self._captured: set[str] = set()

    def function(self, definition: ast.FunctionDef) -> None:
        for node in ast.walk(definition):
            if isinstance(node, (ast.FunctionDef, ast.Lambda)) and node is not definition:
                self._captured |= _used(node)
        definition.body = self._block(definition.body, set())

    def _block(self, body: list[ast.stmt], waiting: set[str]) -> list[ast.stmt]:
        made: list[ast.stmt] = []
        rest = list(body)
        while rest:
            statement = rest.pop(0)
            rotated = self._rotated(statement)
            if isinstance(statement, ast.If):
                made += self._condition(statement, waiting)
            elif rotated is not None and rotated in waiting:
                xs = [rotated]
                second = self._rotated(rest[0]) if rest else None
                if (
                    second is not None
                    and second in waiting - {rotated}
                    and _alike(statement, rest[0])
                ):
                    xs.append(second)
                    rest.pop(0)
                waiting -= set(xs)
                made += self._normalize(_used(statement) & waiting, waiting, statement)
                made.append(self._rotate(statement, xs))
            else:
                made += self._other(statement, waiting)
        return made

    def _condition(self, statement: ast.If, waiting: set[str]) -> list[ast.stmt]:
        first = self._normalize(_used(statement.test) & waiting, waiting, statement)
        before, body, other = set(waiting), set(waiting), set(waiting)
        statement.body = self._block(statement.body, body)
        statement.orelse = self._block(statement.orelse, other)
        done = before - (body & other)
        for branch, left in ((statement.body, body), (statement.orelse, other)):
            branch += self._normalize(done & left, left, statement)
        waiting.clear()
        waiting |= body | other
        return [*first, statement]

    def _other(self, statement: ast.stmt, waiting: set[str]) -> list[ast.stmt]:
        name, norm = _norm_call(statement)
        if name is not None and norm is not None and name not in waiting | self._captured:
            waiting.add(name)
            self._attributes[name] = [norm.func.attr]  # type: ignore[attr-defined]
            value = _call("defer", norm.func, load(name))
            return [placed(ast.Assign([store(name)], value), statement)]
        joined = _joined(statement)
        if joined is not None and set(joined[1]) & waiting:
            name, parts, dim = joined
            waiting.add(name)
            self._attributes[name] = [a for p in parts for a in self._attributes.get(p, [])]
            elements = ast.List([load(part) for part in parts], ast.Load())
            value = _call("join", elements, dim)
            return [placed(ast.Assign([store(name)], value), statement)]
        writes = any(map(writes_in_place, ast.walk(statement)))
        used = waiting if writes else _used(statement) & waiting
        return [*self._normalize(used, waiting, statement), statement]

    def _normalize(self, names: set[str], waiting: set[str], at: ast.AST) -> list[ast.stmt]:
        made: list[ast.stmt] = [
            placed(ast.Assign([store(name)], _call("normalize", load(name))), at)
            for name in sorted(names)
        ]
        waiting -= names
        return made

    def _rotated(self, statement: ast.stmt) -> str | None:
        """The name that a statement replaces by its rotation."""
        name, call = _assigned_call(statement)
        if name is None or call is None or not isinstance(call.func, ast.Name):
            return None
        first = call.args[0] if call.args else None
        known = call.func.id in self.rotary and isinstance(first, ast.Name) and first.id == name
        others = [*call.args[1:], *(k.value for k in call.keywords)]
        return name if known and not any(name in _used(o) for o in others) else None

    def _rotate(self, statement: ast.stmt, names: list[str]) -> ast.stmt:
        assert isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call)
        for name in names:
            self.norms += self._attributes.get(name, [])
        call = statement.value
        xs = ast.Tuple([load(name) for name in names], ast.Load())
        value = _call("rotate", call.func, xs, *call.args[1:])
        value.keywords = call.keywords
        target = ast.Tuple([store(name) for name in names], ast.Store())
        rotation: ast.stmt = placed(ast.Assign([target], value), statement)
        return rotation


def _assigned_call(statement: ast.stmt) -> tuple[str | None, ast.Call | None]:
    """Name and call of `name = call`."""
    if not (isinstance(statement, ast.Assign) and len(statement.targets) == 1):
        return None, None
    target, value = statement.targets[0], statement.value
    if not (isinstance(target, ast.Name) and isinstance(value, ast.Call)):
        return None, None
    return target.id, value


def _norm_call(statement: ast.stmt) -> tuple[str | None, ast.Call | None]:
    """Name and call of `name = object.norm(name)`."""
    name, call = _assigned_call(statement)
    if name is None or call is None or len(call.args) != 1 or call.keywords:
        return None, None
    function, x = call.func, call.args[0]
    if not (isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)):
        return None, None
    fits = _NORM.search(function.attr) and isinstance(x, ast.Name) and x.id == name
    return (name, call) if fits and function.value.id != name else (None, None)


def _joined(statement: ast.stmt) -> tuple[str, list[str], ast.expr] | None:
    """Name, parts and dimension of `name = torch.cat([part, ...], dim)`."""
    name, call = _assigned_call(statement)
    if name is None or call is None or ast.unparse(call.func) != "torch.cat" or not call.args:
        return None
    parts = call.args[0]
    dims = [*call.args[1:], *(k.value for k in call.keywords if k.arg == "dim")]
    if not isinstance(parts, (ast.List, ast.Tuple)) or len(dims) != 1:
        return None
    names = [part.id for part in parts.elts if isinstance(part, ast.Name)]
    whole = len(names) == len(parts.elts) and isinstance(dims[0], ast.Constant)
    return (name, names, dims[0]) if whole else None


def _alike(a: ast.stmt, b: ast.stmt) -> bool:
    """Whether two rotations differ in the rotated name alone, and not in its own arguments."""
    assert isinstance(a, ast.Assign) and isinstance(a.value, ast.Call)
    assert isinstance(b, ast.Assign) and isinstance(b.value, ast.Call)

    def rest(call: ast.Call) -> list[str]:
        return [ast.dump(node) for node in (call.func, *call.args[1:], *call.keywords)]

    (first,) = a.targets
    assert isinstance(first, ast.Name)
    used = {name for argument in b.value.args[1:] for name in _used(argument)}
    return rest(a.value) == rest(b.value) and first.id not in used


def _used(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(load(_PREFIX + name), list(arguments), [])
