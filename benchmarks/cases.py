"""The cases, variants and directions of the suite, as data.

Letters: B batch, S sequence length, T tokens of a packed batch, N sequences in it, Hq and Hk query
and key heads, D head_dim, R rotary_dim, P = R/2 pairs, M table rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

WORDS = (
    "bhsd",
    "bhsd_view",
    "sbhd",
    "thd",
    "packed",
    "interleaved",
    "partial2",
    "partial4",
    "trailing",
    "per_token",
    "per_head",
    "positions32",
    "positions64",
    "mrope",
    "mrope_uneven",
    "mrope_interleaved",
    "mrope_mixed",
    "offsets",
    "cu_seqlens",
    "sequences",
    "out_rows",
    "unaligned",
    "float16",
    "float32",
    "norm",
    "cache",
    "cache_fp8",
)
"""The words of a variant, in the order in which they are written."""

NUMBERED = ("sequences", "unaligned")
"""Words that may end in a number: sequences64 (N), unaligned4 (a storage offset of 4 elements)."""

MROPE = tuple(word for word in WORDS if word.startswith("mrope"))

DIRECTIONS = ("forward", "backward", "both", "in_place", "forward_grad")


@dataclass(frozen=True)
class Case:
    """One shape: q is [B, S, Hq, D] and k [B, S, Hk, D] unless the variant names a layout."""

    name: str
    B: int
    S: int
    Hq: int
    Hk: int
    D: int
    R: int | None = None
    rotary_offset: int = 0


CASES = {
    case.name: case
    for case in (
        Case("train", 4, 4096, 32, 8, 128),
        Case("prefill", 1, 8192, 32, 8, 128),
        Case("mha1", 1, 2048, 32, 32, 128),
        Case("mha2", 2, 1024, 32, 32, 128),
        Case("d64", 8, 2048, 32, 32, 64),
        Case("mid2048", 1, 2048, 32, 8, 128),
        Case("mid512", 1, 512, 32, 8, 128),
        Case("decode256", 256, 1, 32, 8, 128),
        Case("decode64", 64, 1, 32, 8, 128),
        Case("decode1", 1, 1, 32, 8, 128),
        Case("wide256", 2, 4096, 16, 16, 256),
        Case("wide80", 4, 4096, 32, 32, 80),
        Case("wide96", 4, 4096, 32, 32, 96),
        Case("wide512", 2, 4096, 8, 1, 512),
        Case("mla", 2, 4096, 64, 1, 192, R=64, rotary_offset=128),
        Case("dsv4", 2, 4096, 64, 1, 512, R=64, rotary_offset=448),
        Case("vit72", 4, 4096, 16, 16, 72),
        Case("vit88", 4, 4096, 16, 16, 88),
        Case("d100", 4, 4096, 32, 8, 100),
        Case("neox20b", 4, 4096, 64, 64, 96, R=24),
        Case("pythia", 4, 4096, 32, 32, 80, R=20),
        Case("call", 1, 1, 32, 8, 128),
        Case("cpu", 1, 1024, 32, 8, 128),
        Case("cpu_vit72", 1, 1024, 16, 16, 72),
        Case("cpu_neox20b", 1, 1024, 64, 64, 96, R=24),
        Case("tiny", 2, 8, 4, 2, 16),
    )
}


@dataclass(frozen=True)
class Work:
    """A case and a variant: the memory and the arithmetic of a row, for every provider."""

    case: Case
    variant: str = ""

    def __post_init__(self) -> None:
        words = list(self._words)
        if [word for word in WORDS if word in words] != words:
            raise ValueError(
                f"expected words of a variant in the order {WORDS}, got {self.variant!r}"
            )

    @property
    def _words(self) -> dict[str, int | None]:
        """The words of the variant without their numbers, and the number of each."""
        words: dict[str, int | None] = {}
        for word in self.variant.split():
            stem = word.rstrip("0123456789")
            numbered = stem in NUMBERED and stem != word
            words[stem if numbered else word] = int(word[len(stem) :]) if numbered else None
        return words

    def has(self, *words: str) -> bool:
        """Whether the variant holds any of these words."""
        return any(word in self._words for word in words)

    def only(self, *words: str) -> bool:
        """Whether the variant holds no words but these."""
        return self._words.keys() <= set(words)

    @property
    def name(self) -> str:
        return f"{self.case.name} {self.variant}".strip()

    @property
    def layout(self) -> str:
        if self.has("bhsd", "bhsd_view"):
            return "bhsd"
        return "sbhd" if self.has("sbhd") else "thd" if self.has("thd") else "bshd"

    @property
    def dtype(self) -> torch.dtype:
        if self.has("float32"):
            return torch.float32
        return torch.float16 if self.has("float16") else torch.bfloat16

    @property
    def heads(self) -> tuple[int, int]:
        """Hq and Hk. Per-head tables require Hq = Hk."""
        return self.case.Hq, self.case.Hq if self.has("per_head") else self.case.Hk

    @property
    def R(self) -> int:
        if self.has("partial4"):
            return self.case.D // 4
        return self.case.D // 2 if self.has("partial2", "trailing") else self.case.R or self.case.D

    @property
    def P(self) -> int:
        return self.R // 2

    @property
    def rotary_offset(self) -> int:
        return self.case.D - self.R if self.has("trailing") else self.case.rotary_offset

    @property
    def tokens(self) -> int:
        return self.case.B * self.case.S

    @property
    def sequences(self) -> int:
        """N of a variant with cu_seqlens."""
        return self._words.get("sequences") or self.case.B

    @property
    def cache_dtype(self) -> torch.dtype | None:
        """Of the KV cache that k and v are stored in; None without one."""
        if self.has("cache_fp8"):
            return torch.float8_e4m3fn
        return self.dtype if self.has("cache") else None

    @property
    def storage_offset(self) -> int:
        """Elements between a 16-byte boundary and the first element of q and of k."""
        number = self._words.get("unaligned", 0)
        return 1 if number is None else number


def input_bytes(work: Work) -> int:
    """Bytes of one q and one k."""
    return work.tokens * sum(work.heads) * work.case.D * work.dtype.itemsize


def bytes_moved(work: Work, direction: str) -> int:
    """Bytes that a call must read and write.

    q and k count once per direction of transfer, per-token and per-head tables once, shared tables
    and weights not at all. The backward of the norm reads q and k as well as the gradients. An
    in-place rotation with R < D touches only the rotated elements. With a cache, v is read too, and
    k and v are written in the cache's dtype.
    """
    if work.cache_dtype is not None:
        Hq, Hk = work.heads
        read, written = (Hq + 2 * Hk) * work.dtype.itemsize, Hq * work.dtype.itemsize
        written += 2 * Hk * work.cache_dtype.itemsize
        return work.tokens * work.case.D * (read + written)
    if direction == "both":
        return bytes_moved(work, "forward") + bytes_moved(work, "backward")
    norm = work.has("norm")
    width = work.R if direction == "in_place" and not norm else work.case.D
    transfers = 3 if direction == "backward" and norm else 2
    moved = transfers * work.tokens * sum(work.heads) * width * work.dtype.itemsize
    table_heads = work.heads[0] if work.has("per_head") else 1 if work.has("per_token") else 0
    tables = 2 * work.tokens * table_heads * work.P * torch.float32.itemsize
    return moved + tables


def baseline_bytes(work: Work, direction: str) -> int:
    """Bytes that the baseline reads and writes: as many as the call; for `both`, as forward."""
    return bytes_moved(work, "forward" if direction == "both" else direction)


LARGE = ("train", "prefill", "mha1", "mha2", "d64", "wide256", "wide80", "wide96", "wide512")
MID = ("mid2048", "mid512")
DECODE = ("decode256", "decode64", "decode1")
ODD = ("vit72", "vit88", "d100", "neox20b", "pythia")  # not made of whole 16-byte vectors
ODD_VARIANTS = (
    "mrope_mixed",
    "unaligned",
    "thd cu_seqlens sequences64",
    "thd cu_seqlens sequences1024",
)
TRAIN_VARIANTS = (
    "bhsd",
    "bhsd_view",
    "packed",
    "interleaved",
    "partial2",
    "per_token",
    "positions32",
    "positions64",
    "float16",
    "float32",
    "thd cu_seqlens",
    "mrope",
    "sbhd",
    "partial4",
    "trailing",
    "per_head",
)
FORWARD_ONLY = (
    ("train", "offsets"),
    ("train", "out_rows"),
    ("mha1", "bhsd"),
    ("mha2", "bhsd"),
    ("mid2048", "packed"),
    ("mid512", "packed"),
    ("wide80", "interleaved"),
    ("wide96", "interleaved"),
    ("wide256", "interleaved"),
)
POSITIONS = (
    *(("call", words) for words in ("positions32", "positions64")),
    *((name, words) for name in DECODE[:2] for words in ("positions32", "positions64")),
)
CPU_WORKS = (
    *(("cpu", words) for words in ("", "bhsd", "interleaved", "partial2", "float16", "float32")),
    *(("cpu", words) for words in ("mrope", "mrope_mixed")),
    *((name, words) for name in ("cpu_vit72", "cpu_neox20b") for words in ("", "float32")),
)
NORM_BACKWARD = ("train", "prefill", "mid2048")
NORM_CASES = (*NORM_BACKWARD, "mid512", *DECODE)
CACHE_CASES = ("decode256", "decode64", "prefill")
ALL_WAYS = ("forward", "backward", "in_place")

TARGET_PEERS = ("liger", "flash_attn", "inductor", "unsloth", "flashinfer")
NORM_PEERS = (
    *("unsloth", "inductor", "eager_hf"),
    *("rms_norm_fused_rope", "liger_rms_norm_fused_rope"),
)
PEER_WORKS = (
    *(("train", ""), ("train", "bhsd"), ("prefill", ""), ("mha1", ""), ("d64", "")),
    *((name, "") for name in (*MID, *DECODE)),
    *((name, "positions32") for name in DECODE[:2]),
)
ODD_WORKS = (*((name, "") for name in ODD), *(("train", words) for words in ODD_VARIANTS))


def default_directions(work: Work) -> tuple[str, ...]:
    """The directions that a run measures by default."""
    name = work.case.name
    if work.cache_dtype is not None:
        return ("forward",)
    if name == "call":
        return ("forward", "forward_grad", "in_place")
    if work.has("norm"):
        return ("forward", "backward") if name in NORM_BACKWARD else ("forward",)
    if name in ("mla", "dsv4"):
        return ("in_place",)
    if name in DECODE or work.variant in ODD_VARIANTS:
        return ("forward", "in_place")
    if (name, work.variant) in FORWARD_ONLY or work.has("out_rows"):
        return ("forward",)
    return (*ALL_WAYS, "both") if (name, work.variant) == ("train", "") else ALL_WAYS


def default_plan(device: str) -> Iterator[Work]:
    """Every case and variant of a full run."""
    if device == "cpu":
        yield from (Work(CASES[name], variant) for name, variant in CPU_WORKS)
        return
    yield from (Work(CASES[name]) for name in ("call", *LARGE, *MID, *DECODE, "mla", "dsv4", *ODD))
    yield from (Work(CASES["train"], variant) for variant in (*TRAIN_VARIANTS, *ODD_VARIANTS))
    yield from (Work(CASES[name], variant) for name, variant in (*POSITIONS, *FORWARD_ONLY))
    yield from (Work(CASES[name], "norm") for name in ("call", *NORM_CASES))
    for words in ("cache", "cache_fp8"):
        yield from (Work(CASES[name], words) for name in ("call", *CACHE_CASES))


def is_target(work: Work, direction: str, provider: str) -> bool:
    """Whether a target is about this figure: one of ours, or of a peer it is compared with."""
    place = work.case.name, work.variant
    if place in FORWARD_ONLY:
        return False
    if provider == "fused_rope" or work.case.name in ("call", "cpu"):
        return True
    if work.has("norm"):
        return provider in NORM_PEERS
    if place in ODD_WORKS:
        return provider == "flash_attn" and direction in ("forward", "in_place")
    if place == ("train", ""):
        if (direction, provider) == ("forward", "eager_hf"):
            return True
        if direction == "both":
            return provider in ("fused_rope_hf", "fused_rope_unsloth")
    directions = ALL_WAYS if place == ("train", "") else ("forward", "in_place")
    return place in PEER_WORKS and direction in directions and provider in TARGET_PEERS


def select(
    device: str, cases: Sequence[str] | None = None, variants: Sequence[str] | None = None
) -> list[Work]:
    """The default plan, restricted to `cases`; with `variants`, their product with the cases."""
    if variants is not None:
        names = cases or ["cpu" if device == "cpu" else "train"]
        return [Work(CASES[name], variant) for name in names for variant in variants]
    plan = [work for work in default_plan(device) if cases is None or work.case.name in cases]
    extra = [name for name in cases or () if all(name != work.case.name for work in plan)]
    return plan + [Work(CASES[name]) for name in extra]
