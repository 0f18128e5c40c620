"""The code blocks of README and docs/ run, and each statement of docs/numerics.md names tests."""

from __future__ import annotations

import doctest
import importlib.util
import pkgutil
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fused_rope.compat
import pytest
import torch
from test_aoti import skip_where_no_package_loads

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "cpp"
# Tables that other tests compare with the installed transformers and diffusers.
GENERATED = ("docs/transformers.md", "docs/from_config.md", "docs/diffusers.md")
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/NOTES.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))
PAGES = [page for page in PAGES if page not in GENERATED]
SLOW = ("docs/guides/compilers.md",)  # compiles C++
RUN = ("python", "pycon")
# Packages that may be missing, and what shows that a block needs one.
OPTIONAL = {
    "accelerate": r"\bTrainer\(",
    "megatron": r"megatron\.patch\(\)",
    "peft": r"^from peft\b",
    "torchtitan": r"torchtitan\.patch\(\)",
}


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str

    def missing(self) -> str | None:
        """A package that the block needs and that is not installed."""
        for package, sign in OPTIONAL.items():
            if re.search(sign, self.text, re.MULTILINE) and not importlib.util.find_spec(package):
                return package
        return None

    def run(self, names: dict[str, Any]) -> None:
        """Runs the block in the namespace of its page; tracebacks name the page's lines."""
        if self.language == "python":
            exec(compile("\n" * self.line + self.text, str(ROOT / self.page), "exec"), names)
            return
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        test = doctest.DocTestParser().get_doctest(
            self.text, names, self.page, str(ROOT / self.page), self.line
        )
        output: list[str] = []
        doctest.DocTestRunner(optionflags=flags).run(test, out=output.append, clear_globs=False)
        names.update(test.globs)
        assert not output, "".join(output)


def blocks_of(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text()
    for fence in re.finditer(r"^ *```(\S*)(.*)\n((?:.*\n)*?) *```$", text, re.MULTILINE):
        if not fence[1].startswith("{"):
            yield Block(page, text.count("\n", 0, fence.start()) + 1, fence[1], fence[3])


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def parameters(*languages: str) -> list[Any]:
    return [
        pytest.param(
            block,
            id=f"{block.page}:{block.line}",
            marks=[pytest.mark.slow] if block.page in SLOW else [],
        )
        for block in BLOCKS
        if block.language in languages
    ]


class Pages:
    """The namespaces of the pages, and how far each page has run."""

    def __init__(self) -> None:
        self.names: dict[str, dict[str, Any]] = {}
        self.done: dict[str, int] = {}

    def run(self, block: Block) -> None:
        """Runs the blocks of the page up to this one, unless they ran already."""
        names = self.names.setdefault(block.page, {"__name__": "page"})
        for other in blocks_of(block.page):
            if self.done.get(block.page, 0) < other.line <= block.line and other.language in RUN:
                if not other.missing():
                    other.run(names)
                self.done[block.page] = other.line


@pytest.fixture(scope="module")
def pages() -> Pages:
    return Pages()


@pytest.mark.parametrize("block", parameters(*RUN))
def test_python_block_runs(
    block: Block, pages: Pages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "transformers" in "".join(b.text for b in blocks_of(block.page)):
        pytest.importorskip("transformers")
    if package := block.missing():
        pytest.skip(f"{package} is not installed")
    if "aoti_load_package" in block.text:
        skip_where_no_package_loads(tmp_path)
    monkeypatch.chdir(tmp_path)
    pages.run(block)
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("block", parameters("cpp", "cmake"))
def test_cpp_block_is_part_of_an_example(block: Block) -> None:
    """test_cpp_example.py builds and runs the examples."""
    suffixes = {"cpp": ("*.cpp",), "cmake": ("CMakeLists.txt",)}[block.language]
    sources = [path.read_text() for suffix in suffixes for path in EXAMPLES.glob(suffix)]
    # A page may leave out a part, with an empty line in its place.
    for part in block.text.strip("\n").split("\n\n"):
        assert any(part in source for source in sources), part


TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("block", parameters("sh"))
def test_shell_block_names_what_exists(block: Block) -> None:
    """Its syntax is bash's, and its make targets, programs and files exist."""
    subprocess.run([shutil.which("bash") or "bash", "-n"], input=block.text, text=True, check=True)
    for target in re.findall(r"^make ([\w-]+)", block.text, re.MULTILINE):
        assert target in TARGETS
    for file in re.findall(r"\b(?:benchmarks|examples|scripts|tests)/[\w/.-]+", block.text):
        assert (ROOT / file).exists(), file


def test_every_block_has_a_known_language() -> None:
    """`text` is for formulas and messages that no code block can show."""
    known = {*RUN, "cpp", "cmake", "sh", "text"}
    assert not [f"{b.page}:{b.line}" for b in BLOCKS if b.language not in known]
    assert {block.page for block in BLOCKS} > {"README.md", "docs/concepts.md"}


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    listed = set(re.findall(r"^[\w/]+$", index, re.MULTILINE))
    found = {str(p.relative_to(ROOT / "docs").with_suffix("")) for p in ROOT.glob("docs/**/*.md")}
    assert found == {*listed, "index"}


def test_every_public_name_is_in_the_api() -> None:
    functions = (ROOT / "docs" / "api" / "python.md").read_text()
    assert not [name for name in fused_rope.__all__ if not re.search(rf"\b{name}\b", functions)]
    drop_ins = (ROOT / "docs" / "api" / "compat.md").read_text()
    modules = [m.name for m in pkgutil.iter_modules(fused_rope.compat.__path__)]
    assert not [name for name in modules if name[0] != "_" and f".{name}\n" not in drop_ins]


def test_readme_is_short_and_its_links_exist() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert "://" in link or (ROOT / link).exists(), link


@pytest.mark.parametrize(
    "generated,pages",
    [
        ("docs/transformers.md", ["README.md", "docs/guides/huggingface.md"]),
        ("docs/diffusers.md", ["README.md", "docs/guides/diffusers.md"]),
    ],
)
def test_counts_are_those_of_the_generated_page(generated: str, pages: list[str]) -> None:
    """How many models a patch covers."""
    count = re.search(r"\*\*(\d+ of \d+) ", (ROOT / generated).read_text())
    assert count
    for page in pages:
        assert count[1] in (ROOT / page).read_text(), page


# --- docs/numerics.md -----------------------------------------------------------------------------

NUMERICS = (ROOT / "docs" / "numerics.md").read_text()
NAMED = re.findall(r"`([\w/]+\.(?:py|cpp))::([\w.]+)`", NUMERICS)


@pytest.mark.parametrize("file,name", sorted(set(NAMED)))
def test_named_test_exists(file: str, name: str) -> None:
    source = (ROOT / file if "/" in file else ROOT / "tests" / "python" / file).read_text()
    if file.endswith(".py"):
        assert re.search(rf"^def {name}\(", source, re.MULTILINE)
    else:
        assert re.search(rf"TEST(_F|_P)?\({', '.join(name.split('.'))}\)", source)


def test_every_statement_names_a_test() -> None:
    statements = re.split(r"\n(?=\* |\n)", NUMERICS)
    unproved = [s for s in statements if s.lstrip("\n").startswith("* ") and "::test_" not in s]
    unproved = [s for s in unproved if ".cpp::" not in s]
    assert len(statements) > 30 and not unproved
