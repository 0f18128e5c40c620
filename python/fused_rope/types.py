"""The words that the options of functions and modules accept."""

from __future__ import annotations

from typing import Literal

__all__ = ["Cast", "Compiled", "Layout", "Precision", "TableLayout"]

Layout = Literal["bshd", "bhsd", "sbhd", "thd"]
TableLayout = Literal["half", "tiled", "repeated"]
Precision = Literal["fp32", "model"]
Cast = Literal["never", "before", "after"]
Compiled = Literal["original", "fused"]
