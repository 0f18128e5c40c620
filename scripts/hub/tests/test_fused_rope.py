"""Each operator equals the formula in float64."""

import fused_rope
import pytest
import torch

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotate_qk(device, dtype):
    q, k = (torch.randn(2, 9, H, 64, device=device, dtype=dtype) for H in (4, 2))
    cos, sin = fused_rope.cos_sin_table(fused_rope.inv_freq(64), 9, device=device)
    c, s = cos[:, None].double(), sin[:, None].double()
    for x, y in zip((q, k), fused_rope.rotate_qk(q, k, cos, sin), strict=True):
        a, b = x.double().chunk(2, -1)
        want = torch.cat([a * c - b * s, b * c + a * s], -1)
        torch.testing.assert_close(y.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-5)
