"""The Mask2Former head (Cheng et al., CVPR 2022) on the features of a plain vision transformer.

Pixel decoder, transformer decoder and loss are those of ``transformers``; ours are the feature pyramid, the points at
which masks are compared, and the semantic logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers.models.mask2former.configuration_mask2former import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerLoss,
    Mask2FormerPixelDecoder,
    Mask2FormerPreTrainedModel,
    Mask2FormerTransformerModule,
    dice_loss,
    pair_wise_dice_loss,
    pair_wise_sigmoid_cross_entropy_loss,
    sample_point,
    sigmoid_cross_entropy_loss,
)

from cegate.config import IGNORE
from cegate.errors import ConfigError
from cegate.heads.head import FEATURES, Head
from cegate.losses import LEAST_SHARE, PixelLoss, at_least_float32, mean_over_valid

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
        class_logits, mask_logits = self.decoder(features, queries)
        # sample by sample: every query at full size is the head's largest tensor
        pairs = zip(class_logits[-1], mask_logits[-1], strict=True)
        return torch.stack([_log_share(classes, masks, size) for classes, masks in pairs])

    def loss(
        self,
        features: Sequence[Tensor],
        labels: Tensor,
        weights: Tensor | None = None,
        queries: Tensor | None = None,
    ) -> Tensor:
        class_logits, mask_logits = self.decoder(features, queries)
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
        # layers of samples -> samples of layers; unbind, because an index has a gradient of the size of the batch
        masks = zip(*(layer.unbind() for layer in mask_logits), strict=True)
        samples = zip(torch.stack(class_logits, dim=1), masks, labels, strict=True)
        losses = torch.stack([self.criterion(*sample, seed) for sample in samples])
        return losses if weights is None else losses * mean_over_valid(weights, labels)


class _Decoder(Mask2FormerPreTrainedModel):
    """Pixel decoder and transformer decoder; the base class knows how their weights are initialised."""

    def __init__(self, config: Mask2FormerConfig, channels: int) -> None:
        super().__init__(config)
        self.pixel_decoder = Mask2FormerPixelDecoder(config, feature_channels=[channels] * FEATURES)
        self.transformer = Mask2FormerTransformerModule(in_features=config.feature_size, config=config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
        # in a class of ours post_init passes over modules without weights of their own, such as deformable attention
        self.apply(self._init_weights)

    def forward(self, features: Sequence[Tensor], queries: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Class logits [B, Q, K + 1] and mask logits [B, Q, 4h, 4w] of each layer; the last layer's are the result."""
        # full precision as in the authors' code: half precision cannot hold the sampling positions
        with torch.autocast(features[0].device.type, enabled=False):
            pixels = self.pixel_decoder(_pyramid([f.to(self.dtype) for f in features]))
        decoded = self._transform(pixels.multi_scale_features, pixels.mask_features, queries)
        class_logits = [self.class_predictor(found.transpose(0, 1)) for found in decoded.intermediate_hidden_states]
        return class_logits, list(decoded.masks_queries_logits)

    def _transform(self, maps: Sequence[Tensor], mask_features: Tensor, queries: Tensor | None):
        """The library's transformer, with queries that may come from outside."""
        part, sizes = self.transformer, [m.shape[-2:] for m in maps]
        positions = [part.position_embedder(m.shape, m.device, m.dtype, None).flatten(2).permute(2, 0, 1) for m in maps]
        levels = zip(maps, part.input_projections, part.level_embed.weight, strict=True)
        keys = [(project(m).flatten(2) + level[None, :, None]).permute(2, 0, 1) for m, project, level in levels]
        tables = [_rows(table, queries) for table in (part.queries_features, part.queries_embedder)]
        contents, places = (table[:, None].repeat(1, len(mask_features), 1) for table in tables)  # [Q, B, width]
        return part.decoder(
            inputs_embeds=contents,
            multi_stage_positional_embeddings=positions,
            pixel_embeddings=mask_features,
            encoder_hidden_states=keys,
            query_position_embeddings=places,
            feature_size_list=sizes,
            output_hidden_states=False,
            output_attentions=False,
            return_dict=True,
        )


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
    """Mask2Former's loss of one sample at valid pixels; its decoder layers take the place of the library's batch."""

    def __init__(self, config: Mask2FormerConfig) -> None:
        weights = {"class": config.class_weight, "mask": config.mask_weight, "dice": config.dice_weight}
        super().__init__(config, weight_dict=weights)

    def forward(self, class_logits: Tensor, mask_logits: Sequence[Tensor], label: Tensor, seed: int) -> Tensor:
        """Sum of the weighted losses of all layers.

        Args:
            class_logits: [L, Q, K + 1] of L layers.
            mask_logits: L of [Q, h, w].
            label: [H, W] int64, 255 ignored.
            seed: of the points.

        Returns:
            Scalar, float32 or float64; 0 with gradient 0 without a valid pixel.
        """
        class_logits = at_least_float32(class_logits)
        points = _Points(label, class_logits.dtype, seed)
        if not points.labels.numel():
            return class_logits[:0].sum() + mask_logits[-1][:0].sum()  # 0, and still part of the graph
        with torch.autocast(label.device.type, enabled=False):
            present = points.labels.unique()
            pairs = self.match(class_logits, mask_logits, present, points)
            # a mean over layers; each has as many matched queries, so that times L it is the sum of their means
            class_loss = (
                len(pairs) * self.loss_labels(class_logits, [present] * len(pairs), pairs)["loss_cross_entropy"]
            )
            return self.weight_dict["class"] * class_loss + self.mask_loss(mask_logits, present, pairs, points)

    @torch.no_grad()
    def match(
        self, class_logits: Tensor, mask_logits: Sequence[Tensor], present: Tensor, points: _Points
    ) -> list[tuple[Tensor, Tensor]]:
        """(queries, entries of ``present``) of each layer's cheapest assignment."""
        chosen = points.draw(self.num_points)
        truth = (points.labels[chosen] == present[:, None]).to(points.xy.dtype)  # [n, P]
        # layer by layer: the points of one layer's queries fit the cache of a CPU
        cost = torch.stack([self.mask_cost(masks, points.xy[chosen], truth) for masks in mask_logits])  # [L, Q, n]
        cost -= self.weight_dict["class"] * class_logits.softmax(-1)[..., present]
        # what is not finite is matched last; the loss then says NaN
        worst = torch.finfo(torch.float32).max
        cost = cost.nan_to_num(nan=worst, posinf=worst, neginf=worst).cpu()
        return [tuple(map(torch.as_tensor, linear_sum_assignment(layer))) for layer in cost]

    def mask_cost(self, masks: Tensor, xy: Tensor, truth: Tensor) -> Tensor:
        """Cost [Q, n] of giving mask logits [Q, h, w] the truth [n, P] at the points xy [P, 2]."""
        predicted = sample_point(masks[None].to(xy.dtype), xy[None], align_corners=False)[0]  # [Q, P]
        cross_entropy = pair_wise_sigmoid_cross_entropy_loss(predicted, truth)
        return self.weight_dict["mask"] * cross_entropy + self.weight_dict["dice"] * pair_wise_dice_loss(
            predicted, truth
        )

    def mask_loss(
        self, mask_logits: Sequence[Tensor], present: Tensor, pairs: list[tuple[Tensor, Tensor]], points: _Points
    ) -> Tensor:
        """Weighted cross entropy and dice of the matched masks: mean over the sample's classes, sum over layers."""
        matched = torch.cat([masks[queries] for masks, (queries, _) in zip(mask_logits, pairs, strict=True)])
        matched = matched.unsqueeze(1).to(points.xy.dtype)  # [R, 1, h, w]
        matched_class = present[torch.cat([classes for _, classes in pairs])]  # [R]
        chosen = self.uncertain_points(matched, points)  # [R, P]
        predicted = sample_point(matched, points.xy[chosen], align_corners=False).squeeze(1)
        truth = (points.labels[chosen] == matched_class[:, None]).to(predicted.dtype)
        cross_entropy = sigmoid_cross_entropy_loss(predicted, truth, len(present))
        dice = dice_loss(predicted, truth, len(present))
        return self.weight_dict["mask"] * cross_entropy + self.weight_dict["dice"] * dice

    @torch.no_grad()
    def uncertain_points(self, masks: Tensor, points: _Points) -> Tensor:
        """Draw more points than needed for each mask [R, 1, h, w], keep the least certain and add some at random."""
        candidates = points.draw(len(masks), int(self.num_points * self.oversample_ratio))
        logits = sample_point(masks, points.xy[candidates], align_corners=False).squeeze(1)
        kept = int(self.num_points * self.importance_sample_ratio)
        least_certain = self.calculate_uncertainty(logits).topk(kept, dim=1).indices
        return torch.cat([candidates.gather(1, least_certain), points.draw(len(masks), self.num_points - kept)], dim=1)


class _Points:
    """The valid pixels of a label map [H, W] in reading order, and a source of random ones among them."""

    def __init__(self, label: Tensor, dtype: torch.dtype, seed: int) -> None:
        y, x = (label != IGNORE).nonzero(as_tuple=True)
        self.labels = label[y, x]  # [V]
        height, width = label.shape
        centres = (x.to(dtype) + 0.5) / width, (y.to(dtype) + 0.5) / height
        self.xy = torch.stack(centres, dim=-1)  # [V, 2], 0..1 across the image
        self.generator = torch.Generator(label.device).manual_seed(seed)

    def draw(self, *shape: int) -> Tensor:
        """Indices of pixels, drawn uniformly with replacement."""
        return torch.randint(len(self.labels), shape, generator=self.generator, device=self.labels.device)


def _pyramid(features: Sequence[Tensor]) -> list[Tensor]:
    """The four maps at 4, 2, 1 and 1/2 times the token grid: strides 4, 8, 16, 32 for tokens of 16 px."""
    h, w = features[0].shape[-2:]
    sizes = (4 * h, 4 * w), (2 * h, 2 * w), (h, w), ((h + 1) // 2, (w + 1) // 2)
    return [
        f if size == (h, w) else F.interpolate(f, size=size, mode="bilinear", align_corners=False)
        for f, size in zip(features, sizes, strict=True)
    ]


def _log_share(class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Class logits [Q, K + 1] and mask logits [Q, h, w] of one sample -> logarithm of the classes' shares [K, H, W]."""
    with torch.autocast(mask_logits.device.type, enabled=False):
        class_logits, mask_logits = at_least_float32(class_logits), at_least_float32(mask_logits)
        masks = F.interpolate(mask_logits[None], size=size, mode="bilinear", align_corners=False)[0]
        log_class = class_logits.log_softmax(-1)[:, :-1]
        # shares do not change when every product is divided by the pixel's largest, and then none overflows or vanishes
        best = log_class.amax(-1, keepdim=True)  # [Q, 1]
        log_query = F.logsigmoid(masks) + best[..., None]  # [Q, H, W]
        query = (log_query - log_query.amax(0).detach()).exp()
        mass = torch.einsum("qk,qhw->khw", (log_class - best).exp(), query)
        return (mass / mass.sum(0) + LEAST_SHARE).log()
