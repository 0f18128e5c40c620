"""What a build from source needs: one sentence for each thing that is missing."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("build_backend", ROOT / "scripts/build_backend.py")
backend = importlib.util.module_from_spec(spec)
sys.modules["build_backend"] = backend
spec.loader.exec_module(backend)

TORCH = backend.Torch(Path("torch"), "2.13.0+cpu", None)
CMAKE = [sys.executable, "-c", "print('cmake version 4.1.0')"]
OLD_CMAKE = [sys.executable, "-c", "print('cmake version 3.25.1')"]
TOOLS = 'pip install "setuptools>=77" "cmake>=3.31" ninja'


@pytest.fixture
def environment(monkeypatch):
    """An environment that has everything; returns a function that changes it."""

    def change(torch=TORCH, cmake=CMAKE, ninja="ninja", cxx=sys.executable):
        monkeypatch.setattr(backend, "find_torch", lambda: torch)
        monkeypatch.setattr(backend, "find_cmake", lambda: cmake)
        monkeypatch.setattr(backend, "find_ninja", lambda: ninja)
        monkeypatch.setenv("CXX", cxx)

    change()
    return change


def test_complete(environment):
    backend.prerequisites()


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ({"torch": None}, ["install torch first", "--no-build-isolation", TOOLS]),
        ({"torch": TORCH._replace(version="2.10.1")}, ["torch 2.11 or later", "torch 2.10.1"]),
        ({"cmake": None}, ["CMake 3.31 or later, and there is none", TOOLS]),
        ({"cmake": OLD_CMAKE}, ["CMake 3.31 or later, and 3.25.1 is found", TOOLS]),
        ({"ninja": None}, ["ninja", TOOLS]),
        ({"cxx": "/no/such/compiler -m64"}, ["C++20 compiler", "/no/such/compiler", "CXX"]),
    ],
    ids=["torch", "old torch", "cmake", "old cmake", "ninja", "compiler"],
)
def test_missing(environment, missing, words):
    environment(**missing)
    with pytest.raises(SystemExit) as exit:
        backend.build_wheel("dist")
    assert "\n" not in exit.value.code and exit.value.code.endswith(".")
    assert all(word in exit.value.code for word in words), exit.value.code


@pytest.mark.parametrize("version", [None, "68.1.2"])
def test_setuptools(monkeypatch, version):
    if version is None:
        monkeypatch.setitem(sys.modules, "setuptools", None)
    else:
        setuptools = pytest.importorskip("setuptools")
        monkeypatch.setattr(setuptools, "__version__", version)
    with pytest.raises(SystemExit) as exit:
        backend.build_sdist("dist")
    assert (version or "there is none") in exit.value.code and TOOLS in exit.value.code


def test_torch_of_an_isolated_build(environment, monkeypatch):
    """`python -m build` asks what to install before it builds."""
    monkeypatch.setenv("FUSED_ROPE_TORCH", "torch==2.13.0")
    environment(torch=None)
    assert backend.get_requires_for_build_wheel() == ["torch==2.13.0"]
    with pytest.raises(SystemExit, match="install torch first"):
        backend.build_wheel("dist")


def test_find_torch():
    import torch

    found = backend.find_torch()
    assert (found.folder, found.version) == (Path(torch.__path__[0]), torch.__version__)
    assert found.cuda == torch.version.cuda and torch.__version__.startswith(found.minor + ".")


def cmake(script, *definitions):
    """Runs a CMake script as a build runs CMake; returns the sentence of the failure."""
    command = backend.find_cmake()
    if command is None:
        pytest.skip("needs CMake")
    with pytest.raises(SystemExit) as exit:
        backend.run([*command, *definitions, "-P", script])
    return exit.value.code


def test_error_of_cmake(tmp_path):
    """CMake wraps its messages; the sentence is whole, and the last line."""
    script = tmp_path / "script.cmake"
    words = " ".join(f"word{i}" for i in range(40))
    script.write_text(f'message(STATUS "fine")\nmessage(FATAL_ERROR "{words}.")\n')
    assert cmake(script) == f"fused-rope could not be built: {words}."


def test_cuda_torch_without_nvcc(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDACXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    said = cmake(
        ROOT / "cmake/find_cuda.cmake",
        *("-DFUSED_ROPE_CUDA=AUTO", "-DTORCH_FULL_VERSION=2.14.1+cu130", "-DTORCH_CUDA_MAJOR=13"),
        # Nothing is found outside of an empty folder.
        *(f"-DCMAKE_FIND_ROOT_PATH={tmp_path}", "-DCMAKE_FIND_ROOT_PATH_MODE_PROGRAM=ONLY"),
    )
    assert "torch 2.14.1+cu130 is a CUDA build, but there is no nvcc" in said
    assert "CUDA 13 toolkit" in said and "FUSED_ROPE_CUDA=OFF" in said


def test_no_cuda_torch_with_cuda_kernels():
    said = cmake(
        ROOT / "cmake/find_cuda.cmake",
        *("-DFUSED_ROPE_CUDA=ON", "-DTORCH_FULL_VERSION=2.13.0+cpu"),
    )
    assert "torch 2.13.0+cpu is a build without CUDA" in said


@pytest.mark.slow
def test_sdist(tmp_path):
    """The source distribution has all that git tracks, but for the CI's own files."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("needs a git checkout")
    source = tmp_path / "source"
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    code = (
        "import sys; sys.path.insert(0, 'scripts'); import build_backend as b; b.build_sdist('.')"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (archive,) = source.glob("fused_rope-*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (root,) = (tmp_path / "unpacked").iterdir()
    packed = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    missing = [name for name in tracked.stdout.splitlines() if name not in packed]
    assert [name for name in missing if not name.startswith(".")] == []
