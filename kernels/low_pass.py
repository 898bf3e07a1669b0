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

from ._support import (
    HAS_TRITON,
    accumulation_dtype,
    define,
    differentiable,
    pad,
    pick_backend,
    refuse_second_derivatives,
    transforms,
    without_autocast,
)

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
    check_grid(x, grid, cutoff, band)
    height, width = grid
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


# the caches are never emptied: a captured graph holds the addresses of their tensors, and a model sees few grids
@functools.cache
def _axis(
    n: int, highest: int, halved: int | None, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Basis [K, n], weights [K] (one half at frequency ``halved``, else 1) and frequencies [K] of one axis."""
    with torch.inference_mode(False):  # the cache outlives the mode that filled it
        rows, frequencies = _axis_basis(n, highest)
        weights = [0.5 if k == halved and 2 * k != n else 1.0 for k in frequencies]
        as_tensor = functools.partial(torch.tensor, dtype=dtype, device=device)
        return as_tensor(rows).reshape(-1, n), as_tensor(weights), as_tensor(frequencies)


@functools.cache
def box_filter(grid: tuple[int, int], c: int, band: str, dtype: torch.dtype, device: torch.device) -> GridFilter:
    """The filter with the sharp edge, c frequency bins from the centre.

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
    key = (accumulation_dtype(x.dtype), x.device)
    if isinstance(cutoff, Tensor):
        return smooth_filter(grid, cutoff, tau, *key)
    return box_filter(grid, box_half_width(grid, cutoff), band, *key)


class Edge(NamedTuple):
    """What a filter is made from, as the operators take it: their last arguments but the backend."""

    height: int
    width: int
    cutoff: float
    learned: Tensor | None
    """In place of ``cutoff``, the smooth edge."""
    band: str
    tau: float

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W)."""
        return self.height, self.width

    def filter(self, x: Tensor) -> GridFilter:
        """For tokens like x."""
        return make_filter(x, self.grid, self.cutoff if self.learned is None else self.learned, self.band, self.tau)


EDGE = "SymInt height, SymInt width, float cutoff, Tensor? learned, str band, float tau"


def as_edge(grid: tuple[int, int], cutoff: float | Tensor, band: str, tau: float) -> Edge:
    """The edge that the arguments of the public functions ask for."""
    number, learned = (0.0, cutoff) if isinstance(cutoff, Tensor) else (float(cutoff), None)
    return Edge(*grid, number, learned, band, float(tau))


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


def cutoff_gradients(x: Tensor, dy: Tensor, edge: Edge, kept: GridFilter) -> Tensor:
    """[B]: gradients of the learned cutoff, for x [B, H*W, C] that was filtered and the gradient dy of the result."""
    energy = (grid_spectrum(x, edge.grid, kept) * grid_spectrum(dy, edge.grid, kept)).sum(3)  # [B, K, L]
    rows, columns = kept.row_weights, kept.column_weights
    slope = (energy @ columns) @ (rows * (1 - rows)) + (energy.mT @ rows) @ (columns * (1 - columns))
    return slope * (min(edge.grid) / (2 * edge.tau))


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


def _run(x: Tensor, *rest) -> Tensor:
    *edge, backend = rest
    edge = Edge(*edge)
    with torch.no_grad(), without_autocast(x):  # sums of a whole grid: never in half precision
        kept = edge.filter(x)
        if backend == "triton":
            return _low_pass_triton(x, edge.grid, kept)
        return apply_filter(x, edge.grid, kept).to(x.dtype)


def _run_cutoff(x: Tensor, dy: Tensor, *edge) -> Tensor:
    edge = Edge(*edge)
    with torch.no_grad(), without_autocast(x):
        return cutoff_gradients(x, dy, edge, edge.filter(x)).sum(0).to(edge.learned.dtype).view(edge.learned.shape)


def _setup(ctx, inputs, output) -> None:
    x, *ctx.edge, ctx.backend = inputs
    learned = ctx.edge[3]
    ctx.edge[3] = None  # tensors are kept by autograd alone
    ctx.save_for_backward(None if learned is None else x, learned)


def _backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Self-adjoint: the backward of x is the filter itself."""
    x, learned = ctx.saved_tensors
    edge = [*ctx.edge[:3], learned, *ctx.edge[4:]]
    dx = _low_pass(dy, *edge, ctx.backend) if ctx.needs_input_grad[0] else None
    dcutoff = None
    if ctx.needs_input_grad[4]:
        refuse_second_derivatives("low_pass")
        dcutoff = _low_pass_cutoff(x, dy, *edge)
    return dx, None, None, None, dcutoff, None, None, None


define(f"fused_low_pass(Tensor x, {EDGE}, str backend) -> Tensor", _run, lambda x, *rest: x.new_empty(x.shape))
_low_pass = differentiable("fused_low_pass", _run, _setup, _backward)
_low_pass_cutoff = define(
    f"fused_low_pass_cutoff(Tensor x, Tensor dy, {EDGE}) -> Tensor",
    _run_cutoff,
    lambda x, dy, height, width, cutoff, learned, *rest: torch.empty_like(learned),
)


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
    check_grid(x, grid, cutoff, band)
    chosen = pick_backend("low_pass", backend, limits=grid_limits(grid), x=x)
    edge = as_edge(grid, cutoff, band, tau)
    if transforms():
        return apply_filter(x, edge.grid, edge.filter(x)).to(x.dtype)
    return _low_pass(x, *edge, chosen if x.numel() else "torch")


def grid_limits(grid: tuple[int, int]) -> list[str]:
    """Reasons why a grid does not fit the Triton kernels."""
    return [f"the grid {grid[0]} x {grid[1]} is larger than {MAX_SIDE} x {MAX_SIDE}"] if max(grid) > MAX_SIDE else []


def check_grid(x: Tensor, grid: tuple[int, int], cutoff: float | Tensor, band: str, prefix: int = 0) -> None:
    """Raise a ValueError that names every argument which does not fit the others."""
    height, width = grid
    tokens, problems = prefix + height * width, []
    if prefix < 0:
        problems.append(f"prefix={prefix} is negative")
    elif x.ndim != 3 or x.shape[1] != tokens:
        needs = f"a {height} x {width} grid" + (f" behind {prefix} tokens" if prefix else "")
        problems.append(f"x has shape {tuple(x.shape)}, {needs} needs [B, {tokens}, C]")
    if not isinstance(cutoff, Tensor) and not 0 <= cutoff <= 1:
        problems.append(f"cutoff={cutoff} is outside 0..1")
    if band not in BANDS:
        problems.append(f"band={band!r} is unknown, use one of {', '.join(BANDS)}")
    if problems:
        raise ValueError(f"low_pass: {'; '.join(problems)}")
