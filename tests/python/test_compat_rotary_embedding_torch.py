"""rotary-embedding-torch's functions and module: shapes, axial angles, learned ones, and XPos."""

import math

import pytest
import torch
from formula import close, compiles, gradients, series, turned
from fused_rope.compat.rotary_embedding_torch import (
    RotaryEmbedding,
    apply_learned_rotations,
    apply_rotary_emb,
)
from oracle import DTYPES, same, same_bits

B, H, S, D, R = 2, 3, 9, 32, 16


def twice(angle):
    return angle.repeat_interleave(2, -1)


def written_out(t, angle, start=0, scale=1.0):
    """t turned by float64 angles [..., R/2] that broadcast."""
    angle = angle.detach().double().to(t.device)
    return turned(t, scale * angle.cos(), scale * angle.sin(), interleaved=True, start=start)


# --- the function -------------------------------------------------------------------------------


def test_results_are_contiguous(device):
    """As the original's, whatever t's strides: its callers may view them."""
    t = torch.randn(B, S, H, D, device=device).transpose(1, 2)
    rotary = RotaryEmbedding(R).to(device)
    for got in (
        rotary.rotate_queries_or_keys(t),
        apply_rotary_emb(torch.randn(B, 1, S, R, device=device), t),
        rotary.rotate_queries_or_keys(t.bfloat16()),
    ):
        assert got.is_contiguous()
    same(rotary.rotate_queries_or_keys(t), rotary.rotate_queries_or_keys(t.contiguous()))


SHAPES = {  # angles, and what they turn
    "sequence": ((S,), (B, H, S, D)),
    "sequence before heads": ((S, 1), (B, S, H, D)),
    "three dimensions": ((S,), (B, S, D)),
    "two dimensions": ((S,), (S, D)),
    "of each sequence": ((B, 1, S), (B, H, S, D)),
    "of each head": ((H, S), (B, H, S, D)),
    "of each head, heads last": ((S, H), (B, S, H, D)),
    "of everything": ((B, H, S), (B, H, S, D)),
    "one for all": ((1, 1), (B, H, S, D)),
    "image": ((4, 5), (B, H, 4, 5, D)),
    "video": ((2, 4, 5), (B, H, 2, 4, 5, D)),
    "rows only": ((4, 1), (B, H, 4, 5, D)),
    "no tokens": ((0,), (B, H, 0, D)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_values(name, dtype, device):
    """Whatever broadcasts; part of the lanes; the others bit for bit."""
    rows, shape = SHAPES[name]
    seq_dim = -3 if "before heads" in name or "heads last" in name else -2
    angle = torch.rand(*rows, R // 2, device=device) * 6
    t = torch.randn(shape, device=device).to(dtype)
    before = t.clone()
    for start in (0, 5):
        y = apply_rotary_emb(twice(angle), t, start, seq_dim=seq_dim)
        assert y.dtype == dtype
        wide = torch.float32 if dtype == torch.float64 else None  # the angles are float32
        close(y, written_out(t, angle, start), dtype=wide)
        same_bits(y[..., start + R :], t[..., start + R :])
        same_bits(y[..., :start], t[..., :start])
    same(t, before)


@pytest.mark.parametrize("name", SHAPES)
def test_gradients(name, device):
    rows, shape = SHAPES[name]
    seq_dim = -3 if "before heads" in name or "heads last" in name else -2
    angle = torch.rand(*rows, R // 2, device=device) * 6
    (given,), (got,) = gradients(
        lambda t: apply_rotary_emb(twice(angle), t, 5, seq_dim=seq_dim),
        torch.randn(shape, device=device),
    )
    close(got, written_out(given, -angle, 5))


def test_strided_inputs(device):
    """Transposed projections, which no reshape must copy into another order."""
    t = torch.randn(B, S, H, D, device=device).transpose(1, 2)
    angle = torch.rand(S, R // 2, device=device)
    close(apply_rotary_emb(twice(angle), t), written_out(t, angle))
    video = torch.randn(B, 2, 4, 5, H, D, device=device).movedim(4, 1)
    angle = torch.rand(2, 4, 5, R // 2, device=device)
    close(apply_rotary_emb(twice(angle), video), written_out(video, angle))


def test_the_last_rows_and_scale(device):
    """Longer angles turn the tokens at their end; scale multiplies what turns."""
    angle = torch.rand(S + 4, R // 2, device=device)
    t = torch.randn(B, H, S, D, device=device)
    close(apply_rotary_emb(twice(angle), t, scale=0.5), written_out(t, angle[4:], scale=0.5))
    scale = torch.rand(S, R // 2, device=device) + 0.5
    got = apply_rotary_emb(twice(angle), t, scale=twice(scale))
    close(got, written_out(t, angle[4:], scale=scale.double()), ulps=8)
    per_batch = torch.rand(B, 1, S + 4, R // 2, device=device)
    got = apply_rotary_emb(twice(per_batch), t, freqs_seq_dim=2)
    close(got, written_out(t, per_batch[:, :, 4:]))


def test_learned_angles(device):
    """Their gradient is the true one, by float64 autograd of the formula."""
    rotations = torch.rand(S, R // 2, device=device, dtype=torch.float64, requires_grad=True)
    t = torch.randn(B, H, S, D, device=device, dtype=torch.float64, requires_grad=True)
    close(apply_learned_rotations(rotations, t, 2), written_out(t, rotations, 2))
    torch.autograd.gradcheck(lambda a, t: apply_learned_rotations(a, t, 2), (rotations, t))
    ranges = torch.tensor([1.0, 2.0, 4.0, 8.0], device=device, dtype=torch.float64)
    few = rotations[:, :2]
    want = (few[..., None] * ranges).flatten(-2)
    close(apply_learned_rotations(few, t, freq_ranges=ranges), written_out(t, want))


def test_function_errors():
    t = torch.randn(B, H, S, D)
    with pytest.raises(ValueError):
        apply_rotary_emb(torch.rand(S, D + 2), t)
    with pytest.raises(ValueError, match="freqs"):
        apply_rotary_emb(torch.rand(2, B, H, S, R), t)


# --- the module ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seq_before_head_dim", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_or_keys(dtype, seq_before_head_dim, device):
    rotary = RotaryEmbedding(R, seq_before_head_dim=seq_before_head_dim).to(device)
    assert set(rotary.state_dict()) == {"freqs"}
    t = torch.randn(B, H, S, D, device=device).to(dtype)
    for offset in (0, 5):
        angle = (torch.arange(S)[:, None] + offset) * series(R)
        want = written_out(t, angle)
        for seq_dim in (2, -2):
            close(rotary.rotate_queries_or_keys(t, seq_dim, offset), want, ulps=16)
        u = t.transpose(1, 2)
        for seq_dim in (1, -3):
            got = rotary.rotate_queries_or_keys(u, seq_dim, offset).transpose(1, 2)
            close(got, want, ulps=16)
        default = u if seq_before_head_dim else t
        got = rotary.rotate_queries_or_keys(default, offset=offset)
        close(got.transpose(1, 2) if seq_before_head_dim else got, want, ulps=16)


def test_positions_are_not_counted_in_half_precision(device):
    """bfloat16 has no 257: the original gives 256 and 257 one angle."""
    rotary = RotaryEmbedding(R).to(device)
    t = torch.randn(1, 1, 1, D, device=device).bfloat16().expand(1, 1, 400, D)
    y = rotary.rotate_queries_or_keys(t)
    close(y, written_out(t, torch.arange(400)[:, None] * series(R)), ulps=4)
    assert not torch.equal(y[:, :, 256], y[:, :, 257])
    y = rotary.bfloat16().rotate_queries_or_keys(t)  # nor where the model was cast
    assert not torch.equal(y[:, :, 256], y[:, :, 257])


def test_cached_keys(device):
    rotary = RotaryEmbedding(R).to(device)
    q, k = torch.randn(B, H, 2, D, device=device), torch.randn(B, H, S, D, device=device)
    got = rotary.rotate_queries_with_cached_keys(q, k)
    angle = torch.arange(S)[:, None] * series(R)
    close(got[0], written_out(q, angle[-2:]), ulps=16)
    close(got[1], written_out(k, angle), ulps=16)
    with pytest.raises(ValueError, match="Sq <= Sk"):
        rotary.rotate_queries_with_cached_keys(k, q)


@pytest.mark.parametrize("seq_before_head_dim", [False, True])
def test_xpos(seq_before_head_dim, device):
    """Scores depend on distances alone, and shrink with them."""
    rotary = RotaryEmbedding(R, use_xpos=True, seq_before_head_dim=seq_before_head_dim).to(device)
    q, k = (torch.randn(B, H, S, D, device=device) for _ in range(2))
    swap = (lambda x: x.transpose(1, 2)) if seq_before_head_dim else (lambda x: x)
    got = [swap(y) for y in rotary.rotate_queries_and_keys(swap(q), swap(k))]
    lane = (torch.arange(0, R, 2).double() + 0.4 * R) / (1.4 * R)
    row = torch.arange(S).double()[:, None]
    scale = (lane ** ((row - S // 2) / 512)).to(device)
    angle = row * series(R)
    close(got[0], written_out(q, angle, scale=scale), ulps=16)
    close(got[1], written_out(k, angle, scale=1 / scale), ulps=16)
    cached = rotary.rotate_queries_with_cached_keys(swap(q[:, :, -2:]), swap(k))
    close(swap(cached[1]), written_out(k, angle, scale=1 / scale), ulps=16)
    with pytest.raises(ValueError, match="scale"):
        rotary.rotate_queries_or_keys(q)
    with pytest.raises(ValueError, match="use_xpos"):
        RotaryEmbedding(R).rotate_queries_and_keys(q, k)


def test_frequencies(device):
    def freqs(**options):
        return RotaryEmbedding(R, **options).to(device).freqs.detach()

    close(freqs(theta=500.0), series(R, 500.0).to(device))
    close(freqs(theta_rescale_factor=4.0), series(R, 10000 * 4 ** (R / (R - 2))).to(device))
    want = torch.linspace(1, 5, R // 2, dtype=torch.float64) * math.pi
    close(freqs(freqs_for="pixel"), want.to(device))
    close(freqs(freqs_for="constant", num_freqs=3), torch.ones(3, device=device).double())
    close(freqs(custom_freqs=torch.arange(4.0)), torch.arange(4.0, device=device).double())
    half = RotaryEmbedding(R, interpolate_factor=2.0).get_seq_pos(4, offset=1)
    assert half.tolist() == [0.5, 1.0, 1.5, 2.0]
    with pytest.raises(ValueError, match="interpolate_factor"):
        RotaryEmbedding(R, interpolate_factor=0.5)
    with pytest.raises(ValueError, match="freqs_for"):
        RotaryEmbedding(R, freqs_for="words")


def test_axial(device):
    """Angles of an image, those of its rows beside those of its columns, and with offsets."""
    for freqs_for in ("pixel", "lang"):
        rotary = RotaryEmbedding(R // 2, freqs_for=freqs_for).to(device)
        freqs = rotary.freqs.detach().double().cpu()
        for offsets in (None, (2, 3)):
            positions = [
                torch.linspace(-1, 1, n) if freqs_for == "pixel" else torch.arange(n)
                for n in (4, 5)
            ]
            axes = [
                (p.double() + (offsets[i] if offsets else 0))[:, None] * freqs
                for i, p in enumerate(positions)
            ]
            angle = torch.cat(
                [axes[0][:, None].expand(4, 5, -1), axes[1][None].expand(4, 5, -1)], -1
            )
            got = rotary.get_axial_freqs(4, 5, offsets=offsets)
            close(got, twice(angle).to(device), ulps=64)
            t = torch.randn(B, H, 4, 5, D, device=device)
            close(rotary.apply_rotary_emb(got, t), written_out(t, angle), ulps=256)
    with pytest.raises(ValueError, match="offset"):
        rotary.get_axial_freqs(4, 5, offsets=(1,))


def test_learned_frequencies(device):
    rotary = RotaryEmbedding(R, learned_freq=True).to(device)
    t = torch.randn(B, H, S, D, device=device)
    g = torch.randn_like(t)
    rotary.rotate_queries_or_keys(t).backward(g)
    freqs = series(R).to(device).requires_grad_()
    angle = torch.arange(S, device=device)[:, None] * freqs
    a, b = t[..., :R:2].double(), t[..., 1:R:2].double()
    turned_pairs = torch.stack(
        [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1
    )
    turned_pairs.flatten(-2).backward(g[..., :R].double())
    torch.testing.assert_close(rotary.freqs.grad.double(), freqs.grad, rtol=1e-4, atol=1e-4)


def test_compiles():
    t = torch.randn(B, H, S, D)
    compiles(RotaryEmbedding(R).rotate_queries_or_keys, t, offset=3)
    compiles(apply_rotary_emb, torch.rand(2, 4, 5, R), torch.randn(B, H, 2, 4, 5, D))


# --- the original -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"use_xpos": True}, {"interpolate_factor": 2.0}], ids=str)
@pytest.mark.parametrize("seq_before_head_dim", [False, True])
def test_original(seq_before_head_dim, options, device):
    original = pytest.importorskip("rotary_embedding_torch")
    options = dict(options, seq_before_head_dim=seq_before_head_dim)
    ours, theirs = (m(R, **options).to(device) for m in (RotaryEmbedding, original.RotaryEmbedding))
    ours.load_state_dict(theirs.state_dict())
    shape = (B, S, H, D) if seq_before_head_dim else (B, H, S, D)
    q, k = (torch.randn(shape, device=device) for _ in range(2))
    last = q[:, -2:] if seq_before_head_dim else q[:, :, -2:]
    calls = [lambda m: m.rotate_queries_with_cached_keys(last, k)]
    if ours.use_xpos:
        calls = calls if not seq_before_head_dim else []  # there the original's scale does not fit
        calls.append(lambda m: m.rotate_queries_and_keys(q, k))
    else:
        calls.append(lambda m: [m.rotate_queries_or_keys(q, offset=4)])
    for call in calls:
        for y, z in zip(call(ours), call(theirs), strict=True):
            torch.testing.assert_close(y, z, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_original_function(name, device):
    original = pytest.importorskip("rotary_embedding_torch")
    rows, shape = SHAPES[name]
    seq_dim = -3 if "before heads" in name or "heads last" in name else -2
    freqs = twice(torch.rand(*rows, R // 2, device=device) * 6)
    t = torch.randn(shape, device=device)
    got, want = (
        f(freqs, t, 5, seq_dim=seq_dim) for f in (apply_rotary_emb, original.apply_rotary_emb)
    )
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    axial = [m(R, freqs_for="pixel").get_axial_freqs(4, 5, offsets=(1, 2))
             for m in (RotaryEmbedding, original.RotaryEmbedding)]  # fmt: skip
    torch.testing.assert_close(*axial, rtol=1e-6, atol=1e-5)
