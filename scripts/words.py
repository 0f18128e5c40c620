"""Refuses words that have a standard name in this field, and says which to write instead.

Run `python scripts/words.py`. It reads every file that git tracks and prints a line per hit.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Measurements are history; the two others hold the words themselves.
SKIPPED = ("benchmarks/results/", "scripts/words.py", "tests/python/test_words.py")

# Types whose former names are common words otherwise. A Python class ends with a colon.
_TYPES = {
    "Lanes": "Pairing",
    "Quotient": "FastDivmod",
    "Box|Runs": "Tile",
    "Walk|Steps": "byte strides, or a linear offset",
    "Place": "linear coordinates",
    "Work|Side|Details": "KernelParams, TensorArgs or LookupArgs",
    "Unit": "ThreadTile",
    "Rows|LaneRows|TokenRows": "RowLookup",
}

# A lane of a warp or of a vector register is the field's own word, in files that speak of these.
_LANE = r"(?:(?<![a-zA-Z])lane|Lane)s?(?![a-z])"
_HAS_LANES = re.compile("warp|threadIdx|SIMD")

RULES = [
    *((rf"\b(?:struct|class|using) (?:{old})\b(?!:|\()", new) for old, new in _TYPES.items()),
    (_LANE, "element, or dimension of head_dim"),
    (r"\bkPlain", "kFullHead"),
    (r"\bturned\b(?! (?:on|off|into|out))", "rotated, or inverted"),
    (r"(?<![a-zA-Z])[Ss]tock(?![a-z])", "original"),
    (r"(?<![a-zA-Z])[Pp]robe(?![a-z])", "reference check"),
    (r"(?<![a-zA-Z])[Yy]ardsticks?(?![a-z])", "baseline"),
    (r"\bto the bit\b|\b(?:the same|own|very) bits\b", "bitwise identical"),
    (r"(?<![a-zA-Z])[Bb]eside(?![a-z])", "with, or together with"),
    (r"\bwait(?:s|ing|ed)? for the (?:device|GPU)\b", "synchronizes"),
    (r"\b(?:under|on (?:its|their)) way\b", "in flight"),
    (r"\b(?:puts?|putting) together\b", "combined"),
    (r"\b(?:takes?|taken|taking|took) apart\b", "split"),
    (r"\b[Nn]othing comes before\b", "no other prerequisites"),
    (r"(?<![a-z])(?:[Ss]him|[Ff]acade)s?(?![a-z])", "adapter, or drop-in for users"),
    (r"\bhow manieth\b", "index"),
]
_COMPILED = [(re.compile(pattern), advice) for pattern, advice in RULES]


def hits(text: str) -> Iterator[tuple[int, str, str]]:
    """Yields line number, refused words and what to write instead."""
    rules = [rule for rule in _COMPILED if rule[0].pattern != _LANE or not _HAS_LANES.search(text)]
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, advice in rules:
            for found in pattern.finditer(line):
                yield number, found[0], advice


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True)
    names = listed.stdout.decode().split("\0")
    return [name for name in names if (ROOT / name).is_file() and not name.startswith(SKIPPED)]


def main() -> None:
    count = 0
    for name in tracked():
        # An image decodes to text without these words.
        for line, found, advice in hits((ROOT / name).read_text(errors="replace")):
            print(f'{name}:{line}: "{found}": write "{advice}"')
            count += 1
    sys.exit(count > 0)


if __name__ == "__main__":
    main()
