"""Names in other libraries that a drop-in binds to its own functions."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["Bindings"]

_MISSING = object()


class _Binding(NamedTuple):
    owner: Any
    name: str
    ours: Any
    original: Any

    @property
    def stands(self) -> bool:
        """Whether no other code has replaced ours."""
        return vars(self.owner).get(self.name) is self.ours

    @property
    def key(self) -> str:
        if isinstance(self.owner, type):
            return f"{self.owner.__module__}.{self.owner.__name__}.{self.name}"
        return f"{self.owner.__name__}.{self.name}"


class Bindings:
    """The attributes of modules and classes that one drop-in has replaced. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bound: dict[tuple[Any, str], _Binding] = {}

    def bind(self, wanted: Mapping[Any, Mapping[str, Any]]) -> list[str]:
        """Binds the names of each owner that are not bound yet.

        Returns:
            Those of them that are bound now; a name that other code has replaced since is not.
        """
        with self._lock:
            for owner, values in wanted.items():
                for name, ours in values.items():
                    if (owner, name) not in self._bound:
                        original = vars(owner).get(name, _MISSING)
                        setattr(owner, name, ours)
                        self._bound[owner, name] = _Binding(owner, name, ours, original)
            found = [
                self._bound[owner, name] for owner, values in wanted.items() for name in values
            ]
            return [binding.key for binding in found if binding.stands]

    def restore(self) -> None:
        """Restores the originals, except those of names that other code has replaced since."""
        with self._lock:
            for binding in self._bound.values():
                if not binding.stands:
                    continue
                if binding.original is _MISSING:
                    delattr(binding.owner, binding.name)
                else:
                    setattr(binding.owner, binding.name, binding.original)
            self._bound.clear()
