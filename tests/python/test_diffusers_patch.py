"""diffusers: whole patched models against the originals, forward and backward."""

import re
from pathlib import Path

import pytest
import torch
from oracle import same

diffusers = pytest.importorskip("diffusers", exc_type=ImportError)

from diffusers_models import CASES, Draw  # noqa: E402
from fused_rope.compat._patching import replacements, style  # noqa: E402
from fused_rope.compat.diffusers import coverage, patch, unpatch  # noqa: E402
from fused_rope.compat.diffusers.forms import FORMS  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs" / "diffusers.md"
INSTALLED = [name for name, case in CASES.items() if case.installed]


@pytest.fixture(autouse=True)
def untouched():
    """Every test leaves the classes as they were."""
    yield
    for entry in list(replacements.current.values()):
        entry.remove()


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [t for part in values for t in tensors(part)] if hasattr(values, "__iter__") else []


def run(case, model, dtype=torch.float32, grad=True):
    """Outputs, and the gradients of all parameters and inputs."""
    arguments = case.arguments(Draw(dtype))
    inputs = [
        a for a in arguments.values() if isinstance(a, torch.Tensor) and a.is_floating_point()
    ]
    for x in inputs:
        x.requires_grad_(grad)
    model.zero_grad()
    with torch.set_grad_enabled(grad):
        outputs = tensors(model(**arguments))
        if grad:
            sum(o.float().square().mean() for o in outputs).backward()
    grads = [x.grad for x in (*model.parameters(), *inputs) if x.grad is not None]
    return [o.detach() for o in outputs], grads


def distance(ours, theirs):
    """The largest difference, over the largest element of its tensor."""
    pairs = list(zip(ours, theirs, strict=True))
    assert pairs
    return max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-9)).item()
        for a, b in pairs
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", INSTALLED)
def test_outputs_and_gradients(name, dtype, monkeypatch):
    case = CASES[name]
    model = case.build(dtype)
    original, original_grads = run(case, model, dtype)
    report = patch(model)
    assert case.form in report.patched.values()
    ours, grads = run(case, model, dtype)
    if case.bitwise:
        for a, b in zip(ours, original, strict=True):
            same(a, b)
    exact = dtype == torch.float32
    assert distance(ours, original) < (2e-6 if exact else 2e-2)
    assert distance(grads, original_grads) < (1e-5 if exact else 5e-2)

    # Copying instead of rotating must change the outputs, or the test shows nothing.
    def copies(name, tensors, *a):
        return (+tensors[0], +tensors[1]) if "qk" in name else +tensors[0]

    monkeypatch.setattr(style.functional, "call", copies)
    assert distance(run(case, model, dtype, grad=False)[0], original) > 1e-3
    assert not unpatch(model).left_alone
    monkeypatch.undo()
    for a, b in zip(run(case, model, dtype)[0], original, strict=True):
        same(a, b)


def test_every_form_has_a_model():
    assert {form.name for form in FORMS} == {case.form for case in CASES.values()}


# --- coverage -----------------------------------------------------------------------------------


def test_documented_coverage_is_that_of_the_installed_version():
    """docs/diffusers.md: python -m fused_rope.compat.diffusers > docs/diffusers.md"""
    page = DOCS.read_text()
    version = re.search(r"diffusers (\d+\.\d+\.\d+)", page)[1]
    entries = coverage.entries()
    reasons = [reason for entry in entries for reason in entry.left_alone.values()]
    assert not any("unknown" in reason for reason in reasons)
    if version != diffusers.__version__:
        pytest.skip(f"the page is that of diffusers {version}")
    assert coverage.page(entries) == page
