"""Shards rotate where they are: two processes against one, forward and backward.

The processes are started once for each backend; they run every check and write down what failed.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fused_rope
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

if not dist.is_available():
    pytest.skip("torch is built without torch.distributed", allow_module_level=True)

from fused_rope import functional
from fused_rope.distributed import contiguous_positions, zigzag_positions
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

WORLD = 2
B, S, HQ, HK, D, M = 2, 12, 4, 2, 16, 64
CHECKS: dict[str, Callable[[DeviceMesh], None]] = {}


def check(function: Callable[[DeviceMesh], None]) -> Callable[[DeviceMesh], None]:
    CHECKS[function.__name__] = function
    return function


def work(rank: int, backend: str, folder: Path) -> None:
    """What each process does: all checks, in the same order."""
    device = "cpu"
    if backend == "nccl":
        device = "cuda"
        torch.cuda.set_device(rank)
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    mesh = init_device_mesh(device, (WORLD,))
    failures = {}
    for name, function in CHECKS.items():
        torch.manual_seed(0)
        try:
            function(mesh)
        except Exception:
            failures[name] = traceback.format_exc()
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(failures))
    dist.barrier()
    # A thread of torch's that still runs while the interpreter is taken down aborts the process.
    os._exit(0)


def two_gpus() -> bool:
    return dist.is_nccl_available() and torch.cuda.device_count() >= WORLD


@pytest.fixture(scope="module", params=["gloo", "nccl"] if two_gpus() else ["gloo"])
def failures(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp(request.param)
    mp.spawn(work, args=(request.param, folder), nprocs=WORLD)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(WORLD)]


def tables(device: str, *shape: int) -> tuple[Tensor, Tensor]:
    angles = torch.randn(*shape, D // 2, device=device)
    return angles.cos(), angles.sin()


def expect_same(got: Tensor, expected: Tensor) -> None:
    assert isinstance(got, DTensor)
    torch.testing.assert_close(got.full_tensor(), expected, rtol=0, atol=0)


def expect_local(mesh: DeviceMesh, q_placements, k_placements, cos, sin, **options) -> None:
    """Equal bits, forward and backward, the placements kept, and not one collective."""
    device = mesh.device_type
    q = torch.randn(B, S, HQ, D, device=device, requires_grad=True)
    k = torch.randn(B, S, HK, D, device=device, requires_grad=True)
    weights = torch.randn_like(q), torch.randn_like(k)
    whole = [table.full_tensor() if isinstance(table, DTensor) else table for table in (cos, sin)]
    expected = fused_rope.rotate_qk(q, k, *whole, **{n: full(v) for n, v in options.items()})
    expected_gradients = torch.autograd.grad(expected, (q, k), weights)

    placements = (q_placements, k_placements)
    inputs = [
        distribute_tensor(x.detach(), mesh, p).requires_grad_()
        for x, p in zip((q, k), placements, strict=True)
    ]
    incoming = [distribute_tensor(w, mesh, p) for w, p in zip(weights, placements, strict=True)]
    with CommDebugMode() as communication:
        got = fused_rope.rotate_qk(*inputs, cos, sin, **options)
        gradients = torch.autograd.grad(got, inputs, incoming)
        alone = fused_rope.rotate(inputs[0], cos, sin, **options)
    assert communication.get_total_counts() == 0
    for outputs in (got, gradients):
        assert [list(x.placements) for x in outputs] == [list(p) for p in placements]
    for x, y in zip((*got, *gradients), (*expected, *expected_gradients), strict=True):
        expect_same(x, y)
    expect_same(alone, expected[0])


def full(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


@check
def batch_and_heads(mesh: DeviceMesh) -> None:
    device = mesh.device_type
    cos, sin = tables(device, M)
    positions = torch.randint(-1, M, (B, S), device=device)
    lengths = torch.randint(0, M - S, (B,), device=device)
    for options in ({}, {"offset": 9}, {"positions": positions}, {"offset": lengths}):
        expect_local(mesh, [Shard(0)], [Shard(0)], cos, sin, **options)
        expect_local(mesh, [Shard(2)], [Shard(2)], cos, sin, **options)
        expect_local(mesh, [Shard(2)], [Replicate()], cos, sin, **options)
        expect_local(mesh, [Replicate()], [Replicate()], cos, sin, **options)
    sharded = {
        "positions": distribute_tensor(positions, mesh, [Shard(0)]),
        "offset": distribute_tensor(lengths - S, mesh, [Shard(0)]),
    }
    low = positions.clamp(min=0) // 4
    sharded["positions"] = distribute_tensor(low + S, mesh, [Shard(0)])
    expect_local(mesh, [Shard(0)], [Shard(0)], cos, sin, **sharded)
    expect_local(mesh, [Shard(0)], [Shard(0)], *tables(device, B, S))
    expect_local(mesh, [Shard(2)], [Shard(2)], *tables(device, 1, S))


@check
def sequence(mesh: DeviceMesh) -> None:
    device = mesh.device_type
    shards = [Shard(1)]
    cos, sin = tables(device, M)
    expect_local(mesh, shards, shards, cos, sin)
    expect_local(mesh, shards, shards, cos, sin, offset=M - S)
    rows = torch.randint(-1, M, (B, S), device=device)
    for positions in (rows[0], rows[:1], rows):
        expect_local(mesh, shards, shards, cos, sin, positions=positions)
        sharded = distribute_tensor(positions, mesh, [Shard(positions.ndim - 1)])
        expect_local(mesh, shards, shards, cos, sin, positions=sharded)
    axes = [j % 3 for j in range(D // 2)]
    positions = torch.randint(0, M, (3, B, S), device=device)
    for p in ([Shard(2)], [Replicate()]):
        sharded = distribute_tensor(positions, mesh, p)
        expect_local(mesh, shards, shards, cos, sin, positions=sharded, axes=axes)
    expect_local(mesh, [Shard(0)], [Shard(0)], cos, sin, positions=positions, axes=axes)


@check
def full_width_tables(mesh: DeviceMesh) -> None:
    for table_layout in ("tiled", "repeated"):
        for shape, dim in ((S,), 0), ((1, S), 1), ((B, S), 1):
            cos, sin = (torch.cat([t, t], -1) for t in tables(mesh.device_type, *shape))
            options = {"table_layout": table_layout}
            expect_local(mesh, [Shard(0)], [Shard(0)], cos, sin, **options)
            expect_local(mesh, [Shard(2)], [Shard(2)], cos, sin, **options)
            cos, sin = (distribute_tensor(t, mesh, [Shard(dim)]) for t in (cos, sin))
            expect_local(mesh, [Shard(1)], [Shard(1)], cos, sin, **options)


@check
def tables_along_the_sequence(mesh: DeviceMesh) -> None:
    device = mesh.device_type
    for shape, dim in ((S,), 0), ((1, S), 1), ((B, S), 1):
        cos, sin = (distribute_tensor(t, mesh, [Shard(dim)]) for t in tables(device, *shape))
        expect_local(mesh, [Shard(1)], [Shard(1)], cos, sin)
    x = torch.randn(B, S, HQ, D, device=device)
    cos, sin = tables(device, B, S, HQ)
    for dim in range(3):
        shards = distribute_tensor(x, mesh, [Shard(dim)])
        with CommDebugMode() as communication:
            got = fused_rope.rotate(shards, cos, sin)
        assert communication.get_total_counts() == 0
        assert list(got.placements) == [Shard(dim)]
        expect_same(got, fused_rope.rotate(x, cos, sin))


@check
def frequencies_that_follow_the_length(mesh: DeviceMesh) -> None:
    device = mesh.device_type
    factors = {"short_factor": [1.0] * (D // 2), "long_factor": [4.0] * (D // 2), "factor": 4.0}
    trained = {"original_max_position_embeddings": 8}
    x = torch.randn(B, S, HQ, D, device=device)
    positions = torch.arange(S, device=device).expand(B, S) * 4
    lengths = torch.tensor([3, 30], device=device)
    for scaling in (
        {"rope_type": "dynamic", "factor": 4.0, **trained},
        {"rope_type": "longrope", **factors, **trained},
    ):
        rope = fused_rope.RotaryEmbedding(D, scaling=scaling, device=device)
        for name, index in (("positions", positions), ("offset", lengths)):
            expected = rope(x, **{name: index})
            for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
                sharded = distribute_tensor(x, mesh, [placement])
                for of_index in (Shard(0), Replicate()):
                    given = {name: distribute_tensor(index, mesh, [of_index])}
                    expect_same(rope(sharded, **given), expected)


@check
def every_layout(mesh: DeviceMesh) -> None:
    device = mesh.device_type
    cos, sin = tables(device, M)
    for layout in ("bshd", "bhsd", "sbhd", "thd"):
        x = torch.randn(*({"b": B, "s": S, "t": S, "h": HQ, "d": D}[c] for c in layout))
        x = x.to(device)
        expected = fused_rope.rotate(x, cos, sin, layout=layout, offset=3)
        for dim in range(x.ndim - 1):
            shards = distribute_tensor(x, mesh, [Shard(dim)])
            with CommDebugMode() as communication:
                got = fused_rope.rotate(shards, cos, sin, layout=layout, offset=3)
            assert communication.get_total_counts() == 0
            assert list(got.placements) == [Shard(dim)]
            expect_same(got, expected)


@check
def uneven_shards(mesh: DeviceMesh) -> None:
    cos, sin = tables(mesh.device_type, M)
    x = torch.randn(3, 7, 5, D, device=mesh.device_type)
    for dim in range(3):
        got = fused_rope.rotate(distribute_tensor(x, mesh, [Shard(dim)]), cos, sin, offset=2)
        assert list(got.placements) == [Shard(dim)]
        expect_same(got, fused_rope.rotate(x, cos, sin, offset=2))


@check
def two_mesh_dimensions(mesh: DeviceMesh) -> None:
    cos, sin = tables(mesh.device_type, M)
    for shape in ((1, WORLD), (WORLD, 1)):
        both = init_device_mesh(mesh.device_type, shape, mesh_dim_names=("data", "heads"))
        expect_local(both, [Shard(0), Shard(2)], [Shard(0), Shard(2)], cos, sin)
        expect_local(both, [Shard(1), Shard(2)], [Shard(1), Shard(2)], cos, sin, offset=5)


@check
def partial_sums_stay_partial(mesh: DeviceMesh) -> None:
    cos, sin = tables(mesh.device_type, M)
    q, k = (torch.randn(B, S, H, D, device=mesh.device_type) for H in (HQ, HK))
    parts = DTensor.from_local(k, mesh, [Partial()])
    shards = distribute_tensor(q, mesh, [Shard(2)])
    with CommDebugMode() as communication:
        got_q, got_k = fused_rope.rotate_qk(shards, parts, cos, sin)
    assert list(got_k.placements) == [Partial()]
    assert communication.get_total_counts() == 0
    expect_same(got_q, fused_rope.rotate(q, cos, sin))
    torch.testing.assert_close(
        got_k.full_tensor(), fused_rope.rotate(parts.full_tensor(), cos, sin)
    )


@check
def what_spans_shards_is_gathered(mesh: DeviceMesh) -> None:
    device = mesh.device_type
    cos, sin = tables(device, M)
    x = torch.randn(B, S, HQ, D, device=device)
    got = fused_rope.rotate(distribute_tensor(x, mesh, [Shard(3)]), cos, sin)
    expect_same(got, fused_rope.rotate(x, cos, sin))
    lengths = torch.tensor([4, 30], device=device)
    got = fused_rope.rotate(distribute_tensor(x, mesh, [Shard(1)]), cos, sin, offset=lengths)
    expect_same(got, fused_rope.rotate(x, cos, sin, offset=lengths))
    packed, starts = x[0], torch.tensor([0, 5, S], device=device)
    got = fused_rope.rotate(
        distribute_tensor(packed, mesh, [Shard(0)]), cos, sin, layout="thd", cu_seqlens=starts
    )
    expect_same(got, fused_rope.rotate(packed, cos, sin, layout="thd", cu_seqlens=starts))


@check
def in_place(mesh: DeviceMesh) -> None:
    cos, sin = tables(mesh.device_type, M)
    q, k = (torch.randn(B, S, H, D, device=mesh.device_type) for H in (HQ, HK))
    expected = fused_rope.rotate_qk(q, k, cos, sin, offset=4)
    for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
        x, y = (distribute_tensor(t.clone(), mesh, [placement]) for t in (q, k))
        assert fused_rope.rotate_qk_(x, y, cos, sin, offset=4)[0] is x
        expect_same(x, expected[0])
        expect_same(y, expected[1])
        leaf = distribute_tensor(q, mesh, [placement]).requires_grad_()
        doubled = leaf * 2
        fused_rope.rotate_(doubled, cos, sin)
        doubled.backward(distribute_tensor(q, mesh, [placement]))
        expect_same(leaf.grad, fused_rope.rotate(q, cos, sin, inverse=True) * 2)
    x, y = (distribute_tensor(t.clone(), mesh, [Shard(2)]) for t in (q, k))
    before = y.full_tensor()
    with pytest.raises(RuntimeError, match="in-place"):
        fused_rope.rotate_(distribute_tensor(q.clone(), mesh, [Shard(3)]), cos, sin)
    with pytest.raises(RuntimeError, match="same placements"):
        fused_rope.rotate_qk_(distribute_tensor(q.clone(), mesh, [Shard(0)]), y, cos, sin)
    expect_same(y, before)


def expect_local_norm(mesh: DeviceMesh, placements, cos, sin, **options) -> None:
    """Equal bits and no collective; the gradients of the weights are partial sums."""
    device = mesh.device_type
    q, k = (torch.randn(B, S, H, D, device=device) for H in (HQ, HK))
    weights = [torch.randn(D, device=device) for _ in range(2)]
    grads = [torch.randn_like(x) for x in (q, k)]
    leaves = [x.clone().requires_grad_() for x in (q, k, *weights)]
    function = fused_rope.norm_rotate_qk
    options["eps"] = 1e-6
    expected = function(*leaves[:2], cos, sin, *leaves[2:], **options)
    expected_grads = torch.autograd.grad(expected, leaves, grads)

    shards = [distribute_tensor(x, mesh, placements).requires_grad_() for x in (q, k)]
    replicas = [distribute_tensor(w, mesh, [Replicate()]).requires_grad_() for w in weights]
    incoming = [distribute_tensor(g, mesh, placements) for g in grads]
    with CommDebugMode() as communication:
        got = function(*shards, cos, sin, *replicas, **options)
        got_grads = torch.autograd.grad(got, [*shards, *replicas], incoming)
    assert communication.get_total_counts() == 0
    for x, y in zip((*got, *got_grads[:2]), (*expected, *expected_grads[:2]), strict=True):
        assert list(x.placements) == placements
        expect_same(x, y)
    partial = [Replicate() if p == Replicate() else Partial() for p in placements]
    for x, y in zip(got_grads[2:], expected_grads[2:], strict=True):
        assert list(x.placements) == partial
        torch.testing.assert_close(x.full_tensor(), y)


@check
def caches(mesh: DeviceMesh) -> None:
    """Heads where they are, or whole tensors; nothing that is written can move."""
    device = mesh.device_type
    cos, sin = tables(device, M)
    q, k, v = (torch.randn(B, S, H, D, device=device) for H in (HQ, HK, HK))
    slots = torch.randperm(B * S, device=device).view(B, S)
    for dtype in (torch.float32, torch.float8_e4m3fn):
        scales = {}
        if dtype != torch.float32:
            scales = {n: torch.rand(HK, device=device) + 0.01 for n in ("k_scale", "v_scale")}
        whole = [torch.zeros(4, 8, HK, D, device=device).to(dtype) for _ in range(2)]
        expected = fused_rope.rotate_and_cache(q, k, v, cos, sin, *whole, slots, eps=1e-6, **scales)
        for placements in ([Shard(2)], [Replicate()]):
            xs = [distribute_tensor(x, mesh, placements) for x in (q, k, v)]
            zeros = [torch.zeros(4, 8, HK, D, device=device).to(dtype) for _ in range(2)]
            parts = [
                DTensor.from_local(z.chunk(WORLD, 2)[0].clone(), mesh, placements) for z in zeros
            ]
            if placements == [Replicate()]:
                parts = [DTensor.from_local(z, mesh, placements) for z in zeros]
            with CommDebugMode() as communication:
                got = fused_rope.rotate_and_cache(*xs, cos, sin, *parts, slots, eps=1e-6, **scales)
            assert communication.get_total_counts() == 0
            assert list(got.placements) == placements
            expect_same(got, expected)
            for part, cache in zip(parts, whole, strict=True):
                mine = cache.chunk(WORLD, 2)[mesh.get_rank()] if placements == [Shard(2)] else cache
                assert torch.equal(
                    part.to_local().view(torch.uint8), mine.contiguous().view(torch.uint8)
                )
    q = distribute_tensor(q, mesh, [Shard(2)])
    k, v = (distribute_tensor(x, mesh, [Replicate()]) for x in (k, v))
    with pytest.raises(RuntimeError, match="all sharded along their heads"):
        whole = [torch.zeros(32, HK, D, device=device) for _ in range(2)]
        fused_rope.rotate_and_cache(q, k, v, cos, sin, *whole, slots)


@check
def norms(mesh: DeviceMesh) -> None:
    device = mesh.device_type
    cos, sin = tables(device, M)
    positions = torch.randint(-1, M, (B, S), device=device)
    for dim in range(3):
        expect_local_norm(mesh, [Shard(dim)], cos, sin, offset=3)
        expect_local_norm(mesh, [Shard(dim)], cos, sin, positions=positions, after=True)
    expect_local_norm(mesh, [Replicate()], cos, sin)
    q, k = (torch.randn(B, S, H, D, device=device) for H in (HQ, HK))
    weight = torch.randn(D, device=device)
    expected = fused_rope.norm_rotate_qk(q, k, cos, sin, weight, eps=1e-6)
    x, y = (distribute_tensor(t.clone(), mesh, [Shard(2)]) for t in (q, k))
    for got, want in zip(
        fused_rope.norm_rotate_qk_(x, y, cos, sin, weight, eps=1e-6), expected, strict=True
    ):
        expect_same(got, want)
    parts = DTensor.from_local(q, mesh, [Partial()])  # a norm is not linear
    got = fused_rope.norm_rotate(parts, cos, sin, weight, eps=1e-6)
    expect_same(got, fused_rope.norm_rotate(q * WORLD, cos, sin, weight, eps=1e-6))
    own = weight.clone().requires_grad_()  # a plain tensor
    got = fused_rope.norm_rotate(distribute_tensor(q, mesh, [Shard(2)]), cos, sin, own, eps=1e-6)
    got.sum().backward()
    alone = weight.clone().requires_grad_()
    fused_rope.norm_rotate(q, cos, sin, alone, eps=1e-6).sum().backward()
    torch.testing.assert_close(own.grad, alone.grad)


@check
def refusals(mesh: DeviceMesh) -> None:
    cos, sin = tables(mesh.device_type, M)
    q = torch.randn(B, S, HQ, D, device=mesh.device_type)
    x = distribute_tensor(q, mesh, [Shard(1)])
    with pytest.raises(ValueError, match="rows"):
        fused_rope.rotate(x, cos, sin, offset=M)
    with pytest.raises(ValueError, match="rows"):
        fused_rope.rotate(x, cos[: S - 1], sin[: S - 1])
    with pytest.raises(RuntimeError, match="mixed"):
        fused_rope.rotate_qk(x, q, cos, sin)
    with pytest.raises(NotImplementedError):
        fused_rope.rotate(x, cos, sin, out=distribute_tensor(q, mesh, [Shard(1)]))


@contextmanager
def names_of_calls() -> Iterator[list[str]]:
    """The operators that are called."""
    names, call = [], functional.call

    def recorded(name, *arguments):
        names.append(name)
        return call(name, *arguments)

    functional.call = recorded
    try:
        yield names
    finally:
        functional.call = call


def fully_sharded_model(mesh: DeviceMesh) -> None:
    """FSDP gathers the weights of norms where the layer's hook runs; ours reads them there."""
    from fused_rope.compat.transformers import patch, unpatch
    from transformers_models import causal

    model = causal("qwen3", "Qwen3").build(device=mesh.device_type).train()
    reference = copy.deepcopy(model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ids = torch.arange(3, 41, device=mesh.device_type).reshape(2, 19)
    want = reference(input_ids=ids).logits
    want.sin().mean().backward()
    patch(model, norms="fused")
    try:
        with names_of_calls() as names:
            got = model(input_ids=ids).logits
            got.sin().mean().backward()
    finally:
        unpatch(model)
    assert names == ["norm_rotate_qk"] * 2
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert isinstance(p, DTensor) and q.grad.any(), name
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-3, atol=1e-6)


def distributed_norms(mesh: DeviceMesh) -> None:
    """Norms whose weights are DTensors run as modules."""
    from fused_rope.compat.transformers import patch, unpatch
    from transformers import AttentionInterface
    from transformers_models import causal

    device, seen = mesh.device_type, []

    def attend(module, q, k, v, *args, **kwargs):
        seen.append((q, k))
        return v.transpose(1, 2), None

    AttentionInterface().register("seen", attend)
    module = causal("qwen3", "Qwen3", num_key_value_heads=4).build(device=device)
    module = module.model.layers[0].self_attn
    module.config._attn_implementation = "seen"
    x, angle = torch.randn(2, 8, 64, device=device), torch.randn(1, 8, 8, device=device)
    tables = [t.repeat(1, 1, 2) for t in (angle.cos(), angle.sin())]
    module(x, tuple(tables), None)
    distribute_module(module, mesh)
    whole = [distribute_tensor(t, mesh, [Replicate()]) for t in (x, *tables)]
    patch(module, norms="fused")
    try:
        with names_of_calls() as names:
            module(whole[0], tuple(whole[1:]), None)
    finally:
        unpatch(module)
    assert not any(name.startswith("norm") for name in names)
    for got, want in zip(seen[1], seen[0], strict=True):
        torch.testing.assert_close(got.full_tensor(), want)


if importlib.util.find_spec("transformers"):
    check(fully_sharded_model)
    check(distributed_norms)


class Attention(nn.Module):
    """Llama's, with grouped queries; each process attends with the heads or tokens it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, H * D, bias=False) for H in (HQ, HK, HK))
        self.o = nn.Linear(HQ * D, 32, bias=False)
        self.rope = fused_rope.RotaryEmbedding(D, max_seq_len=4)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, D)) for proj in (self.q, self.k, self.v))
        if positions is not None:
            self.rope.reserve(S)
        q, k = self.rope(q, k, positions=positions)
        if positions is None:
            positions = torch.arange(S, device=x.device)
        return self.o(attend(q, k, v, positions).flatten(2))


def attend(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    if not isinstance(q, DTensor):
        mask = positions[:, None] >= positions
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)
    mesh, placements = q.device_mesh, q.placements
    q_rows = k_rows = full(positions)
    if placements == (Shard(1),):  # these tokens' queries meet all tokens' keys
        k, v = (t.redistribute(placements=[Replicate()]) for t in (k, v))
        q_rows = k_rows.chunk(WORLD)[dist.get_rank()]
    gradients = [Partial()] if placements == (Shard(1),) else k.placements
    q = q.to_local().transpose(1, 2)
    k, v = (t.to_local(grad_placements=gradients).transpose(1, 2) for t in (k, v))
    mask = q_rows[:, None] >= k_rows
    out = scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    return DTensor.from_local(out.transpose(1, 2), mesh, placements, run_check=False)


def expect_same_block(parallel: Attention, single: Attention, x: Tensor, got: Tensor) -> None:
    """got, and the gradients of x and of all weights, against the block in one process."""
    alone = x.detach().clone().requires_grad_()
    expected = single(alone)
    expected.sin().sum().backward()
    full(got).sin().sum().backward()
    torch.testing.assert_close(full(got), expected)
    torch.testing.assert_close(full(x.grad), alone.grad)
    for a, b in zip(parallel.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(full(a.grad), b.grad)


def two_blocks(mesh: DeviceMesh) -> tuple[Attention, Attention, Tensor]:
    single, parallel = Attention(), Attention()
    parallel.load_state_dict(single.state_dict())
    x = torch.randn(B, S, 32, device=mesh.device_type, requires_grad=True)
    return parallel.to(mesh.device_type), single.to(mesh.device_type), x


@check
def tensor_parallel_attention(mesh: DeviceMesh) -> None:
    parallel, single, x = two_blocks(mesh)
    columns = ColwiseParallel(use_local_output=False)
    plan = {"q": columns, "k": columns, "v": columns, "o": RowwiseParallel()}
    parallelize_module(parallel, mesh, plan)
    expect_same_block(parallel, single, x, parallel(x))


@check
def sequence_parallel_attention(mesh: DeviceMesh) -> None:
    parallel, single, x = two_blocks(mesh)
    for name, parameter in list(parallel.named_parameters()):
        module = parallel.get_submodule(name.rpartition(".")[0])
        module.weight = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Replicate()]))
    shards = distribute_tensor(x.detach(), mesh, [Shard(1)]).requires_grad_()
    for positions in (None, torch.arange(S, device=x.device)):
        parallel.zero_grad()
        single.zero_grad()
        shards.grad = None
        got = parallel(shards, positions)
        assert got.placements == (Shard(1),)
        alone = x.detach().clone().requires_grad_()
        single(alone).sin().sum().backward()
        got.sin().sum().backward()
        torch.testing.assert_close(full(got), single(alone))
        torch.testing.assert_close(full(shards.grad), alone.grad)
        for a, b in zip(parallel.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(full(a.grad), b.grad)


@check
def context_parallel_attention(mesh: DeviceMesh) -> None:
    """Plain tensors: each process rotates its tokens, and its queries meet all tokens' keys."""
    _, block, x = two_blocks(mesh)
    block.rope.reserve(S)
    q, k, v = (proj(x).unflatten(-1, (-1, D)) for proj in (block.q, block.k, block.v))
    expected = attend(*block.rope(q, k), v, torch.arange(S, device=x.device))
    rank = dist.get_rank()
    for positions_of in (contiguous_positions, zigzag_positions):
        mine = positions_of(S, rank, WORLD, device=x.device)
        my_q, my_k = block.rope(q[:, mine], k[:, mine], positions=mine)
        gathered = [torch.empty_like(my_k) for _ in range(WORLD)]
        dist.all_gather(gathered, my_k.detach().contiguous())
        order = torch.cat([positions_of(S, r, WORLD, device=x.device) for r in range(WORLD)])
        mask = mine[:, None] >= order
        keys, values = torch.cat(gathered, 1), v[:, order]
        my_q, keys, values = (t.transpose(1, 2) for t in (my_q, keys, values))
        got = scaled_dot_product_attention(my_q, keys, values, mask, enable_gqa=True)
        torch.testing.assert_close(got.transpose(1, 2), expected[:, mine])


@check
def compiled(mesh: DeviceMesh) -> None:
    cos, sin = tables(mesh.device_type, M)
    q, k = (torch.randn(B, S, H, D, device=mesh.device_type) for H in (HQ, HK))
    rotate_qk = torch.compile(fused_rope.rotate_qk, fullgraph=True, backend="aot_eager")
    expected = fused_rope.rotate_qk(q, k, cos, sin, offset=3)
    for placement in (Shard(1), Shard(2)):
        x, y = (distribute_tensor(t, mesh, [placement]).requires_grad_() for t in (q, k))
        got = rotate_qk(x, y, cos, sin, offset=3)
        incoming = [distribute_tensor(t, mesh, [placement]) for t in (q, k)]
        gradients = torch.autograd.grad(got, (x, y), incoming)
        back = fused_rope.rotate_qk(q, k, cos, sin, offset=3, inverse=True)
        for a, b in zip((*got, *gradients), (*expected, *back), strict=True):
            expect_same(a, b)


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(failures: list[dict[str, str]], name: str) -> None:
    old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
    if old and name == "sequence_parallel_attention":
        pytest.skip("DTensor of torch 2.11 refuses nn.Linear on a sharded sequence")
    found = [f"process {rank}: {each[name]}" for rank, each in enumerate(failures) if name in each]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("positions_of", [contiguous_positions, zigzag_positions])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_positions_are_a_partition(positions_of, size: int) -> None:
    parts = [positions_of(24, rank, size) for rank in range(size)]
    assert all(part.dtype == torch.int64 and part.shape == (24 // size,) for part in parts)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(24))
    if positions_of is zigzag_positions:  # as many causal pairs everywhere
        assert len({int((part + 1).sum()) for part in parts}) == 1


def test_positions_that_are_refused() -> None:
    for arguments in ((9, 0, 2), (-2, 0, 2), (8, 2, 2), (8, -1, 2), (8, 0, 0)):
        with pytest.raises(ValueError, match="contiguous_positions: expected"):
            contiguous_positions(*arguments)
    with pytest.raises(ValueError, match="multiple of 4"):
        zigzag_positions(10, 0, 2)
    assert contiguous_positions(0, 0, 2).shape == zigzag_positions(0, 1, 2).shape == (0,)


def test_plain_tensors_pass_through() -> None:
    x, (cos, sin) = torch.randn(B, S, HQ, D), tables("cpu", M)
    assert type(fused_rope.rotate(x, cos, sin)) is Tensor
