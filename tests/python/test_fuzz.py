"""A few cases of the fuzzer; `make fuzz CASES=100000` runs as many as one likes."""

import fused_rope
import fuzz
import pytest


@pytest.mark.parametrize("chunk", range(6))
def test_random_calls(chunk, seed, device):
    failures = [fuzz.failure(seed, 100 * chunk + i, device) for i in range(100)]
    failures = [text for text in failures if text]
    assert not failures, "\n\n".join(failures[:5])


@pytest.mark.parametrize("argument", ["inverse", "offset", "rotary_offset", "precision"])
def test_a_fault_is_noticed(argument, seed, monkeypatch):
    """The fuzzer fails an operator that ignores an argument."""

    def without_argument(function):
        return lambda *tensors, **kw: function(
            *tensors, **{n: v for n, v in kw.items() if n != argument}
        )

    for name in ("rotate", "rotate_", "rotate_qk", "rotate_qk_"):
        monkeypatch.setattr(fused_rope, name, without_argument(getattr(fused_rope, name)))
    assert any(fuzz.failure(seed, i, "cpu") for i in range(100))
