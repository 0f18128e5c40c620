"""Reads the source of a method, and compiles a changed definition in the method's place."""

from __future__ import annotations
import __future__

import ast
import inspect
import textwrap
from collections.abc import Callable, Sequence
from types import CodeType, FunctionType
from typing import Any

__all__ = [
    "Refusal",
    "compile_with",
    "definition_of",
    "load",
    "placed",
    "store",
    "writes_in_place",
]


class Refusal(Exception):
    """Why a method is left alone."""


def definition_of(owner: type, method: Any) -> ast.FunctionDef:
    """The parsed definition of a method that the module of its class defines.

    Raises:
        Refusal: the method is another one, or its source is not available.
    """
    innermost = inspect.unwrap(method)
    code, name = innermost.__code__, innermost.__name__
    if code.co_filename != getattr(inspect.getmodule(owner), "__file__", None):
        raise Refusal(f"its {name} is not the one of its module")
    if code.co_freevars:
        raise Refusal(f"its {name} is a closure")
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(innermost)))
    except (OSError, TypeError, SyntaxError):
        raise Refusal(f"the source of its {name} is not available") from None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        raise Refusal(f"the source of its {name} is not available")
    if method is not innermost and not definition.decorator_list:
        raise Refusal(f"its {name} is wrapped by other code")
    parsed = _nested(compile(tree, "", "exec", flags=_flags(code), dont_inherit=True), name)
    if _fingerprint(parsed) != _fingerprint(code):
        raise Refusal(f"the source of its {name} differs from its code")
    return definition


def compile_with(
    definition: ast.FunctionDef, method: Any, names: Sequence[str]
) -> Callable[..., Any]:
    """Compiles a changed definition of a method, with its file, lines, globals and decorators.

    Args:
        definition: as `definition_of` returned it, changed.
        method: the method.
        names: free variables of the definition.

    Returns:
        A function of the values of these names, which returns the method.
    """
    innermost: FunctionType = inspect.unwrap(method)
    code = innermost.__code__
    tree = ast.parse(f"def _fused_rope_make({', '.join(names)}):\n    return {definition.name}")
    factory = tree.body[0]
    assert isinstance(factory, ast.FunctionDef)
    factory.body.insert(0, definition)
    ast.increment_lineno(ast.fix_missing_locations(tree), code.co_firstlineno - 1)
    compiled = compile(tree, code.co_filename, "exec", dont_inherit=True, flags=_flags(code))

    def make(*values: Any) -> Any:
        namespace: dict[str, Any] = {}
        exec(compiled, innermost.__globals__, namespace)
        made = namespace["_fused_rope_make"](*values)
        made.__qualname__ = method.__qualname__
        return made

    return make


def load(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def store(name: str) -> ast.Name:
    return ast.Name(name, ast.Store())


def placed(node: Any, place: ast.AST) -> Any:
    """A new node, which stands in the source where `place` does."""
    return ast.fix_missing_locations(ast.copy_location(node, place))


def writes_in_place(node: ast.AST) -> bool:
    """Whether it is an assignment to elements, or a call of a method such as add_."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr.endswith("_") and not node.func.attr.endswith("__")
    stored = isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)
    return stored or isinstance(node, ast.AugAssign)


def _flags(code: CodeType) -> int:
    """The `from __future__` imports under which the code was compiled."""
    features = (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
    return sum(flag for flag in set(features) if code.co_flags & flag)


def _nested(code: CodeType, name: str) -> CodeType:
    named = [c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name]
    if not named:
        raise Refusal(f"the source of its {name} is not available")
    return named[0]


def _fingerprint(code: CodeType) -> tuple[Any, ...]:
    """Equal for one source, also if the compiler picks other instructions outside of its module."""
    return code.co_names, code.co_varnames, [c for c in code.co_consts if type(c) in (int, float)]
