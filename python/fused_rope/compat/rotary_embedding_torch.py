"""Drop-ins for rotary-embedding-torch (rotary_embedding_torch/rotary_embedding_torch.py).

    from fused_rope.compat.rotary_embedding_torch import RotaryEmbedding, apply_rotary_emb

The arguments, numbers and state dict are the same. Differences: positions are float32 for every
dtype of t (bfloat16 cannot represent 257), casts of the module do not round frequencies that are
not learned, `RotaryEmbedding.apply_rotary_emb` always exists, and `seq_dim` may be nonnegative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .. import functional
from ..frequencies import _series
from ..types import Layout

__all__ = [
    "RotaryEmbedding",
    "apply_learned_rotations",
    "apply_rotary_emb",
    "broadcat",
    "rotate_half",
]

_HALF = (torch.float16, torch.bfloat16)


def apply_rotary_emb(
    freqs: Tensor,
    t: Tensor,
    start_index: int = 0,
    scale: float | Tensor = 1.0,
    seq_dim: int = -2,
    freqs_seq_dim: int | None = None,
) -> Tensor:
    """Rotates pairs of adjacent elements of t by angles that broadcast against it.

    Args:
        freqs: angles [..., R], each twice in succession.
        t: [..., D], any number of dimensions; any float dtype.
        start_index: the first rotated element.
        scale: factor of cosines and sines, a number or a tensor that broadcasts as freqs does.
        seq_dim: the dimension S of t.
        freqs_seq_dim: the dimension of the positions in freqs, of which the last S are used. None
            is 0 if freqs is 2-D or t is 3-D; otherwise all positions are used.

    Returns:
        A contiguous tensor of t's shape and dtype; differentiable in t, freqs and scale.

    Raises:
        ValueError: shapes do not match.
        TypeError: an unsupported dtype.

    Example:
        >>> freqs = RotaryEmbedding(16, freqs_for="pixel").get_axial_freqs(8, 9)
        >>> t = apply_rotary_emb(freqs, torch.randn(2, 4, 8, 9, 64))
    """
    if t.is_nested:
        raise functional.nested_error("apply_rotary_emb")
    if t.dim() < 2:
        raise ValueError(f"apply_rotary_emb: expected t of [..., S, D], got {list(t.shape)}")
    if freqs_seq_dim is None and (freqs.dim() == 2 or t.dim() == 3):
        freqs_seq_dim = 0
    if freqs_seq_dim is not None:
        first = max(freqs.shape[freqs_seq_dim] - t.shape[seq_dim], 0)
        freqs = freqs.narrow(freqs_seq_dim, first, freqs.shape[freqs_seq_dim] - first)
    cos, sin = freqs.cos(), freqs.sin()
    if isinstance(scale, Tensor) or scale != 1.0:
        cos, sin = cos * scale, sin * scale
    return _rotate_broadcast(t, cos, sin, start_index)


def apply_learned_rotations(
    rotations: Tensor, t: Tensor, start_index: int = 0, freq_ranges: Tensor | None = None
) -> Tensor:
    """`apply_rotary_emb` with one angle [..., R/2] per pair.

    Args:
        rotations: angles [..., R/2]; with freq_ranges [..., r], each multiplied by all of those.
        t, start_index: as in `apply_rotary_emb`.
        freq_ranges: [f], with r*f = R/2.

    Returns:
        A contiguous tensor of t's shape and dtype.

    Raises:
        ValueError: shapes do not match. TypeError: an unsupported dtype.

    Example:
        >>> rotations = torch.randn(9, 8, requires_grad=True)
        >>> t = apply_learned_rotations(rotations, torch.randn(2, 4, 9, 64))
    """
    if freq_ranges is not None:
        rotations = (rotations[..., None] * freq_ranges).flatten(-2)
    return apply_rotary_emb(rotations.repeat_interleave(2, -1), t, start_index=start_index)


def rotate_half(x: Tensor) -> Tensor:
    """x [..., D] with (-x[2j + 1], x[2j]) for each pair (x[2j], x[2j + 1]).

    Example:
        >>> rotate_half(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor([-2.,  1., -4.,  3.])
    """
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def broadcat(tensors: Sequence[Tensor], dim: int = -1) -> Tensor:
    """Broadcasts the tensors against each other and concatenates them along `dim`.

    Example:
        >>> broadcat((torch.rand(4, 1, 8), torch.rand(1, 5, 8))).shape
        torch.Size([4, 5, 16])
    """
    return torch.cat(torch.broadcast_tensors(*tensors), dim)


class RotaryEmbedding(torch.nn.Module):
    """Computes angles and rotates pairs of adjacent elements of tensors with any dimensions.

    Args:
        dim: R.
        custom_freqs: frequencies [R/2] instead of those of freqs_for.
        freqs_for: "lang" for the geometric series, "pixel" for pi times a linear one up to
            max_freq / 2, "constant" for num_freqs ones.
        theta, max_freq, num_freqs: parameters of these.
        learned_freq: whether the frequencies are trained.
        use_xpos: scale queries up and keys down with the position (arXiv:2212.10554).
        xpos_scale_base: XPos multiplies its scale once per this many tokens.
        interpolate_factor: positions are divided by it.
        theta_rescale_factor: NTK-aware rescaling of theta.
        seq_before_head_dim: tensors are [B, S, H, D], not [B, H, S, D].
        cache_if_possible, cache_max_seq_len: no effect: nothing is cached.

    Attributes:
        freqs: the frequencies, a parameter. Casts round learned ones, as they do any weight. They
            never round others below float32: a cast to float16 or bfloat16 keeps their dtype, and
            from a half-precision checkpoint they load as the float32 numbers before its rounding.

    Raises:
        ValueError: interpolate_factor is below 1, or freqs_for is unknown.

    Example:
        >>> rotary = RotaryEmbedding(32)
        >>> q = rotary.rotate_queries_or_keys(torch.randn(2, 4, 9, 64))
    """

    apply_rotary_emb = staticmethod(apply_rotary_emb)
    __prepare_scriptable__ = functional.refuse_scripting

    def __init__(
        self,
        dim: int,
        custom_freqs: Tensor | None = None,
        freqs_for: Literal["lang", "pixel", "constant"] = "lang",
        theta: float = 10000,
        max_freq: float = 10,
        num_freqs: int = 1,
        learned_freq: bool = False,
        use_xpos: bool = False,
        xpos_scale_base: float = 512,
        interpolate_factor: float = 1.0,
        theta_rescale_factor: float = 1.0,
        seq_before_head_dim: bool = False,
        cache_if_possible: bool = True,
        cache_max_seq_len: int = 8192,
    ) -> None:
        super().__init__()
        if interpolate_factor < 1.0:
            raise ValueError(
                f"RotaryEmbedding: expected interpolate_factor >= 1, got {interpolate_factor}"
            )
        # Python numbers, which casts, devices and tracers do not change; None if custom_freqs is a
        # meta or fake tensor without values.
        self._initial: tuple[float, ...] | None
        # A parameter that is made under inference mode cannot be trained later.
        with torch.inference_mode(False):
            if custom_freqs is not None:
                freqs = custom_freqs.clone() if custom_freqs.is_inference() else custom_freqs
                readable = _is_plain(freqs) and not freqs.is_meta
                self._initial = tuple(freqs.tolist()) if readable else None
            else:
                if theta_rescale_factor != 1.0:
                    theta = theta * theta_rescale_factor ** (dim / (dim - 2))
                self._initial = _frequencies(freqs_for, dim, theta, max_freq, num_freqs)
                freqs = torch.tensor(self._initial, dtype=torch.float32)
            self.freqs = torch.nn.Parameter(freqs, requires_grad=learned_freq)
        self.dim = dim
        self.freqs_for = freqs_for
        self.learned_freq = learned_freq
        self.interpolate_factor = interpolate_factor
        self.seq_before_head_dim = seq_before_head_dim
        self.default_seq_dim = -3 if seq_before_head_dim else -2
        self.cache_if_possible = cache_if_possible
        self.cache_max_seq_len = cache_max_seq_len
        self.use_xpos = use_xpos
        if use_xpos:
            self.scale_base = xpos_scale_base

    @property
    def device(self) -> torch.device:
        """Where the frequencies are."""
        return self.freqs.device

    @property
    def scale(self) -> Tensor:
        """The base of XPos' factors, float32 [R/2]."""
        element = torch.arange(0, self.dim, 2, device=self.device, dtype=torch.float32)
        return (element + 0.4 * self.dim) / (1.4 * self.dim)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Writes the initial frequencies, for example after `to_empty`.

        Raises:
            RuntimeError: custom_freqs had no values when the module was made.
        """
        if self._initial is None:
            raise RuntimeError(
                "RotaryEmbedding.reset_parameters: expected custom_freqs with values, but they "
                "were on the meta device or fake when the module was made; copy into freqs instead"
            )
        self._write_initial(self.freqs)

    def forward(self, t: Tensor, seq_len: int | None = None, offset: int = 0) -> Tensor:
        """The angles [..., R] of positions t [...], each twice in succession.

        seq_len and offset have no effect; they index the original's cache.
        """
        # Angles of far positions need float32. A narrower parameter was cast outside of the
        # module's methods (FSDP's mixed precision, functional_call).
        freqs: Tensor = self.freqs
        if freqs.dtype in _HALF:
            freqs = freqs.float() if self.learned_freq else self._unrounded(freqs)
        return (t.to(freqs.dtype)[..., None] * freqs).repeat_interleave(2, -1)

    def get_seq_pos(
        self,
        seq_len: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        offset: int = 0,
    ) -> Tensor:
        """The interpolated positions [seq_len]; float32 by default."""
        device = self.device if device is None else device
        dtype = torch.float32 if dtype is None else dtype
        return (
            torch.arange(seq_len, device=device, dtype=dtype) + offset
        ) / self.interpolate_factor

    def get_scale(self, t: Tensor, seq_len: int | None = None, offset: int = 0) -> Tensor:
        """XPos' factors [S, R] of positions t [S], each twice in succession; 1 in the middle."""
        if not self.use_xpos:
            raise ValueError("RotaryEmbedding.get_scale: expected use_xpos=True, got False")
        scale = self.scale
        power = (t.to(scale.dtype) - t.shape[0] // 2) / self.scale_base
        return (scale ** power[:, None]).repeat_interleave(2, -1)

    def get_axial_freqs(
        self, *dims: int, offsets: tuple[float, ...] | Tensor | None = None
    ) -> Tensor:
        """The angles `[*dims, len(dims)*R]` of a grid, those of the axes concatenated.

        Args:
            dims: the grid's sizes.
            offsets: added to the positions of each axis.

        Raises:
            ValueError: offsets does not have one number for each axis.
        """
        if offsets is not None and len(offsets) != len(dims):
            raise ValueError(
                f"get_axial_freqs: expected an offset for each of the {len(dims)} axes, got "
                f"{len(offsets)}"
            )
        angles = []
        for axis, size in enumerate(dims):
            if self.freqs_for == "pixel":
                position = torch.linspace(-1, 1, steps=size, device=self.device)
            else:
                position = torch.arange(size, device=self.device)
            if offsets is not None:
                position = position + offsets[axis]
            angle = self.forward(position)
            angles.append(
                angle.view(*(-1 if i == axis else 1 for i in range(len(dims))), angle.shape[-1])
            )
        return torch.cat([a.expand(*dims, -1) for a in angles], -1)

    def rotate_queries_or_keys(
        self,
        t: Tensor,
        seq_dim: int | None = None,
        offset: int = 0,
        scale: float | Tensor | None = None,
    ) -> Tensor:
        """Rotates t [..., S, D], or with S in dimension seq_dim.

        Args:
            t: queries or keys.
            seq_dim: the dimension S; None for the module's.
            offset: the number of tokens before these.
            scale: factor of the result, a number or [S, R]; required with XPos.

        Raises:
            ValueError: shapes do not match, or use_xpos without scale.
        """
        if self.use_xpos and scale is None:
            raise ValueError(
                "rotate_queries_or_keys: expected scale with use_xpos=True, or a call of "
                "rotate_queries_and_keys"
            )
        dim = self._seq_dim(t, seq_dim)
        angle = self.forward(self.get_seq_pos(t.shape[dim], device=t.device, offset=offset))
        scale = 1.0 if scale is None else scale
        if isinstance(scale, Tensor) and scale.dim() == 2:
            scale = _align(scale, dim)
        return apply_rotary_emb(_align(angle, dim), t, scale=scale, seq_dim=dim)

    def rotate_queries_and_keys(
        self, q: Tensor, k: Tensor, seq_dim: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """q and k [..., S, D] rotated, and scaled by XPos.

        Raises:
            ValueError: use_xpos is False.
        """
        position = self.get_seq_pos(q.shape[self._seq_dim(q, seq_dim)], device=q.device)
        scale = self.get_scale(position)
        return (
            self.rotate_queries_or_keys(q, seq_dim, scale=scale),
            self.rotate_queries_or_keys(k, seq_dim, scale=scale**-1),
        )

    def rotate_queries_with_cached_keys(
        self, q: Tensor, k: Tensor, seq_dim: int | None = None, offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Rotates q, the last of k's tokens, and k.

        Args:
            q: [..., Sq, D].
            k: [..., Sk, D], with Sq <= Sk.
            seq_dim: the dimension of Sq and Sk; None for the module's.
            offset: of the queries only, as in the original.

        Raises:
            ValueError: there are more queries than keys.
        """
        q_len, k_len = (x.shape[self._seq_dim(x, seq_dim)] for x in (q, k))
        if q_len > k_len:
            raise ValueError(
                f"rotate_queries_with_cached_keys: expected Sq <= Sk, got {q_len} and {k_len}"
            )
        q_scale: float | Tensor = 1.0
        k_scale: float | Tensor = 1.0
        if self.use_xpos:
            position = self.get_seq_pos(k_len, device=q.device)
            q_scale = self.get_scale(position[k_len - q_len :])
            k_scale = self.get_scale(position) ** -1
        return (
            self.rotate_queries_or_keys(q, seq_dim, k_len - q_len + offset, q_scale),
            self.rotate_queries_or_keys(k, seq_dim, scale=k_scale),
        )

    def _write_initial(self, freqs: Tensor) -> Tensor:
        """Writes the initial frequencies to freqs, if they are known, and returns it."""
        if self._initial is None:
            return freqs
        return freqs.copy_(torch.tensor(self._initial, dtype=torch.float64, device="cpu"))

    def _unrounded(self, freqs: Tensor) -> Tensor:
        """freqs in at least float32; a rounding of an initial frequency becomes that frequency."""
        wide = torch.promote_types(freqs.dtype, torch.float32)
        if self._initial is None or freqs.shape != (len(self._initial),):
            return freqs.to(wide)
        host = torch.tensor(self._initial, dtype=torch.float64, device="cpu")
        initial = host.to(wide).to(freqs.device, non_blocking=True)
        single = initial.float()
        dtypes = (freqs.dtype,) if freqs.dtype in _HALF else (torch.float32, *_HALF)
        ours = torch.stack([freqs == single.to(dtype).to(freqs.dtype) for dtype in dtypes]).any(0)
        return torch.where(ours, initial, freqs.to(wide))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        """Casts and moves the module; see `freqs` for what casts do not change."""

        def apply(t: Tensor) -> Tensor:
            applied = fn(t)
            if t is not self.freqs or applied is t or not (_is_plain(t) and _is_plain(applied)):
                return applied
            if self.learned_freq and not t.is_meta:
                return applied
            if not self.learned_freq:
                applied = applied.to(torch.promote_types(applied.dtype, torch.float32))
            if t.is_meta and not applied.is_meta:
                return self._write_initial(applied)
            # Written for any dtype, since `to_empty` leaves memory uninitialized.
            return applied if applied.is_meta else applied.copy_(self._unrounded(t.to(applied)))

        # Under inference mode the parameter would become an inference tensor.
        with torch.inference_mode(False), torch.no_grad():
            super()._apply(apply, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        key = prefix + "freqs"
        freqs = state_dict.get(key)
        if not self.learned_freq and freqs is not None and _is_plain(freqs) and not freqs.is_meta:
            state_dict = {**state_dict, key: self._unrounded(freqs)}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _seq_dim(self, t: Tensor, seq_dim: int | None) -> int:
        """The sequence dimension, counted from the end."""
        dim = self.default_seq_dim if seq_dim is None else seq_dim
        if t.is_nested:
            raise functional.nested_error("RotaryEmbedding")
        if not -t.dim() <= dim < t.dim() - 1 or dim == -1:
            raise ValueError(
                f"RotaryEmbedding: expected a tensor with dimension seq_dim={dim} before its last, "
                f"got {list(t.shape)}"
            )
        return dim - t.dim() if dim >= 0 else dim


def _frequencies(
    freqs_for: str, dim: int, theta: float, max_freq: float, num_freqs: int
) -> tuple[float, ...]:
    """The frequencies as Python numbers, so modes, default devices and dtypes have no effect."""
    if freqs_for == "constant":
        return (1.0,) * num_freqs
    if dim % 2:
        raise ValueError(f"RotaryEmbedding: expected an even dim, got {dim}")
    if freqs_for == "lang":
        return tuple(_series(dim, theta))
    if freqs_for == "pixel":
        step = (max_freq / 2 - 1) / max(dim // 2 - 1, 1)
        return tuple((1 + j * step) * math.pi for j in range(dim // 2))
    raise ValueError(
        f"RotaryEmbedding: expected freqs_for lang, pixel or constant, got {freqs_for!r}"
    )


def _is_plain(t: Tensor) -> bool:
    """Whether t is no subclass: the values of a fake tensor or DTensor cannot be read."""
    return type(t) in (torch.Tensor, torch.nn.Parameter)


def _align(rows: Tensor, seq_dim: int) -> Tensor:
    """A view of rows [S, R] that broadcasts against tensors whose dimension seq_dim < 0 is S."""
    return rows[(slice(None), *(None,) * (-seq_dim - 2))]


def _rotate_broadcast(t: Tensor, cos: Tensor, sin: Tensor, rotary_offset: int) -> Tensor:
    """Rotates t [..., D] by tables [..., R], every number twice, which broadcast against t."""
    if cos.dim() > t.dim():
        raise ValueError(
            f"apply_rotary_emb: expected freqs of at most {t.dim()} dimensions, as t has, got "
            f"{cos.dim()}"
        )
    shape = t.shape
    if t.dim() > 4:
        # The dimensions of the tables become one sequence, the others the batch.
        rows = shape[-cos.dim() : -1]
        cos, sin = (table.expand(*rows, -1).flatten(0, -2) for table in (cos, sin))
        t = t.reshape(math.prod(shape[: -len(rows) - 1]), 1, math.prod(rows), shape[-1])
    cos, sin = (table[(None,) * (4 - table.dim())] for table in (cos, sin))
    x = t[(None,) * (4 - t.dim())]
    layout: Layout = "bhsd"
    if cos.shape[1] == 1:
        cos, sin = (table[:, 0].expand(-1, x.shape[2], -1) for table in (cos, sin))
    elif cos.shape[2] == 1:
        layout = "bshd"
        cos, sin = cos[:, :, 0], sin[:, :, 0]
    else:
        cos, sin = (table.transpose(1, 2) for table in (cos, sin))
    y = functional.rotate(
        x,
        cos,
        sin,
        layout=layout,
        table_layout="repeated",
        rotary_offset=rotary_offset,
        interleaved=True,
    )
    return y.contiguous().view(shape)
