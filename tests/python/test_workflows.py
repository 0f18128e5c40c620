"""The workflows: what they run is a target of the Makefile, so that anyone can run it."""

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
INSTALLS = re.compile(r"pipx install \S+|apt-get update -q && apt-get install [\w +-]+")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_runs_targets(path):
    jobs = yaml.safe_load(path.read_text())["jobs"]
    for name, job in jobs.items():
        commands = [step["run"] for step in job["steps"] if "run" in step]
        made = [command for command in commands if not INSTALLS.fullmatch(command)]
        assert made and all(re.fullmatch(r"make [a-z-]+", command) for command in made), name
        assert {command.split()[1] for command in made} <= TARGETS, name


def test_those_that_must_exist():
    assert {path.stem for path in WORKFLOWS} >= {"cuda", "docs", "lint", "tests", "wheels"}
