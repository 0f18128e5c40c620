"""Rewrites the forward of an attention class so that the norms of q and k run with the rotation.

The rewriter reads the source of a forward and accepts it by structure. It knows two orders:

    q = self.q_norm(q_expression).transpose(1, 2)       q, k = apply_rotary_pos_emb(q, k, cos, sin)
    k = self.k_norm(k_expression).transpose(1, 2)       q = self.q_norm(q)
    q, k = apply_rotary_pos_emb(q, k, cos, sin)         k = self.k_norm(k)

and the same with one tensor. In the first, statements that use neither q nor k may stand in
between, and norms or rotation may depend on a condition. Everything else is left alone, with a
reason. `rewrite` changes no other statement, and keeps file and lines for tracebacks.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Collection, Set
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, TypeGuard

from .._patching.sources import (
    Refusal,
    compile_with,
    definition_of,
    load,
    placed,
    store,
    writes_in_place,
)

__all__ = ["Calls", "Rewritten", "norm_classes", "rewrite"]

_NORM = re.compile(r"norm")
_PENDING = "_fused_rope_norm_"
_DEFER, _ROTATE, _NORMALIZE = "_fused_rope_defer", "_fused_rope_rotate", "_fused_rope_normalize"
_ROTATE_FIRST = "_fused_rope_rotate_first"


@dataclass(frozen=True)
class Calls:
    """What a rewritten forward calls.

    Attributes:
        defer: (norm) -> what is called with x in the norm's place. It returns x if the norm waits
            for the rotation, else the normalized x.
        rotate: (function, deferred, *arguments) -> the rotary function's result, after the norms.
        rotate_first: (function, norms, *arguments) -> the norms of the rotary function's results.
        normalize: (deferred, x) -> x, normalized if its norm waits.
    """

    defer: Callable[..., Any]
    rotate: Callable[..., Any]
    rotate_first: Callable[..., Any]
    normalize: Callable[..., Any]


@dataclass(frozen=True)
class Rewritten:
    """A rewritten forward.

    Attributes:
        make: builds the function from what it calls.
        after: whether the norms follow the rotation.
        norms: the attributes of the norms.
        functions: the names of the rotary functions that run with them.
    """

    make: Callable[[Calls], Any]
    after: bool
    norms: tuple[str, ...]
    functions: tuple[str, ...]


def rewrite(owner: type, forward: Any, rotary: Set[str]) -> Rewritten | str | None:
    """The forward of a class with its norms moved into its rotary calls.

    Args:
        owner: the attention class.
        forward: its forward, as the module defines it.
        rotary: the names of the module's rotary functions.

    Returns:
        The rewritten forward; the reason for none; or None if it does not normalize and rotate.
    """
    innermost = inspect.unwrap(forward)
    code = getattr(innermost, "__code__", None)
    if code is None or not rotary & _names(code) or not any(map(_NORM.search, _names(code))):
        return None
    try:
        definition = definition_of(owner, forward)
        rewriter = _Rewriter(rotary)
        rewriter.function(definition)
    except Refusal as refusal:
        return str(refusal)
    if not rewriter.norms:
        return "no norm of q and k stands next to the rotation"
    factory = compile_with(definition, forward, (_DEFER, _ROTATE, _ROTATE_FIRST, _NORMALIZE))

    def make(calls: Calls) -> Any:
        return factory(calls.defer, calls.rotate, calls.rotate_first, calls.normalize)

    norms, functions = (tuple(dict.fromkeys(v)) for v in (rewriter.norms, rewriter.functions))
    return Rewritten(make, rewriter.after, norms, functions)


def norm_classes(owner: type, attributes: Collection[str]) -> dict[str, list[Any]]:
    """The values that __init__ calls to make these attributes, by attribute."""
    found: dict[str, list[Any]] = {name: [] for name in attributes}
    for base in owner.__mro__:
        init = inspect.unwrap(vars(base).get("__init__", object))
        if not isinstance(init, FunctionType):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(init)))
        except (OSError, TypeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute)):
                continue
            name = node.targets[0].attr
            for call in ast.walk(node.value) if name in found else ():
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
                    found[name].append(init.__globals__.get(call.func.id))
    return found


def _names(code: CodeType) -> set[str]:
    return {*code.co_names}


class _Rewriter:
    """Moves the norms of one function.

    A name is pending after its norm was deferred and until the rotation. Each branch of a condition
    has its own set of pending names.
    """

    def __init__(self, rotary: Set[str]) -> None:
        self.rotary = rotary
        self.norms: list[str] = []
        self.functions: list[str] = []
        self.after = False
        self._rotated: set[str] = set()

    def function(self, definition: ast.FunctionDef) -> None:
        for node in ast.walk(definition):
            self._rotated |= set(self._rotation(node) or ())
        pending: set[str] = set()
        body = self._block(definition.body, pending)
        if pending:
            raise Refusal(f"{min(pending)} is normalized and not rotated")
        documented = ast.get_docstring(definition, clean=False) is not None
        at = definition.body[1 if documented else 0]
        first = [
            placed(ast.Assign([store(_PENDING + name)], ast.Constant(None)), at)
            for name in sorted(self._rotated)
        ]
        body[int(documented) : int(documented)] = first
        definition.body = body

    def _block(self, body: list[ast.stmt], pending: set[str]) -> list[ast.stmt]:
        made: list[ast.stmt] = []
        rest = list(body)
        while rest:
            statement = rest.pop(0)
            names = self._rotation(statement)
            if isinstance(statement, ast.If):
                made.append(self._condition(statement, pending))
            elif names:
                norms = [] if pending & set(names) else self._norms_after(names, rest)
                del rest[: len(norms)]
                made.append(self._rotate(statement, names, norms, pending))
            else:
                made.append(self._other(statement, pending))
        return made

    def _condition(self, statement: ast.If, pending: set[str]) -> ast.If:
        self._refuse_uses(statement.test, pending)
        before, body, other = set(pending), set(pending), set(pending)
        statement.body = self._block(statement.body, body)
        statement.orelse = self._block(statement.orelse, other)
        rotated = before - (body & other)
        for branch, waiting in ((statement.body, body), (statement.orelse, other)):
            branch += [self._normalize(name, statement) for name in sorted(rotated & waiting)]
        pending.clear()
        pending |= (body | other) - rotated
        return statement

    def _other(self, statement: ast.stmt, pending: set[str]) -> ast.stmt:
        """A statement that is no rotation: a norm, a view of a pending name, or without effect."""
        name = _target(statement)
        if isinstance(statement, ast.Assign) and name is not None:
            call = _below_views(statement.value)
            if name in pending and isinstance(call, ast.Name) and call.id == name:
                return statement
            if name in self._rotated - pending and _is_norm(call):
                self._refuse_uses(call, pending)
                self._defer(name, call)
                pending.add(name)
                return statement
        self._refuse_uses(statement, pending)
        return statement

    def _defer(self, name: str, call: ast.Call) -> None:
        assert isinstance(call.func, ast.Attribute)
        self.norms.append(call.func.attr)
        deferred = ast.Call(load(_DEFER), [call.func], [])
        call.func = placed(ast.NamedExpr(store(_PENDING + name), deferred), call)

    def _rotate(
        self, statement: ast.stmt, names: tuple[str, ...], norms: list[ast.expr], pending: set[str]
    ) -> ast.stmt:
        assert isinstance(statement, ast.Assign)
        call = statement.value
        assert isinstance(call, ast.Call)
        for argument in (*call.args[len(names) :], *(k.value for k in call.keywords)):
            self._refuse_uses(argument, pending)
        function = call.func
        if norms:
            self.after = True
            self.norms += [norm.attr for norm in norms if isinstance(norm, ast.Attribute)]
            rotate, deferred = _ROTATE_FIRST, norms
        elif pending & set(names):
            if not pending >= set(names):
                alone = min(set(names) - pending)
                raise Refusal(f"{alone} is rotated without a norm next to the rotation")
            rotate, deferred = _ROTATE, [load(_PENDING + name) for name in names]
            pending -= set(names)
        else:
            return statement
        assert isinstance(function, ast.Name)
        self.functions.append(function.id)
        call.func = placed(load(rotate), call)
        call.args = [function, placed(ast.Tuple(deferred, ast.Load()), call), *call.args]
        return statement

    def _normalize(self, name: str, at: ast.AST) -> ast.stmt:
        call = ast.Call(load(_NORMALIZE), [load(_PENDING + name), load(name)], [])
        normalized: ast.stmt = placed(ast.Assign([store(name)], call), at)
        return normalized

    def _norms_after(self, names: tuple[str, ...], rest: list[ast.stmt]) -> list[ast.expr]:
        """The norms of all these names in the statements that follow, or none."""
        norms: list[ast.expr] = []
        for name, statement in zip(names, rest, strict=False):
            call = statement.value if isinstance(statement, ast.Assign) else None
            if not (_target(statement) == name and _is_norm(call)):
                return []
            x = call.args[0]
            if not (isinstance(x, ast.Name) and x.id == name):
                return []
            norms.append(call.func)
        return norms if len(norms) == len(names) else []

    def _rotation(self, node: ast.AST) -> tuple[str, ...] | None:
        """The names that a statement rotates, if each result replaces its argument."""
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1):
            return None
        call, target = node.value, node.targets[0]
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            return None
        targets = target.elts if isinstance(target, ast.Tuple) else [target]
        names = tuple(t.id for t in targets if isinstance(t, ast.Name))
        given = tuple(a.id for a in call.args[: len(targets)] if isinstance(a, ast.Name))
        known = call.func.id in self.rotary and len(names) == len(targets)
        return names if known and names == given else None

    def _refuse_uses(self, node: ast.AST, pending: set[str]) -> None:
        parts = list(ast.walk(node)) if pending else []
        if any(_is_reshaped(part, pending) for part in parts):
            raise Refusal("its norm is followed by a reshape, and may cover several heads")
        for part in parts:
            if isinstance(part, ast.Name) and part.id in pending:
                raise Refusal(f"{part.id} is used between the norm and the rotation")
            if writes_in_place(part):
                raise Refusal("a tensor is changed between the norm and the rotation")


def _is_reshaped(node: ast.AST, pending: set[str]) -> bool:
    method = node.func if isinstance(node, ast.Call) else None
    return (
        isinstance(method, ast.Attribute)
        and method.attr in ("view", "reshape", "unflatten")
        and isinstance(method.value, ast.Name)
        and method.value.id in pending
    )


def _target(statement: ast.stmt) -> str | None:
    """The name to which a statement assigns, if it is one."""
    if not (isinstance(statement, ast.Assign) and len(statement.targets) == 1):
        return None
    target = statement.targets[0]
    return target.id if isinstance(target, ast.Name) else None


def _below_views(node: ast.expr) -> ast.expr:
    """The expression below transpose(1, 2) and contiguous(), which keep the last dimension."""
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        arguments = [a.value if isinstance(a, ast.Constant) else None for a in node.args]
        if node.keywords or (node.func.attr, arguments) not in _VIEWS:
            break
        node = node.func.value
    return node


_VIEWS: tuple[tuple[str, list[int]], ...] = (
    ("transpose", [1, 2]),
    ("transpose", [2, 1]),
    ("contiguous", []),
)


def _is_norm(node: ast.expr | None) -> TypeGuard[ast.Call]:
    """Whether it is self.<norm>(expression). Which norm that is, its class tells later."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "self"
        and _NORM.search(node.func.attr) is not None
        and len(node.args) == 1
        and not node.keywords
        and not isinstance(node.args[0], ast.Starred)
    )
