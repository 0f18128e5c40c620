"""A user's script, for type checkers: each line marked WRONG, and no other, is an error."""

import fused_rope
import fused_rope.compat.diffusers
import fused_rope.compat.transformers
import torch
from fused_rope.types import Layout, Precision
from torch import Tensor
from typing_extensions import assert_type

x = torch.randn(2, 16, 4, 64)
inv_freq = fused_rope.inv_freq(64, 10000.0)
cos, sin = fused_rope.cos_sin_table(inv_freq, 128)

assert_type(cos, Tensor)
assert_type(fused_rope.rotate(x, cos, sin), Tensor)
assert_type(fused_rope.rotate_(x, cos, sin, layout="bshd"), Tensor)
assert_type(fused_rope.rotate_qk(x, x, cos, sin, offset=3), tuple[Tensor, Tensor])
assert_type(fused_rope.rotate_qk_(x, x.clone(), cos, sin), tuple[Tensor, Tensor])

rope = fused_rope.RotaryEmbedding(64, layout="bshd", scaling={"rope_type": "default"})
assert_type(rope(x), Tensor)
assert_type(rope(x, x), tuple[Tensor, Tensor])
assert_type(rope(x, x, positions=torch.arange(16)), tuple[Tensor, Tensor])
assert_type(rope.cos, Tensor)

layouts: list[Layout] = ["bshd", "sbhd"]
precision: Precision = "model"
for layout in layouts:
    fused_rope.rotate(x, cos, sin, layout=layout, precision=precision)

report = fused_rope.compat.transformers.patch(None, compiled="fused")
assert_type(report.patched, dict[str, str])
with fused_rope.compat.transformers.patched(torch.nn.Linear(1, 1)) as report:
    assert_type(report.left_alone, dict[str, str])
assert_type(fused_rope.compat.transformers.is_patched(), bool)
with fused_rope.compat.diffusers.patched(torch.nn.Linear(1, 1), norms="fused") as report:
    assert_type(report.norms, dict[str, str])
assert_type(fused_rope.distributed.zigzag_positions(8, rank=0, size=2), Tensor)
assert_type(fused_rope.mrope_axes([2, 1, 1]), tuple[int, ...])
assert_type(fused_rope.__version__, str)

fused_rope.rotate(x, cos, sin, layout="shbd")  # WRONG
fused_rope.rotate(x, cos, sin, precision="fp16")  # WRONG
fused_rope.rotate_qk(x, x, cos, sin, table_layout="full")  # WRONG
fused_rope.RotaryEmbedding(64, layout="hbsd")  # WRONG
fused_rope.compat.transformers.patch(None, compiled="inductor")  # WRONG
fused_rope.compat.transformers.patch("gpt2")  # WRONG
fused_rope.compat.diffusers.patch("black-forest-labs/FLUX.1-dev")  # WRONG
fused_rope.cos_sin_table(64, 4096)  # WRONG
rope(x, offset="3")  # WRONG
q, k = rope(x), rope(x).nothing  # WRONG
