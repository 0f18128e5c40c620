"""Mistakes that users make, and what the message tells them to do."""

import subprocess
import sys
from pathlib import Path

import fused_rope
import pytest
import torch
from oracle import angles


def wide(table):
    return torch.cat([table, table], -1)


def mistakes():
    """An id, words of the message, and the call that raises it."""
    q, k = torch.randn(2, 8, 100, 64), torch.randn(2, 2, 100, 64)  # [B, H, S, D]
    c, s = angles(128, 32)
    row = torch.arange(100)
    token = c[None, :100].expand(2, 100, 32), s[None, :100].expand(2, 100, 32)
    per_head = torch.randn(2, 100, 8, 32)
    packed, lengths = torch.randn(100, 8, 64), torch.tensor([30, 70])
    bhsd, bshd = 'did you mean layout="bhsd"?', 'did you mean layout="bshd"?'
    rope = fused_rope.RotaryEmbedding(64, layout="bhsd", max_seq_len=50)

    def rotate(*args, **options):
        return lambda: fused_rope.rotate(*args, **options)

    def rotate_qk(*args, **options):
        return lambda: fused_rope.rotate_qk(*args, **options)

    yield "full width", "table_layout", rotate(q, wide(c), wide(s), layout="bhsd")
    yield "full width per token", "table_layout", rotate(q, *map(wide, token), layout="bhsd")

    yield "layout of q and k", bhsd, rotate_qk(q, k, c, s)
    yield "layout of per-token tables", bhsd, rotate(q, *token)
    yield "layout of per-head tables", bhsd, rotate(q, per_head, per_head)
    yield "layout of positions", bhsd, rotate(q, c, s, positions=row)
    yield "layout of positions per sequence", bhsd, rotate(q, c, s, positions=row.expand(2, 100))
    x = q.transpose(1, 2)
    yield "layout bhsd of bshd", bshd, rotate(x, *token, layout="bhsd")
    yield "layout bhsd of q and k", bshd, rotate_qk(x, k.transpose(1, 2), c, s, layout="bhsd")

    for name, dtype in ("int32", torch.int32), ("int64", torch.int64):
        cu = lengths.to(dtype)
        words = r"cu_seqlens .*got \[30, 70\]; if these are the lengths .*lengths.cumsum"
        yield (
            f"cu_seqlens of lengths, {name}",
            words,
            rotate(packed, c, s, layout="thd", cu_seqlens=cu),
        )
    late = torch.tensor([1, 30, 100])
    yield "cu_seqlens from 1", "start at 0", rotate(packed, c, s, layout="thd", cu_seqlens=late)
    down = torch.tensor([0, 70, 30])
    yield "cu_seqlens down", "do not descend", rotate(packed, c, s, layout="thd", cu_seqlens=down)
    many = torch.arange(100, 0, -1)
    yield "many lengths", r"93\] and more", rotate(packed, c, s, layout="thd", cu_seqlens=many)

    words = r"max_seq_len=50 rows: call reserve\(51\) or more, or pass max_seq_len"
    yield "position beyond a module", words, lambda: rope(q, k, positions=row.clamp(max=50))
    offsets = torch.tensor([0, 10])
    yield "offset beyond a module", r"reserve\(51\)", lambda: rope(q[:, :, :51], offset=offsets)

    words = r"expected inv_freq to be a tensor .*got 64: pass fused_rope.inv_freq\(head_dim, base\)"
    yield "head_dim for inv_freq", words, lambda: fused_rope.cos_sin_table(64, 4096)
    yield "odd head_dim", "even", lambda: fused_rope.inv_freq(63)
    words = "got the str 'gpt2': load it first, by AutoConfig.*"
    yield "name for a config", words, lambda: fused_rope.RotaryEmbedding.from_config("gpt2")


MISTAKES = list(mistakes())


@pytest.mark.parametrize(("words", "call"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_mistake(words, call):
    expected = words if "\\" in words or "*" in words else words.replace("?", r"\?")
    with pytest.raises((ValueError, TypeError, IndexError), match=expected) as error:
        call()
    assert "\n" not in str(error.value)


def test_no_advice_that_does_not_help():
    q, k, (c, s) = torch.randn(2, 8, 100, 64), torch.randn(2, 8, 99, 64), angles(128, 32)
    rope = fused_rope.RotaryEmbedding(64, max_seq_len=50)
    with pytest.raises(ValueError) as error:
        fused_rope.rotate_qk(q, k[:, :7], c, s)
    assert "did you mean" not in str(error.value)
    with pytest.raises(IndexError) as error:
        rope(q[:, :1], positions=torch.tensor([-4]))
    assert "reserve" not in str(error.value)


def test_inv_freq():
    want = 500000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    got = fused_rope.inv_freq(64, 500000.0)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)
    rope = fused_rope.RotaryEmbedding(64, base=500000.0, max_seq_len=4096)
    assert all(map(torch.equal, fused_rope.cos_sin_table(got, 4096), (rope.cos, rope.sin)))


def test_dtensors_find_their_rules():
    """The sharding rules are registered when the first DTensor is seen."""
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    code = """
import sys
import torch, fused_rope
from torch import distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
assert "fused_rope.distributed" not in sys.modules
x, rope = torch.randn(2, 8, 4, 64), fused_rope.RotaryEmbedding(64)
y = rope(distribute_tensor(x, mesh, [Shard(1)]))
assert y.placements == (Shard(1),) and torch.equal(y.to_local(), rope(x))
dist.destroy_process_group()
"""
    path = f"import sys; sys.path.insert(0, {str(Path(fused_rope.__file__).parents[1])!r})\n"
    run = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# --- Hugging Face -------------------------------------------------------------------------------


@pytest.fixture
def llama():
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
    return transformers.LlamaModel(transformers.LlamaConfig(vocab_size=32, **sizes))


@pytest.mark.parametrize("name", ["patch", "unpatch", "is_patched", "patched"])
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("name", "got the str 'gpt2': load it first"),
        ("config", "got the config LlamaConfig: make the model"),
        ("class", "got the class LlamaModel: pass an instance"),
        ("object", "got an object of type dict: pass the torch.nn.Module"),
    ],
)
def test_not_a_model(name, what, words, llama):
    from fused_rope.compat import transformers

    given = {"name": "gpt2", "config": llama.config, "class": type(llama), "object": {}}[what]
    with pytest.raises(TypeError, match=f"patch(ed)?: expected a model of transformers .*{words}"):
        result = getattr(transformers, name)(given)
        result.__enter__()


def test_patched(llama):
    from fused_rope.compat.transformers import is_patched, patched

    assert not is_patched(llama) and not is_patched()
    with pytest.raises(KeyError), patched(llama, precision="fp32") as report:
        assert is_patched(llama) and is_patched() and list(report.patched.values()) == ["half"]
        assert is_patched(type(llama)(llama.config)), "the whole family is patched"
        with patched(llama, precision="fp32"):
            pass
        assert is_patched(llama)
        raise KeyError
    assert not is_patched(llama)


def test_patch_declines_devices_without_kernels(llama, monkeypatch):
    from fused_rope.compat._patching import replacements
    from fused_rope.compat.transformers import is_patched, patched

    monkeypatch.setattr(replacements, "has_kernels", lambda device: device != "CPU")
    with patched(llama) as report:
        assert not report.patched and not is_patched(llama)
        (reason,) = report.left_alone.values()
        assert "no kernels for cpu" in reason and "fallback=True" in reason
        assert f"apply_rotary_pos_emb: {reason}" in str(report)
    with patched(llama, fallback=True) as report:
        assert report.patched and is_patched(llama)
    assert not is_patched(llama)


@pytest.mark.parametrize("installed", ["0.20.1", None])
def test_kernels_that_transformers_refuses(installed, llama, monkeypatch):
    from fused_rope.compat.transformers import kernel_layers

    refused = pytest.importorskip("transformers.utils.import_utils")
    monkeypatch.setattr(refused, "is_kernels_available", lambda: False)
    monkeypatch.setattr(kernel_layers, "_MARK", "no such mark")  # functions that have no mark
    version = kernel_layers.metadata.version

    def of(name):
        if name == "kernels" and installed is None:
            raise kernel_layers.metadata.PackageNotFoundError
        return installed if name == "kernels" else version(name)

    monkeypatch.setattr(kernel_layers.metadata, "version", of)
    got = f"got kernels {installed}" if installed else "none is installed"
    with pytest.raises(ValueError, match=f"expects kernels>=.*{got}: pip install .* use patch"):
        kernel_layers.kernel_config(llama)
