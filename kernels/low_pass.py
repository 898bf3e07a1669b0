"""The box low-pass of Earth-Adapter on a token grid, as a few narrow projections in place of an FFT.

The band holds a few frequencies of each axis. In the orthonormal real basis ``1, cos, sin, cos, sin, ...`` of an axis
the filter is diagonal (``weights``), but for one 2 x 2 block where the outermost frequencies of both axes meet: the
official band ``-c .. c-1`` keeps only one of the pair ``-c, c``, so its signal is complex there, and the real part
couples the four.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._support import HAS_TRITON, accumulation_dtype, in_dtype, pad, pick_backend

BANDS = ("official", "symmetric")
MAX_SIDE = 128


class GridFilter(NamedTuple):
    """A separable low-pass of an H x W grid: project on both axes, weigh, expand again."""

    rows: Tensor  # [K, H] orthonormal
    columns: Tensor  # [L, W] orthonormal
    row_weights: Tensor  # [K]
    column_weights: Tensor  # [L]
    even: Tensor  # [H, H] = rows^T diag(row_weights) rows
    odd: Tensor  # [H, H] imaginary part of the row filter; used only where coupled
    coupled: bool  # the last two frequencies of both axes form the complex corner


def box_half_width(grid: tuple[int, int], cutoff: float) -> int:
    """Half width c of the box in frequency bins: ``int(min(H, W) * cutoff // 2)``."""
    return int(min(grid) * cutoff // 2)


def low_pass_fft(x: Tensor, grid: tuple[int, int], cutoff: float = 0.3, band: str = "official") -> Tensor:
    """The published definition, literally: FFT, shift, box, shift back, inverse FFT, real part. For comparison.

    Args:
        x: [B, H*W, C] float32 or float64.
    """
    height, width = _check(x, grid, cutoff, band)
    c = box_half_width(grid, cutoff)
    box = torch.zeros(height, width, 1, device=x.device, dtype=x.dtype)
    last = c + 1 if band == "symmetric" else c
    box[height // 2 - c : height // 2 + last, width // 2 - c : width // 2 + last] = 1
    spectrum = torch.fft.fft2(x.unflatten(1, (height, width)), dim=(1, 2), norm="ortho")
    kept = torch.fft.fftshift(spectrum, dim=(1, 2)) * box
    return torch.fft.ifft2(torch.fft.ifftshift(kept, dim=(1, 2)), dim=(1, 2), norm="ortho").real.flatten(1, 2)


def _axis_basis(n: int, highest: int) -> tuple[list[list[float]], list[int]]:
    """Orthonormal real basis of the frequencies 0..highest on n points, and the frequency of each row."""
    if highest < 0:
        return [], []
    rows, frequencies = [[n**-0.5] * n], [0]
    for k in range(1, highest + 1):
        angles = [2 * math.pi * (k * i % n) / n for i in range(n)]
        scale = n**-0.5 if 2 * k == n else (2 / n) ** 0.5
        rows.append([scale * math.cos(angle) for angle in angles])
        if 2 * k != n:  # the sine of the Nyquist frequency is zero everywhere
            rows.append([scale * math.sin(angle) for angle in angles])
        frequencies += [k] * (len(rows) - len(frequencies))
    return rows, frequencies


@torch.compiler.assume_constant_result
def _axis(*key: object) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`_cached_axis`; the compiler takes the cached matrices as constants."""
    return _cached_axis(*key)


@functools.lru_cache(maxsize=256)
def _cached_axis(
    n: int, highest: int, halved: int | None, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Basis [K, n], weights [K] (one half at frequency ``halved``, else 1) and frequencies [K] of one axis."""
    with torch.inference_mode(False):  # the cache outlives the mode that filled it
        rows, frequencies = _axis_basis(n, highest)
        weights = [0.5 if k == halved and 2 * k != n else 1.0 for k in frequencies]
        as_tensor = functools.partial(torch.tensor, dtype=dtype, device=device)
        return as_tensor(rows).reshape(-1, n), as_tensor(weights), as_tensor(frequencies)


@torch.compiler.assume_constant_result
def box_filter(*key: object) -> tuple:
    """:func:`_box_filter`; the compiler takes the cached matrices as constants."""
    return tuple(_box_filter(*key))


@functools.lru_cache(maxsize=256)
def _box_filter(grid: tuple[int, int], c: int, band: str, dtype: torch.dtype, device: torch.device) -> GridFilter:
    """The filter with the sharp edge, c frequency bins from the centre; cached.

    Made in float64 on the CPU, which neither autocast nor TF32 touches: the cache outlives the mode that filled it.
    """
    official = band == "official"
    highest, halved = (c if c or not official else -1), (c if official else None)
    with torch.inference_mode(False), torch.no_grad():
        exact = (torch.float64, torch.device("cpu"))
        rows, row_weights, _ = _axis(grid[0], highest, halved, *exact)
        columns, column_weights, _ = _axis(grid[1], highest, halved, *exact)
        even, odd = (rows.mT * row_weights) @ rows, rows.new_zeros(0, 0)
        coupled = official and 0 < 2 * c < min(grid)
        if coupled:
            odd = (torch.outer(rows[-2], rows[-1]) - torch.outer(rows[-1], rows[-2])) / 2
        parts = [part.to(device, dtype) for part in (rows, columns, row_weights, column_weights, even, odd)]
    return GridFilter(*parts, coupled)


def smooth_filter(
    grid: tuple[int, int], cutoff: Tensor, tau: float, dtype: torch.dtype, device: torch.device
) -> GridFilter:
    """The filter with the edge ``sigmoid((c - |k|) / tau)`` on each axis, c = min(H, W) * cutoff / 2."""
    c = min(grid) * cutoff.to(device, dtype) / 2
    rows, _, row_frequencies = _axis(grid[0], grid[0] // 2, None, dtype, device)
    columns, _, column_frequencies = _axis(grid[1], grid[1] // 2, None, dtype, device)
    row_weights, column_weights = (torch.sigmoid((c - k) / tau) for k in (row_frequencies, column_frequencies))
    with torch.no_grad():
        even = (rows.mT * row_weights) @ rows
    return GridFilter(rows, columns, row_weights, column_weights, even, rows.new_zeros(0, 0), False)


def make_filter(x: Tensor, grid: tuple[int, int], cutoff: float | Tensor, band: str, tau: float) -> GridFilter:
    """The filter that ``cutoff`` asks for: a number is the box, a tensor the smooth edge."""
    height, width = _check(x, grid, cutoff, band)
    key = (accumulation_dtype(x.dtype), x.device)
    if isinstance(cutoff, Tensor):
        return smooth_filter((height, width), cutoff, tau, *key)
    return GridFilter(*box_filter((height, width), box_half_width(grid, cutoff), band, *key))


def grid_spectrum(x: Tensor, grid: tuple[int, int], kept: GridFilter) -> Tensor:
    """Coefficients [B, K, L, C] of x [B, H*W, C] in the kept frequencies of both axes."""
    height, width = grid
    batch, _, channels = x.shape
    by_row = kept.rows @ x.to(kept.rows.dtype).reshape(batch, height, width * channels)  # [B, K, W*C]
    return kept.columns @ by_row.view(batch, len(kept.rows), width, channels)


def apply_filter(x: Tensor, grid: tuple[int, int], kept: GridFilter) -> Tensor:
    """Low-pass of x [B, H*W, C], in the accumulation dtype of x."""
    width = grid[1]
    batch, _, channels = x.shape
    if not len(kept.rows):
        return torch.zeros(x.shape, dtype=kept.rows.dtype, device=x.device)
    spectrum = grid_spectrum(x, grid, kept)
    weighted = spectrum * (kept.row_weights[:, None, None] * kept.column_weights[:, None])
    if kept.coupled:
        cos_cos, cos_sin, sin_cos, sin_sin = spectrum[:, -2:, -2:].flatten(1, 2).unbind(1)
        real, mixed = (cos_cos - sin_sin) / 4, (cos_sin + sin_cos) / 4
        corner = torch.stack([real, mixed, mixed, -real], 1).unflatten(1, (2, 2))
        weighted[:, -2:, -2:] = corner
    by_row = kept.columns.mT @ weighted  # [B, K, W, C]
    return (kept.rows.mT @ by_row.view(batch, len(kept.rows), width * channels)).view(x.shape)


def weight_gradients(x: Tensor, dy: Tensor, grid: tuple[int, int], kept: GridFilter) -> tuple[Tensor, Tensor]:
    """Gradients of ``row_weights`` [K] and ``column_weights`` [L] of a filter without coupled corner."""
    energy = (grid_spectrum(x, grid, kept) * grid_spectrum(dy, grid, kept)).sum((0, 3))  # [K, L]
    return energy @ kept.column_weights, energy.mT @ kept.row_weights


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def filter_column(
        by_row_ptr, filtered_ptr, even_ptr, odd_ptr, weights_ptr, start, column, channel, channel_ok,
        height, kept, channels, COUPLED: tl.constexpr, HP: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """filtered[:, column] = weight * even @ by_row[:, column], plus the corner; both [H, kept, channels]."""
        i = tl.arange(0, HP)
        result = tl.zeros([HP, 16], tl.float32)
        for first in range(0, height, BH):  # in blocks: a whole [128, 128] operand would fill the registers
            j = first + tl.arange(0, BH)
            square = i[:, None] * height + j[None, :]
            square_ok = (i < height)[:, None] & (j < height)[None, :]
            stack = start + (j * kept)[:, None] * channels + channel[None, :]
            stack_ok = (j < height)[:, None] & channel_ok[None, :]
            even = tl.load(even_ptr + square, mask=square_ok, other=0.0)
            even *= tl.load(weights_ptr + column)
            signal = tl.load(by_row_ptr + stack + column * channels, mask=stack_ok, other=0.0)
            result = tl.dot(even, signal, result, input_precision=PRECISION)
            if COUPLED:  # noqa: SIM102 - the outer choice is made at compile time
                if column >= kept - 2:
                    odd = tl.load(odd_ptr + square, mask=square_ok, other=0.0) * (column - kept + 1.5)
                    partner = by_row_ptr + stack + (2 * kept - 3 - column) * channels
                    signal = tl.load(partner, mask=stack_ok, other=0.0)
                    result = tl.dot(odd, signal, result, input_precision=PRECISION)
        stack = start + (i * kept + column)[:, None] * channels + channel[None, :]
        stack_ok = (i < height)[:, None] & channel_ok[None, :]
        tl.store(filtered_ptr + stack, result, mask=stack_ok)

    @triton.jit
    def _low_pass_kernel(
        x_ptr, y_ptr, by_row_ptr, filtered_ptr, columns_ptr, weights_ptr, even_ptr, odd_ptr,
        height, width, kept, channels, x_batch_stride, x_token_stride,
        COUPLED: tl.constexpr, HP: tl.constexpr, WP: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """The whole filter of one image and 16 channels: along rows, across rows, back along rows."""
        image = tl.program_id(0).to(tl.int64)
        channel = tl.program_id(1) * 16 + tl.arange(0, 16)
        channel_ok = channel < channels
        j = tl.arange(0, WP)
        token_ok = (j < width)[:, None] & channel_ok[None, :]
        start = image * height * kept * channels
        for i in range(height):
            at = image * x_batch_stride + (i * width + j)[:, None] * x_token_stride + channel[None, :]
            row = tl.load(x_ptr + at, mask=token_ok, other=0.0).to(tl.float32)
            for first in range(0, kept, 16):
                l = first + tl.arange(0, 16)
                ok = (l < kept)[:, None]
                basis = tl.load(
                    columns_ptr + l[:, None] * width + j[None, :], mask=ok & (j < width)[None, :], other=0.0
                )
                stack = start + (i * kept + l)[:, None] * channels + channel[None, :]
                product = tl.dot(basis, row, input_precision=PRECISION)
                tl.store(by_row_ptr + stack, product, mask=ok & channel_ok[None, :])
        # a program reads back only what it wrote itself, in another thread layout
        tl.debug_barrier()
        for column in range(kept):
            filter_column(
                by_row_ptr, filtered_ptr, even_ptr, odd_ptr, weights_ptr, start, column, channel, channel_ok,
                height, kept, channels, COUPLED, HP, BH, PRECISION,
            )  # fmt: skip
        tl.debug_barrier()
        for i in range(height):
            row = tl.zeros([WP, 16], tl.float32)
            for first in range(0, kept, 16):
                l = first + tl.arange(0, 16)
                ok = (l < kept)[None, :] & (j < width)[:, None]
                basis = tl.load(columns_ptr + l[None, :] * width + j[:, None], mask=ok, other=0.0)
                stack = start + (i * kept + l)[:, None] * channels + channel[None, :]
                signal = tl.load(filtered_ptr + stack, mask=(l < kept)[:, None] & channel_ok[None, :], other=0.0)
                row = tl.dot(basis, signal, row, input_precision=PRECISION)
            at = (image * height * width + i * width + j)[:, None] * channels + channel[None, :]
            tl.store(y_ptr + at, row.to(y_ptr.dtype.element_ty), mask=token_ok)


def filter_precision(dtype: torch.dtype) -> str:
    """How float32 DFT products run: no tensor-core rounding may show in an output of this dtype."""
    return {torch.bfloat16: "tf32", torch.float16: "tf32x3"}.get(dtype, "ieee")


def _low_pass_triton(x: Tensor, grid: tuple[int, int], kept: GridFilter) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, _, channels = x.shape
    count = len(kept.columns)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    by_row, filtered = x.new_empty(2, batch, grid[0], count, channels, dtype=torch.float32)
    _low_pass_kernel[(batch, triton.cdiv(channels, 16))](
        x, y, by_row, filtered, kept.columns, kept.column_weights, kept.even, kept.odd,
        *grid, count, channels, x.stride(0), x.stride(1),
        COUPLED=kept.coupled, HP=pad(grid[0]), WP=pad(grid[1]), BH=min(pad(grid[0]), 32),
        PRECISION=filter_precision(x.dtype), num_warps=4 if max(grid) <= 64 else 8, num_stages=2,
    )  # fmt: skip
    return y


def _run_filter(x: Tensor, kept: GridFilter, grid: tuple[int, int], backend: str) -> Tensor:
    if backend == "triton":
        return _low_pass_triton(x, grid, kept)
    return in_dtype(apply_filter(x, grid, kept), x.dtype)


class _LowPass(torch.autograd.Function):
    """Self-adjoint: the backward of x is the filter itself."""

    @staticmethod
    def forward(x, row_weights, column_weights, kept, grid, backend):
        return _run_filter(x, kept, grid, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, _, ctx.kept, ctx.grid, ctx.backend = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dx = drow = dcolumn = None
        if ctx.needs_input_grad[0]:
            dx = _run_filter(dy, ctx.kept, ctx.grid, ctx.backend)
        if x is not None:
            drow, dcolumn = weight_gradients(x, dy, ctx.grid, ctx.kept)
        return dx, drow, dcolumn, None, None, None


def low_pass(
    x: Tensor,
    grid: tuple[int, int],
    cutoff: float | Tensor = 0.3,
    band: str = "official",
    *,
    tau: float = 0.5,
    backend: str = "auto",
) -> Tensor:
    """Keep the low spatial frequencies of a token grid, channel by channel.

    Args:
        x: [B, H*W, C], tokens row by row; float32, bfloat16, float16 (float64 in PyTorch only); any strides.
        grid: (H, W).
        cutoff: share of the band, 0..1; the box keeps -c..c-1 of both axes, c = int(min(H, W) * cutoff // 2).
            A scalar tensor is learnable: the edge is then sigmoid((c - |k|) / tau) with c = min(H, W) * cutoff / 2.
        band: "official" (-c..c-1; real part of a complex signal) or "symmetric" (-c..c); a tensor cutoff ignores it.
        tau: width of the learnable edge in frequency bins, > 0.
        backend: "auto", "torch" or "triton".

    Returns:
        [B, H*W, C] in the dtype of x; zeros where the band is empty (c = 0, official).

    Raises:
        ValueError: grid, cutoff or band do not fit.

    Source: Earth-Adapter, arXiv:2504.06220.
    """
    chosen = pick_backend("low_pass", backend, limits=grid_limits(grid), x=x)
    with torch.autocast(x.device.type, enabled=False):  # sums of a whole grid: never in half precision
        kept = make_filter(x, grid, cutoff, band, tau)
        return _LowPass.apply(x, *learnable_weights(kept, cutoff), kept, tuple(grid), chosen if x.numel() else "torch")


def learnable_weights(kept: GridFilter, cutoff: float | Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The filter's weights where they may want a gradient."""
    return (kept.row_weights, kept.column_weights) if isinstance(cutoff, Tensor) else (None, None)


def grid_limits(grid: tuple[int, int]) -> list[str]:
    """Reasons why a grid does not fit the Triton kernels."""
    return [f"the grid {grid[0]} x {grid[1]} is larger than {MAX_SIDE} x {MAX_SIDE}"] if max(grid) > MAX_SIDE else []


def _check(x: Tensor, grid: tuple[int, int], cutoff: float | Tensor, band: str) -> tuple[int, int]:
    height, width = grid
    problems = []
    if x.ndim != 3 or x.shape[1] != height * width:
        problems.append(f"x has shape {tuple(x.shape)}, a {height} x {width} grid needs [B, {height * width}, C]")
    if not isinstance(cutoff, Tensor) and not 0 <= cutoff <= 1:
        problems.append(f"cutoff={cutoff} is outside 0..1")
    if band not in BANDS:
        problems.append(f"band={band!r} is unknown, use one of {', '.join(BANDS)}")
    if problems:
        raise ValueError(f"low_pass: {'; '.join(problems)}")
    return height, width
