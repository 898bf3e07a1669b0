"""Per-sample Fisher information of every site from one backward pass.

For a linear map with inputs a [B, T, in] and output gradients g [B, T, out] the gradient of sample b is g_b^T a_b. One
backward pass of the *sum* of the per-sample losses yields all g, so the squares are formed weight by weight as the
gradients come by (each site knows its own backward pass), and no per-sample gradient outlives its own weight.

Source: CrossEarth-Gate, arXiv:2511.20302, equation of the empirical diagonal Fisher.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cegate import ops
from cegate.errors import TrainingError
from cegate.parts.part import Tap, Unpack
from cegate.parts.toolbox import Toolbox


class LabelledBatch(Protocol):
    """What scoring needs of a batch."""

    image: Tensor  # [B, C, H, W] float32, normalised
    label: Tensor  # [B, H, W] int64, 255 ignored


class Segmenting(Protocol):
    """What scoring needs of a model."""

    def loss(self, images: Tensor, labels: Tensor) -> Tensor: ...
    def nll(self, images: Tensor, labels: Tensor) -> Tensor: ...
    def train(self, mode: bool = True) -> nn.Module: ...


class SquaredGradients:
    """Tap that adds up squared per-sample gradients, as one number per site or as a tensor per weight.

    ``diagonal`` keeps the elementwise Fisher diagonal, else only its sum over a site, and nothing of weight size.
    """

    def __init__(self, diagonal: bool, scale: float) -> None:
        self.diagonal = diagonal
        self.unscale = 1 / scale**2
        self.mass: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}

    def linear(self, site: str, unpack: Unpack, inputs: Tensor, grads: Tensor) -> None:
        if self.diagonal:
            for name, part in unpack(ops.sum_squared_gradients(inputs, grads)).items():
                self._add(self.weights, f"{site}.{name}", part)
        else:
            self._add(self.mass, site, ops.sum_squared_gradients(inputs, grads, reduce=True))

    def direct(self, site: str, name: str, grads: Tensor) -> None:
        squares = grads.square()
        if self.diagonal:
            self._add(self.weights, f"{site}.{name}", squares.sum(0))
        else:
            self._add(self.mass, site, squares.sum())

    def _add(self, totals: dict[str, Tensor], key: str, value: Tensor) -> None:
        value = value.mul(self.unscale)
        totals[key] = totals[key].add_(value) if key in totals else value

    def result(self, samples: int) -> dict[str, Tensor]:
        """Mean over the samples of all processes."""
        totals = self.weights if self.diagonal else self.mass
        samples = _over_processes(totals, samples)
        return {name: total / samples for name, total in totals.items()}


class SummedGradients:
    """Tap for ``estimator="batch"``: the gradient of the mean loss over all samples, squared at the end."""

    def __init__(self, diagonal: bool, scale: float) -> None:
        self.diagonal = diagonal
        self.unscale = 1 / scale
        self.sums: dict[str, Tensor] = {}
        self.site_of: dict[str, str] = {}

    def linear(self, site: str, unpack: Unpack, inputs: Tensor, grads: Tensor) -> None:
        wide = torch.promote_types(grads.dtype, torch.float32)
        total = grads.flatten(0, 1).to(wide).mT @ inputs.flatten(0, 1).to(wide)
        for name, part in unpack(total).items():
            self._add(site, name, part)

    def direct(self, site: str, name: str, grads: Tensor) -> None:
        self._add(site, name, grads.sum(0))

    def _add(self, site: str, name: str, value: Tensor) -> None:
        key = f"{site}.{name}"
        self.site_of[key] = site
        value = value.mul(self.unscale)
        self.sums[key] = self.sums[key].add_(value) if key in self.sums else value

    def result(self, samples: int) -> dict[str, Tensor]:
        """Square of the mean gradient over the samples of all processes."""
        samples = _over_processes(self.sums, samples)
        squares = {key: (total / samples).square() for key, total in self.sums.items()}
        if self.diagonal:
            return squares
        mass: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
        for key, value in squares.items():
            mass[self.site_of[key]] = mass[self.site_of[key]] + value.sum().cpu()
        return dict(mass)


class Folded:
    """Tap of passes in which each of B samples stands in several views, [views * B]: its gradient is the sum of
    theirs.

    Args:
        tap: hears of B samples.
        views: of each sample; the B first ones of all come first.
    """

    def __init__(self, tap: Tap, views: int) -> None:
        self.tap, self.views = tap, views

    def linear(self, site: str, unpack: Unpack, inputs: Tensor, grads: Tensor) -> None:
        inputs, grads = (x.unflatten(0, (self.views, -1)).transpose(0, 1).flatten(1, 2) for x in (inputs, grads))
        self.tap.linear(site, unpack, inputs, grads)  # [B, views * T, ...]

    def direct(self, site: str, name: str, grads: Tensor) -> None:
        self.tap.direct(site, name, grads.unflatten(0, (self.views, -1)).sum(0))


def _fewest(samples: int, device: torch.device) -> int:
    """Of all processes: one that has nothing to add up would leave the others waiting."""
    if not (dist.is_available() and dist.is_initialized()):
        return samples
    count = torch.tensor(samples, device=device)
    dist.all_reduce(count, dist.ReduceOp.MIN)
    return int(count)


def _over_processes(totals: dict[str, Tensor], samples: int) -> int:
    """Add up sums in place, and samples, over all processes, so that every one chooses the same gates."""
    if not (dist.is_available() and dist.is_initialized()):
        return samples
    for name in sorted(totals):
        totals[name] = totals[name].contiguous()  # NCCL wants it so; a diagonal may be a transposed part
        dist.all_reduce(totals[name])
    count = torch.tensor(samples, device=next(iter(totals.values())).device)
    dist.all_reduce(count)
    return int(count)


def measure_fisher(
    model: Segmenting,
    toolbox: Toolbox,
    batches: Iterable[LabelledBatch],
    *,
    diagonal: bool = False,
    estimator: Literal["per_sample", "batch"] = "per_sample",
    loss: Literal["task", "nll"] | Callable[[LabelledBatch], Tensor] = "task",
    views: int = 1,
    beside: Iterable[nn.Module] = (),
    loss_scale: float = 1.0,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, float] | dict[str, Tensor]:
    """Empirical Fisher of every site, all sites on.

    Training finds gradients, modes, plan and random state as it left them.

    Args:
        model: gives the loss of each sample alone, [B].
        toolbox: the sites, all of which are scored.
        batches: the probe; its samples are counted as M. The result does not depend on how they are batched.
        diagonal: return weight name -> elementwise diagonal instead of site -> sum.
        estimator: ``per_sample`` squares every sample's gradient (the Fisher), ``batch`` the mean gradient.
        loss: ``task`` takes the training loss as -log p, ``nll`` the mean pixel cross entropy; or a function of a batch
            that gives -log p of each sample, [B].
        views: how often each sample is in the one pass that such a function makes, see :class:`Folded`.
        beside: further modules that it runs; they are found as they were, too.
        loss_scale: factor on the loss during backward, divided out again; for float16.
        precision: makes the autocast context of a forward pass; backward passes run outside of it, as in training.

    Returns:
        Site -> unnormalised score >= 0 in (kind, layer) order: mean over samples of the squared gradient of the
        per-sample loss, summed over the site's weights. With ``diagonal``: weight name (``spatial.0.down_q``) -> it.

    Raises:
        TrainingError: the probe is empty, here or in another process, or a loss is not finite.
    """
    tap = (SquaredGradients if estimator == "per_sample" else SummedGradients)(diagonal, loss_scale)
    measure = loss if callable(loss) else _of_labels(model.loss if loss == "task" else model.nll)
    devices = [p.device for p in toolbox.parameters() if p.is_cuda][:1]
    samples = 0
    heard = tap if views == 1 else Folded(tap, views)
    found = nn.ModuleList([model, *beside])
    with _as_found(found), torch.random.fork_rng(devices), toolbox.tapped(heard), torch.enable_grad():
        for batch in batches:
            with precision():
                losses = measure(batch)
            if not torch.isfinite(losses).all():
                raise TrainingError(f"the Fisher probe has losses {losses.tolist()}; look for NaN in data or weights")
            (losses.sum() * loss_scale).backward()
            samples += len(losses)
    if not _fewest(samples, next(toolbox.parameters()).device):
        raise TrainingError("the Fisher probe is empty, of one process at least; gate.samples must be at least 1")
    result = tap.result(samples)
    # a site behind the last layer that the head sees never runs: its gradient is zero
    if diagonal:
        weights = {f"{site}.{name}": p for site in toolbox.sites for name, p in toolbox.parameters_of(site).items()}
        return {name: result.get(name, torch.zeros_like(p)) for name, p in weights.items()}
    return _finite({site: result.get(site, torch.zeros(())) for site in toolbox.sites})


def _of_labels(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[LabelledBatch], Tensor]:
    return lambda batch: loss(batch.image, batch.label)


def _finite(mass: Mapping[str, Tensor]) -> dict[str, float]:
    values = torch.stack([value.double().cpu().reshape(()) for value in mass.values()]).tolist()
    for site, value in zip(mass, values, strict=True):
        if not math.isfinite(value):
            raise TrainingError(f"the Fisher score of {site} is {value}; lower train.lr or use run.precision=fp32")
    return dict(zip(mass, values, strict=True))


class _as_found:
    """Evaluation mode and no gradients of the model's weights inside; modes and flags as found afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.modes = [(module, module.training) for module in self.model.modules()]
        self.flags = [(p, p.requires_grad) for p in self.model.parameters()]
        self.model.eval()
        for parameter, _ in self.flags:
            parameter.requires_grad_(False)

    def __exit__(self, *exc: object) -> None:
        for module, mode in self.modes:
            module.training = mode
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)
