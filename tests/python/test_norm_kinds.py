"""Every kind of norm of q and k in today's models: its formula in plain PyTorch against ours.

A kind's formula takes x, the weight and eps and rounds where the model's code rounds. `widen` keeps
float64, so that the same formula gives exact gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import fused_rope
import pytest
import torch
from fused_rope.compat._patching import norms
from oracle import angles, same
from torch import Tensor
from torch.nn import functional

B, S, H = 2, 16, 4
FLOAT32_EPS = torch.finfo(torch.float32).eps  # that of torch.nn.RMSNorm(eps=None) up to float32


def widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def scaled(x: Tensor, eps: float) -> Tensor:
    x = widen(x)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def by_power(x: Tensor, eps: float) -> Tensor:
    x = widen(x)
    return x * torch.pow(x.pow(2).mean(-1, keepdim=True) + eps, -0.5)


class Kind(NamedTuple):
    """A model's formula, and the options with which `norm_rotate` computes it."""

    formula: Callable[[Tensor, Any, float], Tensor]
    options: dict[str, Any]
    weights: tuple[str, ...] = ("own",)


BEFORE, AFTER = dict(cast="before"), dict(cast="after")
CENTERED = dict(cast="after", zero_centered=True)
BOTH, NONE = ("own", "float32"), ("none",)
KINDS = {
    # Llama, Qwen3, GLM-4, HunYuan, Lfm2, Dots1, Exaone 4
    "rounded before": Kind(lambda x, w, eps: w * scaled(x, eps).to(x.dtype), BEFORE),
    # diffusers' RMSNorm with a weight of x's dtype
    "promoted": Kind(
        lambda x, w, eps: (
            (x * torch.rsqrt(widen(x).pow(2).mean(-1, keepdim=True) + eps)).to(w.dtype) * w
        ),
        BEFORE,
    ),
    # OLMo 2, Afmoe
    "rounded after": Kind(lambda x, w, eps: (w * scaled(x, eps)).to(x.dtype), AFTER, BOTH),
    # Gemma 3, Qwen3-Next, Qwen3.5, MiniMax M3
    "zero centered": Kind(
        lambda x, w, eps: (scaled(x, eps) * (1.0 + widen(w))).type_as(x), CENTERED, BOTH
    ),
    # Krea 2
    "zero centered, torch": Kind(
        lambda x, w, eps: functional.rms_norm(widen(x), x.shape[-1:], w + 1, eps).to(x.dtype),
        CENTERED,
        ("float32",),
    ),
    # Gemma 3n and 4
    "power": Kind(lambda x, w, eps: (by_power(x, eps) * widen(w)).type_as(x), AFTER, BOTH),
    "power, no weight": Kind(lambda x, w, eps: by_power(x, eps).type_as(x), AFTER, NONE),
    # Llama 4, nanochat, Megatron's L2Norm
    "no weight": Kind(lambda x, w, eps: scaled(x, eps).type_as(x), AFTER, NONE),
    # Flux, torchtitan, timm
    "torch": Kind(lambda x, w, eps: functional.rms_norm(x, x.shape[-1:], w, eps), AFTER, BOTH),
    # modded-nanogpt
    "torch, no weight": Kind(
        lambda x, w, eps: functional.rms_norm(x, x.shape[-1:], None, eps), AFTER, NONE
    ),
}
CASES = [(name, weight) for name, kind in KINDS.items() for weight in kind.weights]
EACH_KIND = pytest.mark.parametrize("name,weighted", CASES, ids=map(", ".join, CASES))


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Hugging Face's rotation in x's dtype; the elements past the table's width are copied."""
    R = 2 * cos.shape[-1]
    cos, sin = (torch.cat([t, t], -1)[:, None].to(x.dtype) for t in (cos, sin))
    x, rest = x[..., :R], x[..., R:]
    halves_swapped = torch.cat([-x[..., R // 2 :], x[..., : R // 2]], -1)
    return torch.cat([x * cos + halves_swapped * sin, rest], -1)


def neighbors(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Flux' and Llama 4's rotation: adjacent elements, in float32, rounded once."""
    a, b = widen(x).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x.dtype)


class Order(NamedTuple):
    """Which rotation it is, of how many of 64 elements, before or after a norm with which eps."""

    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    options: dict[str, Any]
    eps: float
    after: bool = False
    R: int = 64


MODEL, ADJACENT = dict(precision="model"), dict(interleaved=True)
ORDERS = {
    "halves": Order(halves, MODEL, 1e-6),  # Qwen3
    "a quarter rotated": Order(halves, MODEL, 1e-5, R=16),  # Qwen3-Next, GLM-4
    "neighbors": Order(neighbors, ADJACENT, 1e-6),  # Flux
    "norm last": Order(halves, MODEL, 1e-5, after=True),  # HunYuan
    "neighbors, norm last": Order(neighbors, ADJACENT, 1e-5, after=True),  # Llama 4
    "inverse, norm last": Order(  # nanochat
        lambda x, cos, sin: halves(x, cos, -sin), MODEL | dict(inverse=True), FLOAT32_EPS, True
    ),
}
EACH_ORDER = pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])


def composed(kind: Kind, order: Order, x: Tensor, cos: Tensor, sin: Tensor, w: Any):
    """The model's code: its norm and its rotation."""
    if order.after:
        return kind.formula(order.rotate(x, cos, sin), w, order.eps)
    return order.rotate(kind.formula(x, w, order.eps), cos, sin)


def fused(kind: Kind, order: Order, x: Tensor, cos: Tensor, sin: Tensor, w: Any):
    """Ours, of x as q and its first head as k."""
    options = {**kind.options, **order.options, "after": order.after, "eps": order.eps}
    q, k = fused_rope.norm_rotate_qk(x, x[:, :, :1], cos, sin, w, w, **options)
    same(k, q[:, :, :1])
    return q


def weight_of(weighted: str, dtype: torch.dtype, D: int, device: str) -> Tensor | None:
    if weighted == "none":
        return None
    w = torch.randn(D, device=device) / 4 + 1
    return w.to(torch.float32 if weighted == "float32" else dtype)


def draw(dtype: torch.dtype, device: str, tokens: int = S, heads: int = H) -> Tensor:
    """Heads of several magnitudes: eps matters in some, and in some it is all that does."""
    x = torch.randn(B, tokens, heads, 64, device=device)
    sizes = torch.tensor([1, 2**-8, 2**-10, 2**-12], device=device)
    return (x.unflatten(2, (-1, 4)) * sizes[:, None]).flatten(2, 3).to(dtype)


@EACH_KIND
@EACH_ORDER
@EACH_DTYPE
def test_exact_sums(name, weighted, order, dtype, device):
    """Bitwise the model's results where no order of the squares' sum matters."""
    kind = KINDS[name]
    x = torch.randint(-1, 3, (B, S, H, 64), device=device).to(dtype)
    x = x * torch.tensor([1, 2**-2, 2**-5, 2**-8], dtype=dtype, device=device)[:, None]
    w = weight_of(weighted, dtype, 64, device)
    if order.after:  # quarter turns keep sums of squares exact
        turns = torch.randint(0, 4, (S, order.R // 2), device=device)
        cos = torch.tensor([1.0, 0.0, -1.0, 0.0], device=device)[turns]
        sin = torch.tensor([0.0, 1.0, 0.0, -1.0], device=device)[turns]
    else:
        cos, sin = angles(S, order.R // 2, device)
    got = fused(kind, order, x, cos, sin, w)
    # On the CPU: CUDA's rsqrt may be 2 ulp off.
    want = composed(kind, order, x.cpu(), cos.cpu(), sin.cpu(), None if w is None else w.cpu())
    same(got.cpu(), want)


@EACH_KIND
@EACH_DTYPE
@pytest.mark.parametrize("order", ["halves", "neighbors, norm last"])
def test_few_results_differ(name, weighted, order, dtype, device):
    """Another order of the sum moves few roundings, each by one; float32 within the bound of D."""
    kind, order = KINDS[name], ORDERS[order]
    x, w = draw(dtype, device, 256, 16), weight_of(weighted, dtype, 64, device)
    cos, sin = angles(256, order.R // 2, device)
    got = fused(kind, order, x, cos, sin, w)
    want = composed(kind, order, x, cos, sin, w)
    assert got.dtype == want.dtype == dtype
    if dtype != torch.float32:
        share = 1e-4 if dtype == torch.bfloat16 else 1e-3
        assert (got != want).double().mean() <= share
    step = (math.log2(64) / 2 + 5) * torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, rtol=step, atol=step)


@EACH_KIND
@EACH_ORDER
@EACH_DTYPE
def test_gradients(name, weighted, order, dtype, device):
    """dx and dw are as near to the exact ones as the model's, or nearer."""
    kind = KINDS[name]
    x, w = draw(dtype, device), weight_of(weighted, dtype, 64, device)
    cos, sin = angles(S, order.R // 2, device)
    if order.options.get("precision") == "model":
        cos, sin = cos.to(dtype), sin.to(dtype)
    g = torch.randn(B, S, H, 64, device=device).to(dtype)

    def gradients(function, dtype=None):
        inputs = [t.to(dtype or t.dtype).detach().requires_grad_() for t in (x, w) if t is not None]
        tables = [t.to(dtype or t.dtype) for t in (cos, sin)]
        out = function(kind, order, inputs[0], *tables, *(inputs[1:] or [None]))
        return torch.autograd.grad(out, inputs, g.to(out.dtype))

    exact = gradients(composed, torch.float64)
    for ours, theirs, want in zip(gradients(fused), gradients(composed), exact, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == want.shape
        dims = (0, 1, 3) if ours.dim() == 4 else (0,)  # heads have magnitudes of their own
        size = want.square().mean(dims)
        error, eager = (
            ((t.double() - want).square().mean(dims) / size).sqrt() for t in (ours, theirs)
        )
        assert (error <= 1.05 * eager + 2 * FLOAT32_EPS).all(), (error, eager)


# --- norms across heads ---------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [4, 40])
@EACH_DTYPE
def test_across_heads(heads, dtype, device):
    """OLMo 2's and Wan's: one head of H*D elements, whose blocks rotate."""
    x, w = (
        torch.randn(B, S, heads * 64, device=device).to(dtype),
        weight_of("own", dtype, 64, "cpu"),
    )
    w = w.to(device).repeat(heads)
    cos, sin = angles(S, 32, device)
    tables = cos.repeat(1, heads), sin.repeat(1, heads)
    options = dict(eps=1e-6, cast="after", precision="model")
    got = fused_rope.norm_rotate(x[:, :, None], *tables, w, blocks=heads, **options)
    normalized = KINDS["rounded after"].formula(x, w, 1e-6).unflatten(-1, (heads, 64))
    want = halves(normalized, cos, sin)
    step = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.view_as(want), want, rtol=step, atol=step)
    if dtype != torch.float32:
        assert (got.view_as(want) != want).double().mean() < 1e-3


# --- what the operator does not compute -----------------------------------------------------------


class Module(torch.nn.Module):
    """A norm module as transformers writes them."""

    formula: Any

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = type(self).formula(x, self.weight, self.variance_epsilon)
        return result


class Weightless(torch.nn.Module):
    formula: Any

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = type(self).formula(x, None, self.eps)
        return result


def module_of(name: str, formula: Any, weightless: bool = False) -> type[torch.nn.Module]:
    return type(name, (Weightless if weightless else Module,), {"formula": staticmethod(formula)})


@pytest.mark.parametrize("name", [n for n in KINDS if KINDS[n].weights != ("float32",)])
def test_patch_knows_the_kind(name):
    kind = KINDS[name]
    [found] = norms.learn(module_of(name, kind.formula, kind.weights == NONE))
    assert found.cast == kind.options["cast"]
    assert found.zero_centered == kind.options.get("zero_centered", False)
    assert found.weighted == (kind.weights != NONE)
    assert not found.weighted or found.mixed == ("float32" in kind.weights)


@pytest.mark.parametrize("name", ["torch", "torch, no weight", "rounded before"])
def test_autocast(name):
    """On CUDA it makes the results of torch.nn.functional.rms_norm float32; they stay so."""
    kind = module_of(name, KINDS[name].formula, KINDS[name].weights == NONE)
    [found] = norms.learn(kind)
    norm, x = kind() if KINDS[name].weights == NONE else kind(64), torch.randn(2, 3, 4, 64)
    assert found.fits(norm, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert found.fits(norm, x) == (name == "rounded before")


def rounded_root(x: Tensor, w: Any, eps: float) -> Tensor:
    """DeepSeek V4's."""
    root = torch.rsqrt(widen(x).pow(2).mean(-1, keepdim=True) + eps)
    return x * root.to(x.dtype)


def layer_norm(x: Tensor, w: Any, eps: float) -> Tensor:
    """Phi's, Cohere's, CogVideoX's."""
    return functional.layer_norm(x, x.shape[-1:], w, None, eps)


def by_length(x: Tensor, w: Any, eps: float) -> Tensor:
    """Zaya's: eps limits the length, and all is rounded to x's dtype."""
    return w * (x * (x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True).clamp_min(eps)))


def sum_of_squares(x: Tensor, w: Any, eps: float) -> Tensor:
    """FLA's: eps is added to the sum of the squares."""
    x32 = widen(x)
    return (x32 * torch.rsqrt(x32.pow(2).sum(-1, keepdim=True) + eps) * w).to(x.dtype)


OTHERS = [rounded_root, layer_norm, by_length, sum_of_squares]


@pytest.mark.parametrize("formula", OTHERS, ids=lambda f: f.__name__)
def test_other_kinds_stay_the_model_s_own(formula):
    kind = module_of(formula.__name__, formula, formula is rounded_root)
    assert "is not an RMS norm" in norms.learn(kind)


@pytest.mark.parametrize(
    "weight,options,error,words",
    [
        # Cohere's and Chameleon's weight of each head
        (lambda D: torch.ones(H, D), dict(), ValueError, "expected weight"),
        # MLA: the norm of the latent elements, the rotation of the others
        (lambda D: torch.ones(D - 16), dict(), ValueError, "expected weight"),
        # Qwen3 with a float32 weight returns float32, as do diffusers' norms
        (lambda D: torch.ones(D), dict(cast="before"), TypeError, 'weight .*cast="before"'),
    ],
    ids=["weight of each head", "part of a head", "wider results"],
)
def test_other_weights_are_refused(weight, options, error, words, device):
    x, tables = torch.randn(B, S, H, 64, device=device).bfloat16(), angles(S, 8, device)
    with pytest.raises(error, match=words):
        fused_rope.norm_rotate(x, *tables, weight(64).to(device), eps=1e-6, **options)
