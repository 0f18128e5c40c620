"""torchtune's modules: text with each of its pairings and roundings, and the 2-D one of vision."""

import copy
import inspect
import pickle

import pytest
import torch
from formula import close, compiles, gradients, rotate_reference, series
from fused_rope.compat.torchtune import (
    Llama3ScaledRoPE,
    Phi3RotaryPositionalEmbeddings,
    Qwen2RotaryPositionalEmbeddings,
    RotaryPositionalEmbeddings,
    VisionRotaryPositionalEmbeddings,
)
from oracle import DTYPES, bits, same
from torch._subclasses.fake_tensor import FakeTensorMode

B, S, H, D, M = 2, 7, 4, 32, 64


def llama3(base):
    """The frequencies of Llama 3.1, by wavelength: 8 times longer, as they were, or between."""
    scaled = []
    for f in series(D, base).tolist():
        share = min(max((8192 * f / (2 * torch.pi) - 1) / 3, 0), 1)
        scaled.append(share * f + (1 - share) * f / 8)
    return torch.tensor(scaled, dtype=torch.float64)


# Each class with its frequencies, and whether it pairs neighbors.
TEXT = {
    RotaryPositionalEmbeddings: (series(D), True),
    Llama3ScaledRoPE: (llama3(10000.0), True),
    Phi3RotaryPositionalEmbeddings: (series(D), False),
    Qwen2RotaryPositionalEmbeddings: (series(D, 1_000_000.0), False),
}


def written_out(x, position, freq, interleaved, sign=1):
    angle = (position.double().cpu()[..., None, None] * freq).to(x.device)
    return rotate_reference(x, angle.cos(), sign * angle.sin(), interleaved=interleaved)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("module", TEXT)
def test_text(module, dtype, device):
    freq, interleaved = TEXT[module]
    rope = module(D, max_seq_len=M).to(device)
    assert not rope.state_dict()
    x = torch.randn(B, S, H, D, device=device).to(dtype)
    before = x.clone()
    wide = torch.float32 if dtype == torch.float64 else None  # the table is float32
    packed = torch.randint(0, M, (B, S), device=device)
    for position in (None, packed, packed[:1], packed[0].int()):
        y = rope(x, input_pos=position)
        row = torch.arange(S)[None] if position is None else position.view(-1, S)
        close(y, written_out(x, row, freq, interleaved), dtype=wide, ulps=8)
        if module is Qwen2RotaryPositionalEmbeddings:
            kw = dict(positions=position, precision="model")
            same(y, bits(x, rope.rope.cos, rope.rope.sin, **kw))
    same(x, before)


@pytest.mark.parametrize("module", TEXT)
def test_gradients_and_growth(module, device):
    freq, interleaved = TEXT[module]
    rope = module(D, max_seq_len=2).to(device)
    (given,), (got,) = gradients(rope, torch.randn(B, S, H, D, device=device))
    close(got, written_out(given, torch.arange(S)[None], freq, interleaved, -1), ulps=8)


def test_rope_init_after_meta(device):
    """As recipes do it: made on meta, weights loaded, and then rope_init on the device."""
    with torch.device("meta"):
        text = RotaryPositionalEmbeddings(D, M)
        vision = VisionRotaryPositionalEmbeddings(10, 30, D)
    assert text.rope.cos.is_meta
    with torch.device(device):
        for module in (text, vision):
            module.rope_init()
            assert module.rope.cos.device.type == device
    x = torch.randn(B, S, H, D, device=device)
    same(text(x), RotaryPositionalEmbeddings(D, M).to(device)(x))
    x = torch.randn(B, 10, H, D, device=device)
    same(vision(x), VisionRotaryPositionalEmbeddings(10, 30, D).to(device)(x))


@pytest.mark.parametrize("module", TEXT)
def test_cache_can_be_read(module, device):
    """torchtune's buffer of this name: [M, P, 2], after rope_init on the module's new device."""
    with torch.device("meta"):
        rope = module(D, M)
    assert rope.cache.is_meta
    with torch.device(device):
        rope.rope_init()
    freq, _ = TEXT[module]
    angle = torch.arange(M)[:, None] * freq
    want = torch.stack([angle.cos(), angle.sin()], -1)
    assert rope.cache.device.type == device
    torch.testing.assert_close(rope.cache.cpu(), want.float(), rtol=0, atol=2e-7)
    assert not list(rope.buffers()) and not rope.state_dict()


def test_casts_leave_the_table_alone():
    x = torch.randn(B, S, H, D)
    rope = RotaryPositionalEmbeddings(D, M)
    want = rope(x)
    same(rope.bfloat16()(x), want)


@pytest.mark.parametrize("append_cls_token", [True, False])
@pytest.mark.parametrize("tiles", [1, 4])
def test_vision(tiles, append_cls_token, device):
    """Columns rotate the first half of the pairs, rows the second; the class token stays."""
    grid = 3
    rope = VisionRotaryPositionalEmbeddings(10, 39, D, append_cls_token=append_cls_token)
    rope = rope.to(device)
    assert not rope.state_dict() and rope.seq_len == grid**2 + 1
    patch = torch.arange(grid**2)
    column, row = (patch % grid + 1)[:, None], (patch // grid + 1)[:, None]
    angle = torch.cat([column * series(D // 2), row * series(D // 2)], -1)
    still = torch.zeros(1, D // 2, dtype=torch.float64)
    angle = torch.cat([angle, still] if append_cls_token else [still, angle])
    angle = angle.repeat(tiles, 1)[:, None].to(device)
    x = torch.randn(B, tiles * (grid**2 + 1), H, D, device=device)
    y = rope(x, input_pos=None)
    close(y, rotate_reference(x, angle.cos(), angle.sin(), interleaved=True), ulps=8)
    cls_token = slice(grid**2 if append_cls_token else 0, None, grid**2 + 1)
    same(y[:, cls_token], x[:, cls_token])
    (given,), (got,) = gradients(rope, x)
    close(got, rotate_reference(given, angle.cos(), -angle.sin(), interleaved=True), ulps=8)
    older = VisionRotaryPositionalEmbeddings(
        10, 39, D // 2, append_cls_token=append_cls_token, max_num_tiles=tiles
    )
    same(older.to(device)(x), y)


@pytest.mark.parametrize("append_cls_token", [True, False])
def test_vision_after_meta_and_to_empty(append_cls_token, device):
    """Positions are written again where memory is new; no `rope_init` is needed."""
    sizes = dict(patch_size=10, tile_size=30, dim=D, append_cls_token=append_cls_token)
    x = torch.randn(B, 10, H, D, device=device)
    want = VisionRotaryPositionalEmbeddings(**sizes).to(device)(x)
    with torch.device("meta"):
        made = VisionRotaryPositionalEmbeddings(**sizes)
    same(made.to_empty(device=device)(x), want)
    same(made.to_empty(device=device).half()(x), want)


@pytest.mark.parametrize("module", [*TEXT, VisionRotaryPositionalEmbeddings])
def test_made_and_called_in_inference_mode_then_trained(module, device):
    sizes = (10, 30, D) if module is VisionRotaryPositionalEmbeddings else (D,)
    x = torch.randn(B, 10, H, D, device=device)
    with torch.inference_mode():
        rope = module(*sizes).to(device)
        rope(x)
    assert not any(buffer.is_inference() for buffer in rope.buffers())
    (given,), (got,) = gradients(rope, x)
    x.requires_grad_()
    same(got, torch.autograd.grad(module(*sizes).to(device)(x), x, given)[0])


def test_errors():
    rope = RotaryPositionalEmbeddings(D, M)
    with pytest.raises(ValueError, match="D=32"):
        rope(torch.randn(B, S, H, 16))
    with pytest.raises(IndexError, match=str(M)):
        rope(torch.randn(B, S, H, D), input_pos=torch.full((B, S), M))
    with pytest.raises(ValueError):
        VisionRotaryPositionalEmbeddings(10, 30, D)(torch.randn(B, 11, H, D))


def test_compiles():
    x = torch.randn(B, S, H, D)
    compiles(RotaryPositionalEmbeddings(D, M), x, input_pos=torch.arange(S)[None])
    compiles(VisionRotaryPositionalEmbeddings(10, 20, D), torch.randn(B, 10, H, D))


@pytest.mark.parametrize("module", [RotaryPositionalEmbeddings, Llama3ScaledRoPE])
def test_results_are_contiguous(module, device):
    """As the original's, whatever x's strides: its callers may view them."""
    x = torch.randn(B, H, S, D, device=device).transpose(1, 2)
    y = module(D, max_seq_len=M).to(device)(x)
    assert y.is_contiguous()
    same(y, module(D, max_seq_len=M).to(device)(x.contiguous()))


def test_original():
    pytest.importorskip("torchtune", exc_type=ImportError)
    from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE as Llama3
    from torchtune.models.phi3._position_embeddings import Phi3RotaryPositionalEmbeddings as Phi3
    from torchtune.models.qwen2._positional_embeddings import (
        Qwen2RotaryPositionalEmbeddings as Qwen2,
    )
    from torchtune.modules import RotaryPositionalEmbeddings as Plain
    from torchtune.modules import VisionRotaryPositionalEmbeddings as Vision

    for dtype, atol in [(torch.float32, 2e-5), (torch.bfloat16, 2**-6)]:
        x = torch.randn(B, S, H, D, dtype=dtype)
        position = torch.randint(0, M, (B, S))
        for ours, theirs in zip(TEXT, (Plain, Llama3, Phi3, Qwen2), strict=True):
            for input_pos in (None, position):
                got, want = (m(D, M)(x, input_pos=input_pos) for m in (ours, theirs))
                torch.testing.assert_close(got, want, rtol=0, atol=atol)
        x = torch.randn(B, 2 * 10, H, D, dtype=dtype)
        sizes = dict(patch_size=10, tile_size=30, dim=D)
        if "max_num_tiles" in inspect.signature(Vision).parameters:
            sizes.update(max_num_tiles=2, dim=D // 2)
        got, want = (m(**sizes)(x) for m in (VisionRotaryPositionalEmbeddings, Vision))
        torch.testing.assert_close(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize("allowed", [False, True], ids=["strict", "non-fake inputs allowed"])
def test_vision_rotates_after_fake_calls(allowed):
    """A memory estimate under FakeTensorMode, then a real step."""
    x = torch.randn(2, 2 * 10, 4, 32)
    want = VisionRotaryPositionalEmbeddings(10, 30, 32)(x)
    with FakeTensorMode(allow_non_fake_inputs=allowed):
        made = VisionRotaryPositionalEmbeddings(10, 30, 32)
        assert made(torch.empty(2, 20, 4, 32)).shape == want.shape
    same(made(x), want)
    same(copy.deepcopy(made)(x), want)
    same(pickle.loads(pickle.dumps(made))(x), want)
