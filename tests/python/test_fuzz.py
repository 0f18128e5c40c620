"""A few cases of the fuzzer; `make fuzz CASES=100000` runs as many as one likes."""

import fused_rope
import fuzz
import pytest


@pytest.mark.parametrize("chunk", range(6))
def test_random_calls(chunk, seed, device):
    failures = fuzz.run_chunk(seed, 100 * chunk, 100 * chunk + 100, device)
    assert not failures, "\n\n".join(failures[:5])


def test_calls_drawn_by_other_processes(seed, device):
    """The way of a GPU: all calls made by one process, their memory and results by others."""
    failures = fuzz.run(1000, seed, device, jobs=2, one_caller=True)
    assert not failures, "\n\n".join(failures[:5])


def test_large_calls(seed, device, monkeypatch):
    """Drawn and compared where they run; here less large."""
    monkeypatch.setattr(fuzz, "LARGE_TOKENS", 64)
    monkeypatch.setattr(fuzz, "is_large", lambda index, device: index % 2 == 1)
    assert not fuzz.run_chunk(seed, 0, 100, device)


@pytest.mark.parametrize("argument", ["inverse", "offset", "rotary_offset", "precision"])
def test_a_fault_is_noticed(argument, seed, device, monkeypatch):
    """The fuzzer fails an operator that ignores an argument."""

    def without_argument(function):
        return lambda *tensors, **kw: function(
            *tensors, **{n: v for n, v in kw.items() if n != argument}
        )

    for name in ("rotate", "rotate_", "rotate_qk", "rotate_qk_"):
        monkeypatch.setattr(fused_rope, name, without_argument(getattr(fused_rope, name)))
    failures = fuzz.run_chunk(seed, 0, 100, device)
    assert any("prescribed bits" in text for text in failures)


@pytest.mark.parametrize("large", [False, True])
def test_stray_writes_are_noticed(large, seed, device, monkeypatch):
    """One element is changed that belongs to no result: beside a tensor, or in a table."""
    monkeypatch.setattr(fuzz, "LARGE_TOKENS", 64)
    monkeypatch.setattr(fuzz, "is_large", lambda index, device: large)
    perform = fuzz.perform

    def stray(call, find):
        error = perform(call, find)
        view = call.tables[0]
        find(view._replace(size=(1,), stride=(1,), offset=view.offset - 1)).zero_()
        return error

    monkeypatch.setattr(fuzz, "perform", stray)
    failures = fuzz.run_chunk(seed, 0, 20, device)
    assert len(failures) == 20
    assert all("memory was changed" in text and "differs" not in text for text in failures)


def test_results_in_new_memory_are_noticed(seed, device, monkeypatch):
    """In place and with out=, the caller's own tensors come back."""
    for name in ("rotate_", "rotate_qk_"):
        function = getattr(fused_rope, name.removesuffix("_"))
        monkeypatch.setattr(fused_rope, name, function)
    failures = fuzz.run_chunk(seed, 0, 100, device)
    assert failures
    assert all("is not the one" in text for text in failures)


def test_a_raised_error_is_a_failure(seed, device, monkeypatch):
    def raising(*tensors, **kw):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(fused_rope, "rotate_", raising)
    failures = fuzz.run_chunk(seed, 0, 100, device)
    assert failures
    assert all(text.count("!") == 1 and "out of luck" in text for text in failures)
    assert f"--seed {seed} --only " in failures[0]
