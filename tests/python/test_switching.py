"""The blocks of docs/switching.md run as they stand, and every drop-in has its section."""

import importlib
import pkgutil
import re
from pathlib import Path

import fused_rope.compat
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "switching.md"


def test_blocks_run():
    pytest.importorskip("transformers")
    text = PAGE.read_text()
    names = {"__name__": "switching"}
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, match.start()) + 1
        # Lines before it, so that a traceback names the page's own.
        exec(compile("\n" * line + match.group(1), str(PAGE), "exec"), names)


def test_every_drop_in_is_there():
    text = PAGE.read_text()
    for module in pkgutil.iter_modules(fused_rope.compat.__path__):
        if not module.name.startswith("_"):
            assert f"from fused_rope.compat.{module.name} import" in text
            for name in importlib.import_module(f"fused_rope.compat.{module.name}").__all__:
                assert name in text or module.name == "transformers"
