"""docs/numerics.md: each statement names tests, and they exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "numerics.md").read_text()
NAMED = re.findall(r"`([\w/]+\.(?:py|cpp))::([\w.]+)`", TEXT)


@pytest.mark.parametrize("file,name", sorted(set(NAMED)))
def test_named_test_exists(file: str, name: str) -> None:
    source = (ROOT / file if "/" in file else ROOT / "tests" / "python" / file).read_text()
    if file.endswith(".py"):
        assert re.search(rf"^def {name}\(", source, re.MULTILINE)
    else:
        assert re.search(rf"TEST(_F|_P)?\({', '.join(name.split('.'))}\)", source)


def test_every_statement_names_a_test() -> None:
    statements = re.split(r"\n(?=\* |\n)", TEXT)
    unproved = [s for s in statements if s.lstrip("\n").startswith("* ") and "::test_" not in s]
    unproved = [s for s in unproved if ".cpp::" not in s]
    assert len(statements) > 30 and not unproved
