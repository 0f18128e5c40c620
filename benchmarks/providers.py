"""One adapter per implementation, which makes its public Python call.

An adapter declares the works that its call supports and prepares views and tables in that call's
convention; preparation is not timed. Libraries that cannot be imported are skipped and named.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from cases import CACHE_CASES, NORM_CASES, Work
from inputs import EPS, InputSet, relayout, token_rows
from torch import Tensor

Pair = tuple[Tensor, Tensor]
Results = tuple[Tensor, ...]  # q and k; with a cache q, k_cache and v_cache
Call = Callable[[], Results]

OUT_OF_PLACE = ("forward", "backward", "both", "forward_grad")
EVERY_WAY = (*OUT_OF_PLACE, "in_place")
CALLS = ("call", "tiny")  # cases of adapters that differ from fused_rope only in host time


class Provider:
    """Base class: `bind` returns the call, `restore` views its results in the work's layout."""

    name = ""
    directions: tuple[str, ...] = EVERY_WAY
    words: tuple[str, ...] = ()
    partial = False  # supports R < D
    cases: tuple[str, ...] = ()  # the cases it is measured on; empty: all
    exact = False  # results are rounded once, from float32
    weight_gradients = True  # of the norm
    needs_cuda = True

    def __init__(self) -> None:
        self._tables: tuple[Tensor, Any] | None = None
        self.load()

    def load(self) -> None:
        """Imports the library; raises ImportError if it is not installed."""

    def supports(self, work: Work, direction: str) -> bool:
        span = work.R == work.case.D or (self.partial and not work.rotary_offset)
        asked = not self.cases or work.case.name in self.cases
        return span and asked and work.only(*self.words) and direction in self.ways(work)

    def ways(self, work: Work) -> tuple[str, ...]:
        """The directions that the call supports on this memory."""
        return self.directions

    def layout(self, work: Work) -> str:
        """The layout that the call takes and returns."""
        return work.layout

    def view(self, work: Work, x: Tensor) -> Tensor:
        """A view of q, k or one of their gradients in the call's layout."""
        return relayout(x, work.layout, self.layout(work))

    def make_tables(self, work: Work, inputs: InputSet) -> Any:
        return inputs.cos, inputs.sin

    def tables(self, work: Work, inputs: InputSet) -> Any:
        """The result of make_tables, computed once for all sets that share a table."""
        if self._tables is None or self._tables[0] is not inputs.cos:
            self._tables = inputs.cos, self.make_tables(work, inputs)
        return self._tables[1]

    def bind(self, work: Work, inputs: InputSet, in_place: bool) -> Call:
        raise NotImplementedError

    def restore(self, work: Work, inputs: InputSet, out: Results) -> Results:
        return tuple(relayout(x, self.layout(work), work.layout) for x in out)


def from_cache(inputs: InputSet, out: Results) -> Results:
    """q, and the tokens of k and v in the cache."""
    assert inputs.cache is not None
    q, *caches = out
    slots = inputs.cache.slots

    def read(cache: Tensor) -> Tensor:
        # Indexing does not support all 8-bit floats.
        return cache.view(torch.uint8).flatten(0, 1)[slots].view(cache.dtype)

    return q, *map(read, caches)


HF_WORDS = (
    *("bhsd", "bhsd_view", "packed", "positions32", "positions64"),
    *("float16", "float32"),
)


def full_width(work: Work, inputs: InputSet, dtype: torch.dtype) -> Pair:
    """cos and sin [B or 1, S, R] in Hugging Face's form: gathered, tiled, in dtype."""
    cos, sin = inputs.cos, inputs.sin
    if cos.dim() == 2:
        rows = token_rows(work, inputs)
        cos, sin = cos[rows], sin[rows]
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((sin, sin), -1).to(dtype)


class FusedRope(Provider):
    name = "fused_rope"
    partial = True
    exact = True
    needs_cuda = False

    def load(self) -> None:
        self.module = importlib.import_module("fused_rope")

    def supports(self, work: Work, direction: str) -> bool:
        if work.has("out_rows", "cache", "cache_fp8"):
            return direction == "forward" and not (work.has("out_rows") and work.has("norm"))
        return True

    def bind(self, work: Work, inputs: InputSet, in_place: bool) -> Call:
        q, k, cos, sin, options = inputs.q, inputs.k, inputs.cos, inputs.sin, inputs.options
        if inputs.cache is not None:
            return self.bind_cache(inputs)
        if inputs.weights:
            return self.bind_norm(inputs, in_place)
        rotate = self.module.rotate_qk_ if in_place else self.module.rotate_qk
        if inputs.out_rows is not None:
            out, rows = (torch.empty_like(q), torch.empty_like(k).flatten(0, 1)), inputs.out_rows
            return lambda: rotate(q, k, cos, sin, out=out, out_rows=rows, **options)
        if options:
            return lambda: rotate(q, k, cos, sin, **options)
        return lambda: rotate(q, k, cos, sin)

    def bind_norm(self, inputs: InputSet, in_place: bool) -> Call:
        q, k, cos, sin, options = inputs.q, inputs.k, inputs.cos, inputs.sin, inputs.options
        q_weight, k_weight = inputs.weights
        rotate = self.module.norm_rotate_qk_ if in_place else self.module.norm_rotate_qk
        if options:
            return lambda: rotate(q, k, cos, sin, q_weight, k_weight, eps=EPS, **options)
        return lambda: rotate(q, k, cos, sin, q_weight, k_weight, eps=EPS)

    def bind_cache(self, inputs: InputSet) -> Call:
        q, k, cos, sin, cache = inputs.q, inputs.k, inputs.cos, inputs.sin, inputs.cache
        assert cache is not None
        v, k_cache, v_cache, slots = cache.v, cache.k_cache, cache.v_cache, cache.slots
        options = dict(inputs.options)
        if cache.scale is not None:
            options |= {"k_scale": cache.scale, "v_scale": cache.scale}
        if inputs.weights:
            options |= dict(zip(("q_weight", "k_weight"), inputs.weights, strict=True))
            options["eps"] = EPS
        store = self.module.rotate_and_cache

        def call() -> Results:
            rotated = store(q, k, v, cos, sin, k_cache, v_cache, slots, **options)
            return rotated, k_cache, v_cache

        return call

    def restore(self, work: Work, inputs: InputSet, out: Results) -> Results:
        if inputs.cache is not None:
            return from_cache(inputs, out)
        q, k = out
        return (q, k) if inputs.out_rows is None else (q, k[inputs.out_rows])


class TwoStep(Provider):
    """rotate_qk, then k and v are quantized, if the cache has 8 bits, and stored by indexing."""

    name = "two_step"
    cases = ("call", "tiny", *CACHE_CASES)
    directions = ("forward",)
    words = ("cache", "cache_fp8")
    needs_cuda = False

    def load(self) -> None:
        self.rotate = importlib.import_module("fused_rope").rotate_qk

    def supports(self, work: Work, direction: str) -> bool:
        return work.cache_dtype is not None and super().supports(work, direction)

    def bind(self, work: Work, inputs: InputSet, in_place: bool) -> Call:
        q, k, cos, sin, rotate = inputs.q, inputs.k, inputs.cos, inputs.sin, self.rotate
        cache = inputs.cache
        assert cache is not None
        v, scale, slots = cache.v, cache.scale, (cache.slots,)
        k_cache, v_cache = cache.k_cache, cache.v_cache
        k_rows, v_rows = (c.flatten(0, 1) for c in (k_cache, v_cache))
        if scale is None:

            def call() -> Results:
                q_out, k_out = rotate(q, k, cos, sin)
                k_rows.index_put_(slots, k_out)
                v_rows.index_put_(slots, v)
                return q_out, k_cache, v_cache

            return call
        dtype, largest = k_cache.dtype, torch.finfo(k_cache.dtype).max

        def store(rows: Tensor, x: Tensor) -> None:
            quotient = (x.float() / scale).clamp_(-largest, largest)
            rows.view(torch.uint8).index_put_(slots, quotient.to(dtype).view(torch.uint8))

        def quantize_and_store() -> Results:
            q_out, k_out = rotate(q, k, cos, sin)
            store(k_rows, k_out)
            store(v_rows, v)
            return q_out, k_cache, v_cache

        return quantize_and_store

    def restore(self, work: Work, inputs: InputSet, out: Results) -> Results:
        return from_cache(inputs, out)


class FusedRopeModule(Provider):
    """RotaryEmbedding, which owns its table, called with an int offset or with positions."""

    name = "fused_rope_module"
    cases: tuple[str, ...] = CALLS
    directions = OUT_OF_PLACE
    words = ("bhsd", "bhsd_view", "positions32", "positions64", "float16", "float32")
    exact = True
    needs_cuda = False

    def load(self) -> None:
        self.module = importlib.import_module("fused_rope").RotaryEmbedding

    def make_tables(self, work: Work, inputs: InputSet) -> Any:
        """The module."""
        rows, device = inputs.angles.shape[0], inputs.angles.device
        return self.module(work.case.D, max_seq_len=rows, layout=work.layout, device=device)

    def bind(self, work: Work, inputs: InputSet, in_place: bool) -> Call:
        q, k, rope = inputs.q, inputs.k, self.tables(work, inputs)
        positions = inputs.options.get("positions")
        if positions is None:
            return lambda: rope(q, k, offset=0)
        return lambda: rope(q, k, positions=positions)


class Reference(Provider):
    """fused_rope.reference, in pure PyTorch."""

    name = "reference"
    cases = ("call", "cpu", "tiny", "train", "mid512")
    directions = OUT_OF_PLACE
    needs_cuda = False
    partial = True

    def load(self) -> None:
        self.module = importlib.import_module("fused_rope.reference")

    def bind(self, work: Work, inputs: InputSet, in_place: bool) -> Call:
        q, k, cos, sin, options = inputs.q, inputs.k, inputs.cos, inputs.sin, inputs.options
        rotate = self.module.rotate_qk
        return lambda: rotate(q, k, cos, sin, **options)


class EagerHF(Provider):
    """apply_rotary_pos_emb of Hugging Face's Llama: [B, H, S, D] views, tables in x's dtype.

    With a norm, Qwen3's norm of [B, S, H, D] precedes it.
    """

    name = "eager_hf"
    directions = OUT_OF_PLACE
    words: tuple[str, ...] = (*HF_WORDS, "norm")
    module_name = "transformers.models.llama.modeling_llama"
    function_name = "apply_rotary_pos_emb"
    needs_cuda = False

    def load(self) -> None:
        self.function = getattr(importlib.import_module(self.module_name), self.function_name)

    def layout(self, work: Work) -> str:
        return "bhsd"

    def make_tables(self, work: Work, inputs: InputSet) -> Any:
        return full_width(work, inputs, work.dtype)

    def bind(self, work: Work, inputs: InputSet, in_place: bool) -> Call:
        q, k = self.view(work, inputs.q), self.view(work, inputs.k)
        cos, sin = self.tables(work, inputs)
        function = self.function
        if not inputs.weights:
            return lambda: function(q, k, cos, sin)
        q, k = (relayout(x, work.layout, "bshd") for x in (inputs.q, inputs.k))
        module = importlib.import_module("transformers.models.qwen3.modeling_qwen3").Qwen3RMSNorm
        q_norm, k_norm = (norm_module(module, weight) for weight in inputs.weights)
        return lambda: function(q_norm(q).transpose(1, 2), k_norm(k).transpose(1, 2), cos, sin)


def norm_module(module: type[torch.nn.Module], weight: Tensor) -> torch.nn.Module:
    """A norm that computes with this very tensor, which a parameter would wrap."""
    norm = module(weight.numel(), eps=EPS)
    del norm.weight
    norm.weight = weight
    return norm


class FusedRopeHF(EagerHF):
    """The drop-in for apply_rotary_pos_emb."""

    name = "fused_rope_hf"
    words = HF_WORDS
    cases = ("call", "cpu", "tiny", "train", "decode256")
    module_name = "fused_rope.compat.transformers"


class Liger(EagerHF):
    """liger_rotary_pos_emb: in place on [B, S, H, D] memory; [B, H, S, D] is copied to it first."""

    name = "liger"
    words = ("bhsd", "bhsd_view", "float16", "float32", "partial2", "partial4")
    partial = True
    module_name = "liger_kernel.transformers.rope"
    function_name = "liger_rotary_pos_emb"
    needs_cuda = True

    def ways(self, work: Work) -> tuple[str, ...]:
        copies = work.has("bhsd") and work.case.S > 1
        return ("forward",) if copies else ("in_place", "forward_grad")


class FusedRopeLiger(Liger):
    """The drop-in for liger_rotary_pos_emb; it does not change its inputs."""

    name = "fused_rope_liger"
    cases = CALLS
    module_name = "fused_rope.compat.liger"
    needs_cuda = False

    def ways(self, work: Work) -> tuple[str, ...]:
        return OUT_OF_PLACE


class RMSNormFusedRope(Provider):
    """torch.nn.functional.rms_norm of q and of k, then our rotation of both."""

    name = "rms_norm_fused_rope"
    cases = ("call", "tiny", *NORM_CASES)
    directions = OUT_OF_PLACE
    words = ("norm", "float16", "float32")
    needs_cuda = False

    def load(self) -> None:
        self.rotate = importlib.import_module("fused_rope").rotate_qk

    def supports(self, work: Work, direction: str) -> bool:
        return work.has("norm") and super().supports(work, direction)

    def norm(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        rms_norm, sizes = torch.nn.functional.rms_norm, weight.shape
        return lambda x: rms_norm(x, sizes, weight, EPS)

    def bind(self, work: Work, inputs: InputSet, in_place: bool) -> Call:
        q, k, cos, sin, rotate = inputs.q, inputs.k, inputs.cos, inputs.sin, self.rotate
        q_norm, k_norm = map(self.norm, inputs.weights)
        return lambda: rotate(q_norm(q), k_norm(k), cos, sin)


class LigerRMSNormFusedRope(RMSNormFusedRope):
    """LigerRMSNorm of q and of k, then our rotation of both."""

    name = "liger_rms_norm_fused_rope"
    needs_cuda = True

    def load(self) -> None:
        super().load()
        self.module = importlib.import_module("liger_kernel.transformers.rms_norm").LigerRMSNorm

    def norm(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        return norm_module(self.module, weight)


class Unsloth(Provider):
    """fast_rope_embedding on [B, H, S, D]: in place where its transposition makes no copy.

    With a norm, fast_qk_norm_rope on [B, S, H, D], whose fused kernel needs constant weights.
    """

    name = "unsloth"
    words = ("bhsd", "bhsd_view", "positions32", "float16", "float32", "norm")
    weight_gradients = False
    module_name = "unsloth.kernels.rope_embedding"
    norm_module_name = "unsloth.kernels.qk_norm_rope"

    def load(self) -> None:
        self.function = importlib.import_module(self.module_name).fast_rope_embedding

    @cached_property
    def norm_function(self) -> Any:
        return importlib.import_module(self.norm_module_name).fast_qk_norm_rope

    def layout(self, work: Work) -> str:
        return "bhsd"

    def ways(self, work: Work) -> tuple[str, ...]:
        if work.has("norm"):
            return OUT_OF_PLACE
        dense = work.has("bhsd") or work.case.S == 1
        copies = not dense if work.has("positions32") else dense and work.case.S > 1
        return ("forward",) if copies else ("in_place", "forward_grad")

    def make_tables(self, work: Work, inputs: InputSet) -> Any:
        """cos and sin [M, R] in x's dtype, the form that its rotary modules cache.

        At least two rows: fast_qk_norm_rope squeezes a single one and takes its unfused path.
        """
        copies = (2 if inputs.cos.shape[0] == 1 else 1, 2)
        return tuple(t.repeat(copies).to(work.dtype) for t in (inputs.cos, inputs.sin))

    def bind(self, work: Work, inputs: InputSet, in_place: bool) -> Call:
        q, k = self.view(work, inputs.q), self.view(work, inputs.k)
        cos, sin = self.tables(work, inputs)
        rows = inputs.options.get("positions")
        if inputs.weights:
            norm_rope = self.norm_function
            q, k = (relayout(x, work.layout, "bshd") for x in (inputs.q, inputs.k))
            q_norm, k_norm = (
                SimpleNamespace(weight=weight, variance_epsilon=EPS) for weight in inputs.weights
            )
            return lambda: norm_rope(q_norm, k_norm, q, k, cos, sin, rows)
        function = self.function
        if rows is None:
            return lambda: function(q, k, cos, sin)
        return lambda: function(q, k, cos, sin, rows)


class FusedRopeUnsloth(Unsloth):
    """The drop-in for fast_rope_embedding; it does not change its inputs."""

    name = "fused_rope_unsloth"
    cases = FusedRopeHF.cases
    weight_gradients = True
    module_name = norm_module_name = "fused_rope.compat.unsloth"
    needs_cuda = False

    def ways(self, work: Work) -> tuple[str, ...]:
        return OUT_OF_PLACE


def eager_formula(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """x * cos + rotate(x) * sin over the last dimension."""

    def rotate(x: Tensor) -> Tensor:
        if interleaved:
            return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        low, high = x.chunk(2, -1)
        return torch.cat((-high, low), -1)

    return q * cos + rotate(q) * sin, k * cos + rotate(k) * sin


def norm_formula(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    q_weight: Tensor,
    k_weight: Tensor,
) -> tuple[Tensor, Tensor]:
    """Qwen3's norm, then the eager formula: the normalized value is rounded, then weighted."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
        return weight * (wide * scale).to(x.dtype)

    return eager_formula(norm(q, q_weight), norm(k, k_weight), cos, sin, interleaved)


class Inductor(Provider):
    """torch.compile of the eager formulas, with the static sizes of each work."""

    name = "inductor"
    directions = OUT_OF_PLACE
    words = ("bhsd", "interleaved", "norm")

    def load(self) -> None:
        self._compiled: tuple[Work, Any] | None = None
        import torch._functorch.config as functorch_config

        functorch_config.donated_buffer = False  # retain_graph=True is refused otherwise

    def compiled(self, work: Work) -> Any:
        if self._compiled is None or self._compiled[0] is not work:
            torch._dynamo.reset()  # the recompilation limit counts per function, not per work
            formula = norm_formula if work.has("norm") else eager_formula
            self._compiled = work, torch.compile(formula, dynamic=False, fullgraph=True)
        return self._compiled[1]

    def make_tables(self, work: Work, inputs: InputSet) -> Any:
        cos, sin = full_width(work, inputs, work.dtype)
        if work.has("interleaved"):
            cos, sin = (t[..., : work.P].repeat_interleave(2, -1) for t in (cos, sin))
        head_axis = work.layout.index("h")
        return cos.unsqueeze(head_axis), sin.unsqueeze(head_axis)

    def bind(self, work: Work, inputs: InputSet, in_place: bool) -> Call:
        q, k, interleaved = inputs.q, inputs.k, work.has("interleaved")
        cos, sin = self.tables(work, inputs)
        function, weights = self.compiled(work), inputs.weights
        return lambda: function(q, k, cos, sin, interleaved, *weights)


class FlashAttn(Provider):
    """flash-attn's Triton kernel behind apply_rotary_emb, called for q and for k."""

    name = "flash_attn"
    words = (
        *("bhsd", "bhsd_view", "sbhd", "thd", "packed", "interleaved", "partial2", "partial4"),
        *("offsets", "cu_seqlens", "sequences", "unaligned", "float16", "float32"),
    )
    partial = True
    module_name = "flash_attn.layers.rotary"
    widest = 256

    def load(self) -> None:
        self.function = importlib.import_module(self.module_name).apply_rotary_emb

    def supports(self, work: Work, direction: str) -> bool:
        return self.widest >= work.case.D and super().supports(work, direction)

    def layout(self, work: Work) -> str:
        return "thd" if work.layout == "thd" else "bshd"

    def bind(self, work: Work, inputs: InputSet, in_place: bool) -> Call:
        q, k = self.view(work, inputs.q), self.view(work, inputs.k)
        cos, sin = self.tables(work, inputs)
        function, keywords = self.function, self.keywords(work, inputs, in_place)
        return lambda: (function(q, cos, sin, **keywords), function(k, cos, sin, **keywords))

    def keywords(self, work: Work, inputs: InputSet, in_place: bool) -> dict[str, Any]:
        keywords: dict[str, Any] = {"interleaved": work.has("interleaved"), "inplace": in_place}
        if "offset" in inputs.options:
            keywords["seqlen_offsets"] = inputs.options["offset"]
        if "cu_seqlens" in inputs.options:
            keywords["cu_seqlens"] = inputs.options["cu_seqlens"]
            keywords["max_seqlen"] = inputs.angles.shape[0]
        return keywords


class FusedRopeFlashAttn(FlashAttn):
    """The drop-in for apply_rotary_emb."""

    name = "fused_rope_flash_attn"
    cases = CALLS
    module_name = "fused_rope.compat.flash_attn"
    needs_cuda = False


class Quack(FlashAttn):
    name = "quack"
    module_name = "quack.rotary"
    widest = 512


class FlashInfer(Provider):
    """apply_rope_with_cos_sin_cache on [T, H*D], positions [T] and a float32 cos||sin cache."""

    name = "flashinfer"
    directions: tuple[str, ...] = ("forward", "in_place")
    words = (
        "packed",
        "interleaved",
        "partial2",
        "partial4",
        "positions32",
        "positions64",
        "float16",
    )
    partial = True

    def load(self) -> None:
        module = importlib.import_module("flashinfer")
        self.forward = module.apply_rope_with_cos_sin_cache
        self.in_place = module.apply_rope_with_cos_sin_cache_inplace

    def view(self, work: Work, x: Tensor) -> Tensor:
        return x.flatten(2).flatten(0, 1)

    def make_tables(self, work: Work, inputs: InputSet) -> Any:
        rows = token_rows(work, inputs).expand(work.case.B, work.case.S).flatten().contiguous()
        if work.has("positions32"):
            rows = rows.int()
        return rows, torch.cat((inputs.cos, inputs.sin), -1)

    def bind(self, work: Work, inputs: InputSet, in_place: bool) -> Call:
        q, k = self.view(work, inputs.q), self.view(work, inputs.k)
        (rows, cache), D, neox = self.tables(work, inputs), work.case.D, not work.has("interleaved")
        if not in_place:
            forward = self.forward
            return lambda: forward(rows, q, k, D, cache, neox)
        return _returning(self.in_place, (q, k), rows, q, k, D, cache, neox)

    def restore(self, work: Work, inputs: InputSet, out: Pair) -> Pair:
        q, k = (x.view(work.case.B, work.case.S, -1, work.case.D) for x in out)
        return q, k


def _returning(function: Callable[..., Any], out: Pair, *arguments: Any) -> Call:
    """A call of an in-place function that returns nothing."""

    def call() -> Pair:
        function(*arguments)
        return out

    return call


class VLLM(FlashInfer):
    """vllm._custom_ops.rotary_embedding, in place, with a cos||sin cache in x's dtype."""

    name = "vllm"
    directions = ("in_place",)
    module_name = "vllm._custom_ops"

    def load(self) -> None:
        self.in_place = importlib.import_module(self.module_name).rotary_embedding

    def make_tables(self, work: Work, inputs: InputSet) -> Any:
        rows, cache = super().make_tables(work, inputs)
        return rows.long(), cache.to(work.dtype)


class FusedRopeVLLM(VLLM):
    """The drop-in for rotary_embedding."""

    name = "fused_rope_vllm"
    cases = CALLS
    module_name = "fused_rope.compat.vllm"
    needs_cuda = False


class SGLang(FlashInfer):
    """The JIT kernel behind apply_rope_inplace on [T, H, D], with a float32 cos||sin cache."""

    name = "sglang"
    directions = ("in_place",)
    words = ("packed", "interleaved", "positions32", "positions64", "float16")
    partial = False

    def load(self) -> None:
        try:
            module = importlib.import_module("sglang.kernels.ops.attention.rope")
        except ModuleNotFoundError:  # older releases
            module = importlib.import_module("sglang.jit_kernel.rope")
        self.in_place = module.apply_rope_inplace

    def view(self, work: Work, x: Tensor) -> Tensor:
        return x.flatten(0, 1)

    def bind(self, work: Work, inputs: InputSet, in_place: bool) -> Call:
        q, k = self.view(work, inputs.q), self.view(work, inputs.k)
        (rows, cache), function = self.tables(work, inputs), self.in_place
        neox = not work.has("interleaved")

        def call() -> Pair:
            function(q, k, cache, rows, is_neox=neox)
            return q, k

        return call


class Megatron(Provider):
    """fused_apply_mrope on [S, B, H, D] with the angles of three axes, called for q and for k."""

    name = "megatron"
    directions = OUT_OF_PLACE
    words = ("mrope", "float16", "float32")

    def load(self) -> None:
        module = importlib.import_module("megatron.core.fusions.fused_mrope")
        if not module.is_fused_mrope_available():
            raise ImportError("is_fused_mrope_available() is false")
        self.function = module.fused_apply_mrope

    def supports(self, work: Work, direction: str) -> bool:
        return work.has("mrope") and super().supports(work, direction)

    def layout(self, work: Work) -> str:
        return "sbhd"

    def make_tables(self, work: Work, inputs: InputSet) -> Any:
        """Angles [3, B, S, P] float32, and the number of pairs of each axis."""
        axes = inputs.options["axes"]
        sections = [axes.count(axis) for axis in range(3)]
        return inputs.angles[inputs.options["positions"]].float(), sections

    def bind(self, work: Work, inputs: InputSet, in_place: bool) -> Call:
        q, k = self.view(work, inputs.q), self.view(work, inputs.k)
        (angles, sections), function = self.tables(work, inputs), self.function
        return lambda: (function(q, angles, sections), function(k, angles, sections))


class TransformerEngine(Provider):
    """apply_rotary_pos_emb(fused=True) with angles [M, 1, 1, R], called for q and for k."""

    name = "transformer_engine"
    directions = OUT_OF_PLACE
    words = (
        *("bhsd", "bhsd_view", "sbhd", "thd", "packed", "interleaved", "partial2", "partial4"),
        *("cu_seqlens", "float16", "float32"),
    )
    partial = True

    def load(self) -> None:
        try:
            module = importlib.import_module("transformer_engine.pytorch.attention.rope")
        except ModuleNotFoundError:  # until version 2.2
            module = importlib.import_module("transformer_engine.pytorch.attention")
        self.function = module.apply_rotary_pos_emb

    def layout(self, work: Work) -> str:
        return "bshd" if work.layout == "bhsd" else work.layout

    def make_tables(self, work: Work, inputs: InputSet) -> Any:
        angles = inputs.angles.float()
        if work.has("interleaved"):
            return angles.repeat_interleave(2, -1)[:, None, None]
        return torch.cat((angles, angles), -1)[:, None, None]

    def bind(self, work: Work, inputs: InputSet, in_place: bool) -> Call:
        q, k = self.view(work, inputs.q), self.view(work, inputs.k)
        freqs, function = self.tables(work, inputs), self.function
        keywords = {
            "tensor_format": self.layout(work),
            "interleaved": work.has("interleaved"),
            "fused": True,
            "cu_seqlens": inputs.options.get("cu_seqlens"),
        }
        return lambda: (function(q, freqs, **keywords), function(k, freqs, **keywords))


class RotaryEmbeddingTorch(Provider):
    """apply_rotary_emb(freqs, t): interleaved; each call computes cos and sin of the angles."""

    name = "rotary_embedding_torch"
    directions = OUT_OF_PLACE
    words = ("interleaved", "float16", "float32")
    partial = True
    needs_cuda = False

    def load(self) -> None:
        self.function = importlib.import_module("rotary_embedding_torch").apply_rotary_emb

    def supports(self, work: Work, direction: str) -> bool:
        return work.has("interleaved") and super().supports(work, direction)

    def make_tables(self, work: Work, inputs: InputSet) -> Any:
        return inputs.angles.float().repeat_interleave(2, -1)[:, None]

    def bind(self, work: Work, inputs: InputSet, in_place: bool) -> Call:
        q, k, freqs, function = inputs.q, inputs.k, self.tables(work, inputs), self.function
        return lambda: (function(freqs, q, seq_dim=-3), function(freqs, k, seq_dim=-3))


PROVIDERS: dict[str, type[Provider]] = {
    provider.name: provider
    for provider in (
        *(FusedRope, FusedRopeModule, FusedRopeHF, FusedRopeUnsloth, FusedRopeLiger),
        *(FusedRopeFlashAttn, FusedRopeVLLM, EagerHF, Inductor, Reference, Liger, Unsloth),
        *(RMSNormFusedRope, LigerRMSNormFusedRope, TwoStep),
        *(FlashAttn, FlashInfer, TransformerEngine, VLLM, SGLang, Megatron),
        *(RotaryEmbeddingTorch, Quack),
    )
}


def load_providers(
    names: list[str] | None, device: torch.device
) -> tuple[list[Provider], dict[str, str]]:
    """The adapters of installed libraries, and the reason for each skipped one."""
    loaded, skipped = [], {}
    for name in names or list(PROVIDERS):
        if PROVIDERS[name].needs_cuda and device.type != "cuda":
            skipped[name] = "needs CUDA"
            continue
        try:
            loaded.append(PROVIDERS[name]())
        except Exception as error:  # broken installations raise all kinds of exceptions
            skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return loaded, skipped
