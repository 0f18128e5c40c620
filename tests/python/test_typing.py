"""What type checkers say of a user's script."""

import json
import subprocess
import sys
from pathlib import Path

import fused_rope
import pytest

SCRIPT = Path(__file__).parents[1] / "typing" / "user.py"
LINES = SCRIPT.read_text().splitlines()
WRONG = {number for number, line in enumerate(LINES, 1) if line.endswith("# WRONG")}
PACKAGES = str(Path(fused_rope.__file__).parents[1])


def mypy(tmp_path):
    (tmp_path / "mypy.ini").write_text(
        f"[mypy]\nstrict = true\nmypy_path = {PACKAGES}\ncache_dir = {tmp_path}\n"
        # The package's own types are checked by `make lint`.
        "[mypy-fused_rope.*]\nfollow_imports = silent\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", tmp_path / "mypy.ini", SCRIPT]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    errors = [line.split(":", 3) for line in run.stdout.splitlines() if ": error:" in line]
    return {int(number) for name, number, *_ in errors if name.endswith("user.py")}, run.stdout


def pyright(tmp_path):
    config = {"typeCheckingMode": "standard", "extraPaths": [PACKAGES], "include": [str(SCRIPT)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "-p", tmp_path]
    command += ["--pythonpath", sys.executable]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    found = json.loads(run.stdout)["generalDiagnostics"]
    errors = [item for item in found if item["severity"] == "error"]
    return {item["range"]["start"]["line"] + 1 for item in errors}, run.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "check"), [("mypy", mypy), ("basedpyright", pyright)], ids=["mypy", "pyright"]
)
def test_users_script(module, check, tmp_path):
    pytest.importorskip(module)
    errors, output = check(tmp_path)
    assert errors == WRONG, output
