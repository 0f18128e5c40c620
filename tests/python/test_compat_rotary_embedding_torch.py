"""rotary-embedding-torch's functions and module: shapes, axial angles, learned ones, and XPos."""

import copy
import io
import math
import pickle

import pytest
import torch
from formula import close, compiles, gradients, rotate_reference, series
from fused_rope.compat.rotary_embedding_torch import (
    RotaryEmbedding,
    apply_learned_rotations,
    apply_rotary_emb,
    broadcat,
    rotate_half,
)
from oracle import DTYPES, identical, same
from torch._subclasses.fake_tensor import FakeTensorMode

B, H, S, D, R = 2, 3, 9, 32, 16


def twice(angle):
    return angle.repeat_interleave(2, -1)


def written_out(t, angle, start=0, scale=1.0):
    """t rotated by float64 angles [..., R/2] that broadcast."""
    angle = angle.detach().double().to(t.device)
    return rotate_reference(
        t, scale * angle.cos(), scale * angle.sin(), interleaved=True, start=start
    )


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


SHAPES = {  # angles, and what they rotate
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
    """Whatever broadcasts; part of the elements; the others bitwise."""
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
        identical(y[..., start + R :], t[..., start + R :])
        identical(y[..., :start], t[..., :start])
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
    """Longer angles rotate the tokens at their end; scale multiplies what is rotated."""
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
    base = (torch.arange(0, R, 2).double() + 0.4 * R) / (1.4 * R)
    row = torch.arange(S).double()[:, None]
    scale = (base ** ((row - S // 2) / 512)).to(device)
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
    """Angles of an image, those of its rows next to those of its columns, and with offsets."""
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
    rotated_pairs = torch.stack(
        [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1
    )
    rotated_pairs.flatten(-2).backward(g[..., :R].double())
    torch.testing.assert_close(rotary.freqs.grad.double(), freqs.grad, rtol=1e-4, atol=1e-4)


# --- casts, moves and copies of the module ------------------------------------------------------


def cast_data(rotary, dtype):
    """As older mixed-precision tools cast a model, past the module."""
    for parameter in rotary.parameters():
        parameter.data = parameter.data.to(dtype)
    return rotary


def on_meta(**options):
    with torch.device("meta"):
        return RotaryEmbedding(R, **options)


def round_trip(rotary):
    file = io.BytesIO()
    torch.save(rotary, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to dtype": lambda m: m.to(torch.float16),
    "to device and dtype": lambda m: m.to("cpu", torch.bfloat16),
    "type": lambda m: m.type(torch.float16),
    "whole model": lambda m: torch.nn.Sequential(torch.nn.Linear(2, 2), m).half()[1],
    "half and back": lambda m: m.half().float(),
    "one after the other": lambda m: m.bfloat16().half().float(),
    "double": lambda m: m.double(),
    "double and back": lambda m: m.double().float(),
    "data": lambda m: cast_data(m, torch.bfloat16),
    "data, then float": lambda m: cast_data(m, torch.float16).float(),
    "deepcopy": lambda m: copy.deepcopy(m).half(),
    "pickle": lambda m: pickle.loads(pickle.dumps(m.half())),
    "torch.save": lambda m: round_trip(m.bfloat16()),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "meta and to_empty": lambda m: m.to("meta").half().to_empty(device="cpu"),
    "overwritten parameters": lambda m: overwriting(m),
}


def overwriting(rotary):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return rotary.half()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


KINDS = {
    "lang": {"theta": 500000.0},
    "pixel": {"freqs_for": "pixel"},
    "constant": {"freqs_for": "constant", "num_freqs": R // 2},
    "custom": {"custom_freqs": torch.linspace(0.1, 0.7, R // 2)},
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("kind", KINDS)
def test_casts_do_not_round_frequencies(kind, cast):
    """Whole-model casts leave far positions right, bitwise as before; no cast narrows `freqs`."""
    t = torch.randn(1, 1, 3, R)
    rotary = RotaryEmbedding(R, **KINDS[kind])
    before = rotary.freqs.detach().clone()
    want = rotary.rotate_queries_or_keys(t, offset=5000)
    rotary = CASTS[cast](rotary)
    assert isinstance(rotary.freqs, torch.nn.Parameter) and not rotary.freqs.requires_grad
    if cast == "double":
        assert rotary.freqs.dtype == torch.float64
        same(rotary.freqs.float(), before)
        return
    same(rotary.rotate_queries_or_keys(t, offset=5000), want)
    if cast != "data":
        same(rotary.freqs, before)
    assert set(rotary.state_dict()) == {"freqs"} and not list(rotary.buffers())


def test_far_positions_after_a_cast(device):
    """Against float64 frequencies, in half precision (32 ulp of the angle's float32)."""
    rotary = RotaryEmbedding(R).half().to(device)
    t = torch.randn(1, 2, 2000, D, device=device).half()
    want = written_out(t, torch.arange(2000)[:, None] * series(R))
    close(rotary.rotate_queries_or_keys(t), want, ulps=2)
    close(rotary.double().freqs, series(R).to(device))


def test_frequencies_that_were_changed_stay_changed():
    """Casts, copies and checkpoints follow the parameter, not the arguments of the module."""
    t = torch.randn(1, 1, 3, R)
    freqs = torch.rand(R // 2)
    rotary = RotaryEmbedding(R)
    rotary.freqs.data.copy_(freqs)
    want = RotaryEmbedding(R, custom_freqs=freqs).rotate_queries_or_keys(t, offset=99)
    for changed in (rotary, rotary.half(), copy.deepcopy(rotary)):
        same(changed.rotate_queries_or_keys(t, offset=99), want)
    loaded = RotaryEmbedding(R)
    loaded.load_state_dict(rotary.state_dict())
    same(loaded.half().rotate_queries_or_keys(t, offset=99), want)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("back", [False, True])
def test_half_checkpoints_do_not_round_frequencies(back, dtype, assign):
    """A checkpoint in half precision, or saved after one, gives the float32 numbers again."""
    state = {"0.freqs": RotaryEmbedding(R).freqs.detach().to(dtype)}
    state["0.freqs"] = state["0.freqs"].float() if back else state["0.freqs"]
    given = state["0.freqs"].clone()
    model = torch.nn.Sequential(on_meta() if assign else RotaryEmbedding(R))
    model.load_state_dict(state, assign=assign)
    same(model[0].freqs, RotaryEmbedding(R).freqs)
    same(state["0.freqs"], given)
    other = {"0.freqs": torch.rand(R // 2).to(dtype)}  # somebody else's frequencies
    model.load_state_dict(other)
    same(model[0].freqs, other["0.freqs"].float())
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({"0.freqs": torch.rand(R)})


def test_learned_frequencies_are_a_weight_like_any_other():
    """Casts round them, no checkpoint or call restores what training moved them away from."""
    t = torch.randn(1, 1, 3, R)
    rotary = RotaryEmbedding(R, learned_freq=True).half()
    assert rotary.freqs.dtype == torch.float16 and rotary.freqs.requires_grad
    rounded = RotaryEmbedding(R).freqs.half()
    same(rotary.freqs, rounded)
    want = RotaryEmbedding(R, custom_freqs=rounded.float()).rotate_queries_or_keys(t, offset=99)
    same(rotary.rotate_queries_or_keys(t, offset=99), want)
    rotary = RotaryEmbedding(R, learned_freq=True)
    rotary.load_state_dict({"freqs": rounded})
    same(rotary.freqs, rounded.float())


@pytest.mark.parametrize("learned", [False, True])
def test_meta_device(learned):
    """`to_empty` gives the initial frequencies; so does `reset_parameters`, as FSDP calls it."""
    rotary = torch.nn.Sequential(on_meta(learned_freq=learned)).to_empty(device="cpu")[0]
    same(rotary.freqs, RotaryEmbedding(R).freqs)
    assert rotary.freqs.requires_grad == learned
    rotary.freqs.data.zero_()
    rotary.reset_parameters()
    same(rotary.freqs, RotaryEmbedding(R).freqs)
    unknown = RotaryEmbedding(R, custom_freqs=torch.empty(R // 2, device="meta"))
    with pytest.raises(RuntimeError, match="custom_freqs"):
        unknown.to_empty(device="cpu").reset_parameters()


@pytest.mark.parametrize(
    "options", [{}, {"use_xpos": True}, {"learned_freq": True}, {"custom_freqs": None}], ids=str
)
def test_made_called_and_moved_in_inference_mode_then_trained(options, device):
    """No state is an inference tensor, which autograd could not save."""
    with torch.inference_mode():
        if "custom_freqs" in options:
            options = {"custom_freqs": torch.rand(R // 2)}
        rotary = RotaryEmbedding(R, **options).half().float().to(device)
        rotary.load_state_dict(rotary.state_dict())
        q = torch.randn(B, H, S, D, device=device)
        rotary.rotate_queries_with_cached_keys(q, q)
    assert not rotary.freqs.is_inference()
    weight = torch.randn(B, H, S, D, device=device, requires_grad=True)
    got = rotary.rotate_queries_with_cached_keys(weight, weight * 1)
    sum(y.sum() for y in got).backward()
    assert weight.grad.isfinite().all()
    if rotary.learned_freq:
        assert rotary.freqs.grad.isfinite().all()


def test_made_or_called_with_fake_tensors():
    """A module that a fake mode saw computes with real ones, once its parameter is real."""
    t = torch.randn(B, H, S, D)
    real = RotaryEmbedding(R)
    want = real.rotate_queries_or_keys(t)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        made = RotaryEmbedding(R)
        made.rotate_queries_or_keys(mode.from_tensor(t))
        real.rotate_queries_or_keys(mode.from_tensor(t))
    same(real.rotate_queries_or_keys(t), want)
    made.load_state_dict(real.state_dict(), assign=True)
    same(made.rotate_queries_or_keys(t), want)


def test_frequencies_and_scales_do_not_follow_the_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        rotary = [RotaryEmbedding(R, freqs_for=f, use_xpos=True) for f in ("lang", "pixel")]
        got = [(m.freqs.detach(), m.get_scale(torch.arange(S))) for m in rotary]
    finally:
        torch.set_default_dtype(torch.float32)
    for (freqs, scale), f in zip(got, ("lang", "pixel"), strict=True):
        want = RotaryEmbedding(R, freqs_for=f, use_xpos=True)
        same(freqs, want.freqs)
        same(scale, want.get_scale(torch.arange(S)))


def test_helpers():
    """The original's helpers, by their definitions."""
    x = torch.randn(2, S, R)
    same(rotate_half(x)[..., 0::2], -x[..., 1::2])
    same(rotate_half(x)[..., 1::2], x[..., 0::2])
    a, b = torch.randn(4, 1, 3), torch.randn(1, 5, 2)
    with pytest.raises(RuntimeError):
        broadcat((a, b))
    same(broadcat((a, b[..., :1]), dim=1)[:, :1], a)
    same(broadcat((a, a[:1]))[..., 3:], a[:1].expand(4, 1, 3))


def test_errors_of_the_module():
    with pytest.raises(ValueError, match="even dim, got 7"):
        RotaryEmbedding(7)
    with pytest.raises(ValueError, match="freqs_for"):
        RotaryEmbedding(R, freqs_for="text")
    with pytest.raises(ValueError, match="interpolate_factor"):
        RotaryEmbedding(R, interpolate_factor=0.5)


def test_compiles():
    compiles(RotaryEmbedding(R).half().rotate_queries_or_keys, torch.randn(B, H, S, D).half())
    cast = cast_data(RotaryEmbedding(R), torch.bfloat16)
    compiles(cast.rotate_queries_or_keys, torch.randn(B, H, S, D).bfloat16())
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


@pytest.mark.parametrize("how", ["trace", "export"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace")
def test_xpos_of_other_lengths_than_the_traced_one(how):
    """The middle of the sequence, where the scale is 1, is that of each call."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rotary = RotaryEmbedding(R, use_xpos=True)

        def forward(self, q, k):
            return self.rotary.rotate_queries_and_keys(q, k)

    q, net = torch.randn(B, H, S, D), Net()
    if how == "trace":
        traced = torch.jit.trace(net, (q, q))
    else:
        length = torch.export.Dim("S", min=2, max=64)
        traced = torch.export.export(net, (q, q), dynamic_shapes=({2: length},) * 2).module()
    for length in (4, S, 40):
        x = torch.randn(B, H, length, D)
        for got, want in zip(traced(x, x), net(x, x), strict=True):
            same(got, want)
