"""A few cases of the fuzzer; `make fuzz CASES=100000` runs more."""

import fused_rope
import fuzz
import pytest


@pytest.mark.parametrize("chunk", range(6))
def test_random_calls(chunk, seed, device):
    failures = fuzz.run_chunk(seed, 100 * chunk, 100 * chunk + 100, device)
    assert not failures, "\n\n".join(failures[:5])


def test_calls_drawn_by_other_processes(seed, device):
    """As on a GPU: one process makes all calls, others draw and compare."""
    failures = fuzz.run(1000, seed, device, jobs=2, one_caller=True)
    assert not failures, "\n\n".join(failures[:5])


def test_large_calls(seed, device, monkeypatch):
    """Drawn and compared on the device; smaller here."""
    monkeypatch.setattr(fuzz, "LARGE_TOKENS", 64)
    monkeypatch.setattr(fuzz, "is_large", lambda index, device: index % 2 == 1)
    assert not fuzz.run_chunk(seed, 0, 100, device)


@pytest.mark.parametrize("argument", ["inverse", "offset", "rotary_offset", "precision"])
def test_an_ignored_argument_is_detected(argument, seed, device, monkeypatch):
    def without_argument(function):
        return lambda *tensors, **kw: function(
            *tensors, **{n: v for n, v in kw.items() if n != argument}
        )

    for name in ("rotate", "rotate_", "rotate_qk", "rotate_qk_"):
        monkeypatch.setattr(fused_rope, name, without_argument(getattr(fused_rope, name)))
    failures = fuzz.run_chunk(seed, 0, 100, device)
    assert any("prescribed bits" in text for text in failures)


@pytest.mark.parametrize("large", [False, True])
def test_stray_writes_are_detected(large, seed, device, monkeypatch):
    """The changed element belongs to no result: it is next to a tensor, or in a table."""
    monkeypatch.setattr(fuzz, "LARGE_TOKENS", 64)
    monkeypatch.setattr(fuzz, "is_large", lambda index, device: large)
    perform = fuzz.perform

    def stray(call, find):
        error = perform(call, find)
        view = call.tables[0]
        find(view._replace(size=(1,), stride=(1,), offset=view.offset - 1)).fill_(1000)
        return error

    monkeypatch.setattr(fuzz, "perform", stray)
    failures = fuzz.run_chunk(seed, 0, 20, device)
    assert len(failures) == 20
    assert all("memory was changed" in text and "differs" not in text for text in failures)


def test_results_in_new_memory_are_detected(seed, device, monkeypatch):
    """In place and with out=, the operators return the caller's tensors."""
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
