"""The README's Python blocks run as they stand, one after the other."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[2] / "README.md"


def blocks():
    """The Python blocks, each with the line of the README that it starts in."""
    text = README.read_text()
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, match.start()) + 1, match.group(1)


def test_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    found = 0
    for line, block in blocks():
        # Lines before it, so that a traceback names the README's own.
        exec(compile("\n" * line + block, str(README), "exec"), names)
        found += 1
    assert found >= 1
    assert not torch.is_inference_mode_enabled()
