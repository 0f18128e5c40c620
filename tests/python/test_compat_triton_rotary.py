"""TritonRotary: a quarter of the frequencies, backward; any head counts, and gradients."""

import pytest
import torch
from formula import close, compiles, gradients, rotate_reference
from fused_rope.compat.triton_rotary import TritonRotary
from oracle import DTYPES, same

B, S, HQ, HK, D = 2, 19, 4, 2, 32


def inputs(device, dtype=torch.float32):
    """q contiguous and k a transposed projection, as models have it."""
    q = torch.randn(B, HQ, S, D, device=device).to(dtype)
    return q, torch.randn(B, S, HK, D, device=device).to(dtype).transpose(1, 2)


def written_out(x, direction=-1.0):
    quarter = (1 / 10000) ** torch.linspace(0, 1, D // 4, dtype=torch.float64)
    freq = torch.cat([quarter, torch.zeros(D // 4, dtype=torch.float64)])
    angle = (torch.arange(S, dtype=torch.float64)[:, None] * freq).to(x.device)
    return rotate_reference(x, angle.cos(), direction * angle.sin())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [S, 5])  # the table grows
def test_values(rows, dtype, device):
    rope = TritonRotary(dim=D, max_seq_len=rows).to(device)
    assert not rope.state_dict()
    q, k = inputs(device, dtype)
    before = q.clone(), k.clone()
    for y, x in zip(rope(q, k), (q, k), strict=True):
        # The table is float32.
        close(y, written_out(x), dtype=torch.float32 if dtype == torch.float64 else None, ulps=8)
    same(q, before[0])
    same(k, before[1])


def test_gradients(device):
    rope = TritonRotary(D, S).to(device)
    given, got = gradients(rope, *inputs(device))
    for g, x_grad in zip(given, got, strict=True):
        close(x_grad, written_out(g, 1.0), ulps=8)


def test_errors():
    with pytest.raises(ValueError, match="multiple of 4"):
        TritonRotary(30, 8)
    rope = TritonRotary(D, S)
    q, k = inputs("cpu")
    with pytest.raises(ValueError, match="D=32"):
        rope(q[..., :16], k[..., :16])


def test_compiles():
    compiles(TritonRotary(D, S), *inputs("cpu"))
