"""scripts/words.py: which words `make lint` refuses, and which it does not."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "words.py"
spec = importlib.util.spec_from_file_location("words", SCRIPT)
words = importlib.util.module_from_spec(spec)
spec.loader.exec_module(words)


@pytest.mark.parametrize(
    ("text", "found", "advice"),
    [
        ("the stock function", "stock", "original"),
        ("stock_logits = model(x)", "stock", "original"),
        ("rotate_lanes(x)", "lanes", "element"),
        ("constexpr int kLanes = 4;", "Lanes", "element"),
        ("struct Rows {", "struct Rows", "RowLookup"),
        ("class Box : public Base {", "class Box", "Tile"),
        ("Form::kPlain", "kPlain", "kFullHead"),
        ("a probe of the function", "probe", "reference check"),
        ("yardstick", "yardstick", "baseline"),
        ("q beside k", "beside", "with"),
        ("never waits for the device", "waits for the device", "synchronizes"),
        ("the loads are under way", "under way", "in flight"),
        ("the same bits", "the same bits", "bitwise identical"),
        ("from . import shims", "shims", "adapter"),
        ("the rotation turned the other way", "turned", "inverted"),
    ],
)
def test_refused(text, found, advice):
    [(line, word, instead)] = words.hits("first line\n" + text)
    assert (line, word) == (2, found) and advice in instead


@pytest.mark.parametrize(
    "text",
    [
        "const unsigned lane = threadIdx.x % 32;  // warps",
        "each step probes one entry: probed = low + step",
        "two planes of an airplane",
        "plain PyTorch",
        "class Work:  # one case of the benchmark",
        "Runs all tests; the steps of a step; a place; rows [M, P]",
        "stockpile, restock, probable, problem",
        "expect_same_bits(a, b)",
        "autocast is turned off",
    ],
)
def test_allowed(text):
    assert not list(words.hits(text))


def test_output(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.py").write_text("# fine\n# stock\n")
    monkeypatch.setattr(words, "ROOT", tmp_path)
    monkeypatch.setattr(words, "tracked", lambda: ["a.py"])
    with pytest.raises(SystemExit) as exit:
        words.main()
    assert exit.value.code == 1
    assert capsys.readouterr().out == 'a.py:2: "stock": write "original"\n'
