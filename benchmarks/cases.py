"""What is measured: shapes, variants and directions as data.

Letters: B batch, S sequence length, T tokens of a packed batch, Hq and Hk query and key heads,
D head_dim, R rotary_dim, P = R/2 pairs, M table rows.
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
    "offsets",
    "cu_seqlens",
    "out_rows",
    "float16",
    "float32",
)
"""Every word a variant may hold, in the order in which they are written."""

DIRECTIONS = ("forward", "backward", "both", "in_place", "forward_grad")


@dataclass(frozen=True)
class Case:
    """One shape: q is [B, S, Hq, D] and k [B, S, Hk, D] when the variant says nothing else."""

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
        Case("call", 1, 1, 32, 8, 128),
        Case("cpu", 1, 1024, 32, 8, 128),
        Case("tiny", 2, 8, 4, 2, 16),
    )
}


@dataclass(frozen=True)
class Work:
    """A case and a variant: the memory and the arithmetic of one row, whoever does it."""

    case: Case
    variant: str = ""

    def __post_init__(self) -> None:
        words = self.variant.split()
        if [word for word in WORDS if word in words] != words:
            raise ValueError(
                f"expected words of a variant in the order {WORDS}, got {self.variant!r}"
            )

    def has(self, *words: str) -> bool:
        """Whether the variant holds any of these words."""
        return any(word in self.variant.split() for word in words)

    def only(self, *words: str) -> bool:
        """Whether the variant holds no other words than these."""
        return set(self.variant.split()) <= set(words)

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
        """Hq and Hk. Tables for each head need equally many."""
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


def input_bytes(work: Work) -> int:
    """Bytes of one q and one k."""
    return work.tokens * sum(work.heads) * work.case.D * work.dtype.itemsize


def bytes_moved(work: Work, direction: str) -> int:
    """Bytes that a call must read and write.

    q and k count once each way, per-token and per-head tables once, shared tables not. In place
    with R < D only the rotated elements are touched.
    """
    width = work.R if direction == "in_place" else work.case.D
    moved = 2 * work.tokens * sum(work.heads) * width * work.dtype.itemsize
    table_heads = work.heads[0] if work.has("per_head") else 1 if work.has("per_token") else 0
    tables = 2 * work.tokens * table_heads * work.P * torch.float32.itemsize
    return (moved + tables) * (2 if direction == "both" else 1)


def baseline_bytes(work: Work, direction: str) -> int:
    """Bytes that the baseline reads and writes: as many; for `both` those of forward alone."""
    return bytes_moved(work, "forward" if direction == "both" else direction)


LARGE = ("train", "prefill", "mha1", "mha2", "d64", "wide256", "wide80", "wide96", "wide512")
MID = ("mid2048", "mid512")
DECODE = ("decode256", "decode64", "decode1")
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
CPU_VARIANTS = ("", "bhsd", "interleaved", "partial2", "float16", "float32")
ALL_WAYS = ("forward", "backward", "in_place")


TARGET_PEERS = ("liger", "flash_attn", "inductor", "unsloth", "flashinfer")
PEER_WORKS = (
    *(("train", ""), ("train", "bhsd"), ("prefill", ""), ("mha1", ""), ("d64", "")),
    *((name, "") for name in (*MID, *DECODE)),
    *((name, "positions32") for name in DECODE[:2]),
)


def default_directions(work: Work) -> tuple[str, ...]:
    """The directions that are measured of a case when nobody asks for others."""
    name = work.case.name
    if name == "call":
        return ("forward", "forward_grad", "in_place")
    if name in ("mla", "dsv4"):
        return ("in_place",)
    if name in DECODE:
        return ("forward", "in_place")
    if (name, work.variant) in FORWARD_ONLY or work.has("out_rows"):
        return ("forward",)
    return (*ALL_WAYS, "both") if (name, work.variant) == ("train", "") else ALL_WAYS


def default_plan(device: str) -> Iterator[Work]:
    """Every case and variant of a full run."""
    if device == "cpu":
        yield from (Work(CASES["cpu"], variant) for variant in CPU_VARIANTS)
        return
    yield from (Work(CASES[name]) for name in ("call", *LARGE, *MID, *DECODE, "mla", "dsv4"))
    yield from (Work(CASES["train"], variant) for variant in TRAIN_VARIANTS)
    yield from (Work(CASES[name], variant) for name, variant in (*POSITIONS, *FORWARD_ONLY))


def is_target(work: Work, direction: str, provider: str) -> bool:
    """Whether a target is about this figure: ours, or of a peer that ours is compared with."""
    place = work.case.name, work.variant
    if place in FORWARD_ONLY:
        return False
    if provider == "fused_rope" or work.case.name in ("call", "cpu"):
        return True
    if (place, direction, provider) == (("train", ""), "forward", "eager_hf"):
        return True
    if place == ("train", "") and direction == "both" and provider.startswith("fused_rope_"):
        return True
    ways = (
        ("forward", "in_place", "backward") if place == ("train", "") else ("forward", "in_place")
    )
    return place in PEER_WORKS and direction in ways and provider in TARGET_PEERS


def select(
    device: str, cases: Sequence[str] | None = None, variants: Sequence[str] | None = None
) -> list[Work]:
    """The default plan, or of it these cases; with variants, each case in each of them."""
    if variants is not None:
        names = cases or ["cpu" if device == "cpu" else "train"]
        return [Work(CASES[name], variant) for name in names for variant in variants]
    plan = [work for work in default_plan(device) if cases is None or work.case.name in cases]
    extra = [name for name in cases or () if all(name != work.case.name for work in plan)]
    return plan + [Work(CASES[name]) for name in extra]
