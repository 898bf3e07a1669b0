"""The Mask2Former head (Cheng et al., CVPR 2022) on the features of a plain vision transformer.

Weights, their names and their initialisation are those of ``transformers``. What they compute is written for one frozen
backbone: a feature pyramid without padding, masks at full size for matched queries alone, one matching for the batch,
points that are label pixels; so a step takes less than half of the calls (benchmarks/bench_mask2former.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers.models.mask2former.configuration_mask2former import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerLoss,
    Mask2FormerPixelDecoder,
    Mask2FormerPreTrainedModel,
    Mask2FormerSinePositionEmbedding,
    Mask2FormerTransformerModule,
)

from cegate import ops
from cegate.config import IGNORE
from cegate.errors import ConfigError
from cegate.heads.head import FEATURES, Head
from cegate.losses import LEAST_SHARE, PixelLoss, at_least_float32, mean_over_valid
from cegate.resize import resize

GROUPS = 32
"""Channel groups of the pixel decoder's normalisation; the width is a multiple of it."""


class Mask2FormerHead(Head):
    """Queries that each predict a class and a mask; the paper's settings are the defaults.

    ``loss`` compares one mask per class present with the queries' masks, for every decoder layer: class cross entropy
    x 2 (no-object weight 0.1), mask cross entropy x 5, dice x 5, at random points. Where an ignored region lies:

    * Points are centres of label pixels, drawn uniformly from the valid pixels of the sample, three quarters of them
      by uncertainty. So an ignored pixel is in no cost, no loss and no normaliser, exactly as in pixel cross entropy.
      (The usual treatment makes ignored pixels background of every mask: it teaches each class to avoid them, and a
      gradient comes from pixels of which nothing is known.) Without ignored pixels it is the paper's loss, whose
      points may also lie between the centres.
    * Masks are normalised by the sample's own number of classes, not by that of the batch.
    * One call draws one number from torch's global CPU generator, whatever the batch; from it every sample seeds a
      generator of its own for its points.

    Args:
        channels: C of each of the four maps.
        classes: K.
        queries: number of queries.
        width: width of both decoders, a multiple of 32.
        encoder_layers: deformable attention layers of the pixel decoder.
        decoder_layers: predictions that are supervised: one from the bare queries and one after each of the
            ``decoder_layers - 1`` layers.
        points: points at which masks are compared.

    Raises:
        ConfigError: ``width`` is not a multiple of 32.
    """

    log_shares = True
    recordable = False  # classes are matched on the host

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        queries: int = 100,
        width: int = 256,
        encoder_layers: int = 6,
        decoder_layers: int = 10,
        points: int = 12544,
    ) -> None:
        super().__init__()
        if width <= 0 or width % GROUPS:
            raise ConfigError(f"width={width} of the mask2former head is not a positive multiple of {GROUPS}")
        config = Mask2FormerConfig(
            num_labels=classes,
            num_queries=queries,
            feature_size=width,
            mask_feature_size=width,
            hidden_dim=width,
            encoder_feedforward_dim=4 * width,
            dim_feedforward=8 * width,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers,
            train_num_points=points,
        )
        self.query_width = width
        self.decoder = _Decoder(config, channels)
        self.criterion = _PointLoss(config)

    def take_loss(self, loss: PixelLoss) -> None:
        """Weigh the classes in the cross entropy of the queries' classes; masks keep their own terms.

        Raises:
            ConfigError: another loss is asked for.
        """
        if loss.terms != ("ce",):
            raise ConfigError(
                f"train.loss.name={'+'.join(loss.terms)}: model.head=mask2former brings its own loss; leave it out "
                "(class_weights it takes), or use another head"
            )
        if loss.class_weights is not None:
            weights = self.criterion.empty_weight
            weights[:-1] = weights.new_tensor(loss.class_weights)

    def link_queries(self) -> None:
        """Take queries [queries, width] that come with the features as positions, and a linear map of them as contents
        (Rein); the head's own tables serve where none come."""
        transformer = self.decoder.transformer
        transformer.queries_embedder = _LinkedTable(transformer.queries_embedder, nn.Identity())
        transformer.queries_features = _LinkedTable(
            transformer.queries_features, nn.Linear(self.query_width, self.query_width)
        )

    def forward(self, features: Sequence[Tensor], size: tuple[int, int], queries: Tensor | None = None) -> Tensor:
        """Logarithm of each class's share of a pixel: softmax gives the shares back, argmax the prediction.

        The mass of a class is the sum over queries of class probability (without no-object) times mask probability, on
        masks upsampled to ``size``; its share is its mass over that of all classes.

        Args:
            features: four maps [B, C, h, w], shallow to deep.
            size: (H, W) of the result in pixels.
            queries: [queries, width] in place of the head's own, where it was linked.

        Returns:
            [B, K, H, W], float32 or float64; no less than log(1e-12).
        """
        found = self.decoder(features, queries)
        # sample by sample: every query at full size is the head's largest tensor
        pairs = zip(found.class_logits[-1], found.mask_logits(-1), strict=True)
        return torch.stack([_log_share(classes, masks, size) for classes, masks in pairs])

    def loss(
        self,
        features: Sequence[Tensor],
        labels: Tensor,
        weights: Tensor | None = None,
        queries: Tensor | None = None,
    ) -> Tensor:
        found = self.decoder(features, queries)
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
        losses = self.criterion(found, labels, seed)
        return losses if weights is None else losses * mean_over_valid(weights, labels)


class Predictions(NamedTuple):
    """Of L layers, the last one's are the result. A mask is the product of a query's embedding with every pixel's."""

    class_logits: Tensor
    """[L, B, Q, K + 1]."""
    embeddings: Tensor
    """[L, B, Q, width]."""
    pixels: Tensor
    """[B, width, 4h, 4w]."""

    def mask_logits(self, layer: int) -> Tensor:
        """[B, Q, 4h, 4w] of a layer."""
        return torch.einsum("bqc,bchw->bqhw", self.embeddings[layer], self.pixels)


class _Decoder(Mask2FormerPreTrainedModel):
    """Pixel decoder and transformer decoder: the library's modules hold the weights, and know how they are initialised.

    What they compute is the same, in fewer steps: no padding is masked, nothing is computed for a layer that all layers
    can share, attention maps are not kept, and only the masks that are asked for are made at full size.
    """

    def __init__(self, config: Mask2FormerConfig, channels: int) -> None:
        super().__init__(config)
        self.pixel_decoder = Mask2FormerPixelDecoder(config, feature_channels=[channels] * FEATURES)
        self.transformer = Mask2FormerTransformerModule(in_features=config.feature_size, config=config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
        # in a class of ours post_init passes over modules without weights of their own, such as deformable attention
        self.apply(self._init_weights)

    def forward(self, features: Sequence[Tensor], queries: Tensor | None = None) -> Predictions:
        # full precision as in the authors' code: half precision cannot hold the sampling positions
        with torch.autocast(features[0].device.type, enabled=False):
            finest, *maps = _pyramid([f.to(self.dtype) for f in features])
            maps.reverse()  # coarse to fine, as levels are counted
            sizes = tuple(tuple(m.shape[-2:]) for m in maps)
            places = _places(sizes, self.config.hidden_dim, finest.device, finest.dtype)
            levels, pixels = self._decode_pixels(maps, finest, places)
        hidden = self._decode_queries(levels, places, pixels, queries)
        decoder = self.transformer.decoder
        states = decoder.layernorm(hidden)
        return Predictions(self.class_predictor(states), decoder.mask_predictor.mask_embedder(states), pixels)

    def _decode_pixels(self, maps: Sequence[Tensor], finest: Tensor, places: _Places) -> tuple[list[Tensor], Tensor]:
        """Tokens [B, h w, width] of each level, and the embedding [B, width, 4h, 4w] of each pixel."""
        part = self.pixel_decoder
        projected = [project(m).flatten(2).mT for m, project in zip(maps, part.input_projections, strict=True)]
        x = torch.cat(projected, dim=1)  # [B, N, width]
        own = torch.cat([at + level for at, level in zip(places.positions, part.level_embed, strict=True)])
        for layer in part.encoder.layers:
            x = layer.self_attn_layer_norm(x + _attend_to_points(layer.self_attn, x, x + own, places))
            x = layer.final_layer_norm(x + layer.fc2(layer.activation_fn(layer.fc1(x))))
        levels = x.split([len(at) for at in places.positions], dim=1)
        finer = resize(levels[-1].mT.unflatten(2, places.sizes[-1]), finest.shape[-2:])
        return list(levels), part.mask_projection(part.layer_1(part.adapter_1(finest) + finer))

    def _decode_queries(
        self, levels: Sequence[Tensor], places: _Places, pixels: Tensor, queries: Tensor | None
    ) -> Tensor:
        """Queries [L, B, Q, width] as they come in and after each layer, before the last normalisation."""
        part = self.transformer
        values = [x + level for x, level in zip(levels, part.level_embed.weight, strict=True)]
        keys = [x + at for x, at in zip(values, places.positions, strict=True)]
        x, own = (_rows(table, queries) for table in (part.queries_features, part.queries_embedder))  # [Q, width]
        x = x.expand(len(pixels), -1, -1)
        # masks at a level's size are products with pixels of that size, as both are linear
        coarse = [resize(pixels.detach(), size).flatten(2) for size in places.sizes]
        hidden = [x]
        for index, layer in enumerate(part.decoder.layers):
            level = index % len(levels)
            seen = self._look_where(x, coarse[level])
            x = layer.cross_attn_layer_norm(
                x + _attend_across(layer.cross_attn, x + own, keys[level], values[level], seen)
            )
            x = layer.self_attn_layer_norm(x + _attend_to_each_other(layer.self_attn, x, own))
            x = layer.final_layer_norm(x + layer.fc2(layer.activation_fn(layer.fc1(x))))
            hidden.append(x)
        return torch.stack(hidden)

    def _look_where(self, x: Tensor, pixels: Tensor) -> Tensor:
        """Tokens [B, 1, Q, N] that queries [B, Q, width] look at: those of their mask, or all where it is empty."""
        decoder = self.transformer.decoder
        # detached, not no_grad: under that some versions of autocast keep converted weights without a gradient
        outside = decoder.mask_predictor.mask_embedder(decoder.layernorm(x.detach())) @ pixels < 0
        return (~outside | outside.all(-1, keepdim=True)).unsqueeze(1)


class _Places(NamedTuple):
    """Where the tokens of all levels lie: they depend on sizes alone."""

    sizes: tuple[tuple[int, int], ...]
    """(h, w) of each level."""
    positions: list[Tensor]
    """Sine embeddings [h w, width] of each level."""
    centres: Tensor
    """[N, 1, 1, 1, 2] x and y of the tokens of all levels, -1..1 across the image."""
    pixel: Tensor
    """[levels, 1, 2] width and height of a token of each level, in the same unit."""
    table: Tensor
    """`level_table` of the sizes."""


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # what inference keeps must serve training
@torch.no_grad()
def _places(sizes: tuple[tuple[int, int], ...], width: int, device: torch.device, dtype: torch.dtype) -> _Places:
    embed = Mask2FormerSinePositionEmbedding(width // 2, normalize=True)
    positions = [embed((1, width, *size), device, dtype)[0].flatten(1).T.contiguous() for size in sizes]
    centres = torch.cat([_centres(*size, device, dtype) for size in sizes])
    pixel = torch.tensor([[2 / w, 2 / h] for h, w in sizes], device=device, dtype=dtype)
    table = ops.level_table(sizes, device)
    return _Places(sizes, positions, centres[:, None, None, None], pixel[:, None], table)


def _centres(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """x and y [height width, 2] of the centres of pixels in reading order, -1..1 across the image."""
    y, x = (2 * ((torch.arange(n, device=device).to(dtype) + 0.5) / n) - 1 for n in (height, width))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)


def _attend_to_points(part: nn.Module, x: Tensor, queries: Tensor, places: _Places) -> Tensor:
    """Deformable attention (Zhu et al., ICLR 2021) of tokens [B, N, C] with queries [B, N, C] over all levels."""
    batch, tokens = x.shape[:2]
    heads, levels = part.n_heads, len(places.sizes)
    shape = batch, tokens, heads, levels, part.n_points
    offsets = part.sampling_offsets(queries).view(*shape, 2)
    at = torch.addcmul(places.centres, offsets, places.pixel)
    weights = part.attention_weights(queries).view(batch, tokens, heads, -1).softmax(-1).view(shape)
    values = part.value_proj(x).view(batch, tokens, heads, -1)
    backend = "auto" if ops.is_fused() else "torch"
    found = ops.deformable_attention(values, at, weights, places.sizes, table=places.table, backend=backend)
    return part.output_proj(found.flatten(2))


def _attend_across(part: nn.MultiheadAttention, queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """Attention of queries [B, Q, C] to the tokens [B, N, C] that they see [B, 1, Q, N]."""
    maps = zip((queries, keys, values), part.in_proj_weight.chunk(3), part.in_proj_bias.chunk(3), strict=True)
    return part.out_proj(_attention(*(F.linear(x, weight, bias) for x, weight, bias in maps), part.num_heads, seen))


def _attend_to_each_other(part: nn.Module, x: Tensor, own: Tensor) -> Tensor:
    """Attention among queries [B, Q, C] with position embeddings [Q, C]."""
    placed = x + own
    return part.out_proj(_attention(part.q_proj(placed), part.k_proj(placed), part.v_proj(x), part.num_heads))


def _attention(queries: Tensor, keys: Tensor, values: Tensor, heads: int, seen: Tensor | None = None) -> Tensor:
    """[B, Q, C]."""
    split = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (queries, keys, values))
    return F.scaled_dot_product_attention(*split, attn_mask=seen).transpose(1, 2).flatten(2)


class _LinkedTable(nn.Module):
    """A table of queries, and the map of those that come from outside."""

    def __init__(self, table: nn.Embedding, change: nn.Module) -> None:
        super().__init__()
        self.table, self.change = table, change


def _rows(table: nn.Embedding | _LinkedTable, queries: Tensor | None) -> Tensor:
    """Queries [Q, width] of a table, or what it makes of those from outside."""
    if isinstance(table, nn.Embedding):
        return table.weight
    if queries is None:
        return table.table.weight
    with torch.autocast(queries.device.type, enabled=False):  # as precise as the table
        return table.change(queries)


class _PointLoss(Mask2FormerLoss):
    """Mask2Former's loss of each sample at valid pixels; the library's class holds the settings and class weights."""

    def __init__(self, config: Mask2FormerConfig) -> None:
        weights = {"class": config.class_weight, "mask": config.mask_weight, "dice": config.dice_weight}
        super().__init__(config, weight_dict=weights)

    def forward(self, found: Predictions, labels: Tensor, seed: int) -> Tensor:
        """Sum of the weighted losses of all layers, sample by sample.

        The host waits for the device twice, whatever the batch: for the classes that are present, and for the costs.

        Args:
            found: predictions of L layers.
            labels: [B, H, W] int64, 255 ignored.
            seed: of the points.

        Returns:
            [B], float32 or float64; 0 with gradient 0 without a valid pixel.
        """
        class_logits = at_least_float32(found.class_logits)
        points = _Points(labels, self.num_labels, class_logits.dtype, seed)
        if not any(points.present):  # 0, and still part of the graph
            return class_logits[:0].sum((0, 2, 3)) + found.mask_logits(-1)[:, :0].sum((1, 2, 3))
        matched = self.match(class_logits, found, points)
        of_classes, of_masks = self.class_loss(class_logits, matched), self.mask_loss(found, matched, points)
        losses = self.weight_dict["class"] * of_classes + of_masks
        return losses.where((labels != IGNORE).flatten(1).any(1), 0)

    @torch.no_grad()
    def match(self, class_logits: Tensor, found: Predictions, points: _Points) -> _Matched:
        """Each layer's cheapest assignment of a sample's classes to its queries."""
        layers, batch, queries, _ = class_logits.shape
        counts = [len(classes) for classes in points.present]
        used = [sample for sample, count in enumerate(counts) if count]
        chosen = torch.stack([points.draw(sample, self.num_points) for sample in used])  # [S, P]
        corners, shares = _corners(points.at(chosen).flatten(0, 2), found.pixels.shape[-2:])
        per_sample = (x.split(self.num_points) for x in (corners, shares))
        classes = torch.tensor([*chain(*points.present)], device=chosen.device).split([counts[b] for b in used])
        likely = class_logits.softmax(-1)
        cost = torch.cat(
            [
                self.mask_cost(found.embeddings[:, sample], found.pixels[sample], *where, of_points == own[:, None])
                - self.weight_dict["class"] * likely[:, sample, :, own].flatten(0, 1)
                for sample, of_points, own, *where in zip(
                    used, points.labels[chosen], classes, *per_sample, strict=True
                )
            ],
            dim=1,
        )
        # what is not finite is matched last; the loss then says NaN
        worst = torch.finfo(torch.float32).max
        cost = cost.nan_to_num(nan=worst, posinf=worst, neginf=worst).cpu().numpy().reshape(layers, queries, -1)
        rows, truth, first = [], [], 0
        for sample in used:
            of_sample = cost[..., first : (first := first + counts[sample])]
            for layer in range(layers):
                query, entry = linear_sum_assignment(of_sample[layer])
                rows.append((layer * batch + sample) * queries + query)
                truth.append(np.array(points.present[sample])[entry])
        both = torch.from_numpy(np.stack([np.concatenate(rows), np.concatenate(truth)])).to(class_logits.device)
        return _Matched(*both, [layers * min(queries, count) for count in counts])

    def mask_cost(self, embeddings: Tensor, pixels: Tensor, corners: Tensor, shares: Tensor, truth: Tensor) -> Tensor:
        """Cost [L Q, n] of giving the masks of a sample's queries the truth [n, P].

        Args:
            embeddings: [L, Q, width].
            pixels: [width, h, w].
            corners, shares: [P, 4] pixels around each point, and the share of each.
            truth: [n, P] bool.
        """
        # all masks of a pixel side by side: a point reads four rows
        logits = at_least_float32(pixels.flatten(1).mT @ embeddings.flatten(0, 1).mT)  # [h w, L Q]
        with torch.autocast(logits.device.type, enabled=False):
            truth = F.pad(truth.to(logits.dtype), (0, 0, 0, 1), value=1)  # the last row sums over all points
            at_once = _AT_ONCE.get(logits.device.type, len(corners))
            inside = cross_entropy = 0
            for corner, share, true in zip(*(x.split(at_once) for x in (corners, shares, truth.mT)), strict=True):
                x = F.embedding_bag(corner, logits, per_sample_weights=share, mode="sum")  # [points, L Q]
                inside += true.mT @ x.sigmoid()
                cross_entropy += F.softplus(x).sum(0) - true[:, :-1].mT @ x
            dice = 1 - (2 * inside[:-1] + 1) / (inside[-1] + truth[:-1].sum(1, keepdim=True) + 1)
            return (self.weight_dict["mask"] / len(corners) * cross_entropy + self.weight_dict["dice"] * dice).mT

    def class_loss(self, class_logits: Tensor, matched: _Matched) -> Tensor:
        """Weighted cross entropy [B]: mean over the sample's queries in all layers, times their number."""
        targets = torch.full(class_logits.shape[:-1], self.num_labels, device=class_logits.device)  # [L, B, Q]
        targets.view(-1)[matched.rows] = matched.classes
        losses = F.cross_entropy(class_logits.flatten(0, 2), targets.flatten(), self.empty_weight, reduction="none")
        weights = self.empty_weight[targets]
        return len(targets) * losses.view(targets.shape).sum((0, 2)) / weights.sum((0, 2))

    def mask_loss(self, found: Predictions, matched: _Matched, points: _Points) -> Tensor:
        """Weighted cross entropy and dice [B] of the matched masks: mean over the sample's classes, sum over layers."""
        rows = found.embeddings.flatten(0, 2).index_select(0, matched.rows)
        pairs = zip(rows.split(matched.sizes), found.pixels.flatten(2).unbind(), strict=True)
        masks = at_least_float32(torch.cat([own @ pixels for own, pixels in pairs]))  # [R, h w]
        masks = masks.unflatten(1, found.pixels.shape[-2:]).unsqueeze(1)
        chosen = self.uncertain_points(masks.detach(), matched.sizes, points)  # [R, P]
        logits = _sample(masks, points.at(chosen))
        truth = (points.labels[chosen] == matched.classes[:, None]).to(logits.dtype)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)
        inside = logits.sigmoid()
        dice = 1 - (2 * (inside * truth).sum(1) + 1) / (inside.sum(1) + truth.sum(1) + 1)
        losses = self.weight_dict["mask"] * cross_entropy + self.weight_dict["dice"] * dice
        samples = zip(losses.split(matched.sizes), points.present, strict=True)
        return torch.stack([of_sample.sum() / max(len(classes), 1) for of_sample, classes in samples])

    @torch.no_grad()
    def uncertain_points(self, masks: Tensor, sizes: list[int], points: _Points) -> Tensor:
        """Draw more points than needed for each mask [R, 1, h, w], keep the least certain and add some at random."""
        several = int(self.num_points * self.oversample_ratio)
        kept = int(self.num_points * self.importance_sample_ratio)
        chosen = []
        for sample, own in enumerate(masks.split(sizes)):
            if len(own):
                candidates = points.draw(sample, len(own), several)
                uncertainty = self.calculate_uncertainty(_sample(own, points.at(candidates)))
                least_certain = uncertainty.topk(kept, dim=1, sorted=False).indices
                rest = points.draw(sample, len(own), self.num_points - kept)
                chosen.append(torch.cat([candidates.gather(1, least_certain), rest], dim=1))
        return torch.cat(chosen)


_AT_ONCE = {"cpu": 256}
"""Points whose logits fit a processor's cache; a GPU takes all at once."""


class _Matched(NamedTuple):
    """R pairs of a query's mask and a class, sample by sample."""

    rows: Tensor
    """[R] index of the mask among [L, B, Q]."""
    classes: Tensor
    """[R]."""
    sizes: list[int]
    """Pairs of each sample."""


class _Points:
    """The valid pixels of label maps [B, H, W] in reading order, and a source of random ones for each sample."""

    def __init__(self, labels: Tensor, classes: int, dtype: torch.dtype, seed: int) -> None:
        device, (batch, height, width) = labels.device, labels.shape
        known = F.pad(torch.arange(classes, device=device), (0, 1), value=IGNORE)[:, None]
        counts = (labels.flatten(1)[:, None] == known).sum(-1).tolist()  # [B, K + 1]
        if sum(map(sum, counts)) != labels.numel():  # places and labels would no longer agree
            raise IndexError(f"labels are 0 to {classes - 1}, or {IGNORE} where they are ignored; these hold others")
        self.present = [[k for k, count in enumerate(of_sample[:-1]) if count] for of_sample in counts]
        self.valid = [sum(of_sample[:-1]) for of_sample in counts]
        # the number is known: nothing waits for it
        pixels = (labels != IGNORE).flatten().nonzero_static(size=sum(self.valid)).squeeze(1)
        self.labels = labels.flatten()[pixels]  # [V] of all samples
        # a complex number is a place: one look-up instead of two
        self.places = torch.view_as_complex(_centres(height, width, device, dtype))[pixels % (height * width)]
        self.generators = [torch.Generator(device).manual_seed(seed) for _ in range(batch)]

    def draw(self, sample: int, *shape: int) -> Tensor:
        """Indices of a sample's pixels, drawn uniformly with replacement."""
        first = sum(self.valid[:sample])
        bounds, generator = (first, first + self.valid[sample]), self.generators[sample]
        return torch.randint(*bounds, shape, generator=generator, device=self.labels.device)

    def at(self, chosen: Tensor) -> Tensor:
        """Where pixels [..., P] lie: [..., P, 1, 2] x and y, -1..1 across the image."""
        return torch.view_as_real(self.places[chosen]).unsqueeze(-2)


def _sample(masks: Tensor, places: Tensor) -> Tensor:
    """Masks [R, 1, h, w] at places [R, P, 1, 2]: [R, P]."""
    return F.grid_sample(masks, places, align_corners=False)[:, 0, :, 0]


def _corners(places: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Pixels [P, 4] of a map (h, w) around places [P, 2], and the share of each; outside the map it is 0."""
    (x, share_x), (y, share_y) = (_ends(at, side) for at, side in zip(places.unbind(1), size[::-1], strict=True))
    pixels, shares = y[:, :, None] * size[1] + x[:, None], share_y[:, :, None] * share_x[:, None]
    return pixels.flatten(1), shares.flatten(1)


def _ends(places: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Pixels [P, 2] of a line of ``side`` pixels around places [P], -1..1 along it, and the share of each."""
    at = ((places + 1) * side - 1) / 2
    low = at.floor()
    pixels = torch.stack([low, low + 1], dim=1)
    within = pixels.clamp(0, side - 1)
    return within.long(), (1 - (at[:, None] - pixels).abs()) * (pixels == within)


def _pyramid(features: Sequence[Tensor]) -> list[Tensor]:
    """The four maps at 4, 2, 1 and 1/2 times the token grid: strides 4, 8, 16, 32 for tokens of 16 px."""
    h, w = features[0].shape[-2:]
    sizes = (4 * h, 4 * w), (2 * h, 2 * w), (h, w), ((h + 1) // 2, (w + 1) // 2)
    return [resize(f, size) for f, size in zip(features, sizes, strict=True)]


def _log_share(class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Class logits [Q, K + 1] and mask logits [Q, h, w] of one sample -> logarithm of the classes' shares [K, H, W]."""
    with torch.autocast(mask_logits.device.type, enabled=False):
        class_logits, mask_logits = at_least_float32(class_logits), at_least_float32(mask_logits)
        masks = resize(mask_logits, size)
        log_class = class_logits.log_softmax(-1)[:, :-1]
        # shares do not change when every product is divided by the pixel's largest, and then none overflows or vanishes
        best = log_class.amax(-1, keepdim=True)  # [Q, 1]
        log_query = F.logsigmoid(masks) + best[..., None]  # [Q, H, W]
        query = (log_query - log_query.amax(0).detach()).exp()
        mass = torch.einsum("qk,qhw->khw", (log_class - best).exp(), query)
        return (mass / mass.sum(0) + LEAST_SHARE).log()
