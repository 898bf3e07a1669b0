"""One pre-norm transformer block as a function of tensors: timm's plain blocks and EVA's (DINOv3, EVA-02).

A block's *form* is what it does, a value that all blocks of one kind share; its *weights* are tensors that are read
anew in every call. So a compiler meets a few forms, not one module per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention, GluMlp, LayerScale, Mlp, RmsNorm, SwiGLU, apply_rot_embed_cat
from timm.layers.attention import AttentionRope
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from cegate.backbone.frozen import as_read
from cegate.backbone.ports import Ports, Tokens
from cegate.backbone.stream import NormForm, Pair, Stream
from cegate.errors import BackboneError

ADVICE = "use a ViT with pre-norm blocks (DINOv2, DINOv3, MAE, DeiT, AugReg, EVA-02)"
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
}


@dataclass(frozen=True)
class BlockForm:
    """What a block does."""

    heads: int
    kv_heads: int
    norm1: NormForm
    norm2: NormForm
    query_norm: NormForm | None
    key_norm: NormForm | None
    inner_norm: NormForm | None
    """Of the attention's result, before its projection."""
    mlp_norm: NormForm | None
    mlp: str
    """plain: act(fc1 h); gate_first, gate_last: one half of fc1 gates the other; separate: act(fc1_g h) * fc1_x h."""
    activation: str
    prefix: int
    """Tokens in front that are not rotated."""
    half: bool
    """Rotary positions in two halves, not interleaved."""


class BlockWeights(NamedTuple):
    """The tensors of a block."""

    norm1: Pair
    projections: tuple[Pair, ...]
    """One fused, or query, key and value."""
    query_norm: Pair
    key_norm: Pair
    inner_norm: Pair
    gate: Pair | None
    proj: Pair
    scale1: Tensor | None
    norm2: Pair
    fc1: Pair
    fc1_x: Pair | None
    mlp_norm: Pair
    fc2: Pair
    scale2: Tensor | None


def read_form(block: nn.Module, where: str) -> BlockForm:
    """What a block does.

    Args:
        block: of a timm vision transformer.
        where: names it in messages.

    Raises:
        BackboneError: it is of no form that is known here; what is odd is named.
    """
    parts = [part for part in ("norm1", "attn", "norm2", "mlp") if not hasattr(block, part)]
    if parts or type(block) not in (Block, EvaBlock):
        why = f"has no {', '.join(parts)}" if parts else "does its parts in another order"
        raise BackboneError(f"{where} ({type(block).__name__}) {why}; {ADVICE}")
    attn, mlp = block.attn, block.mlp
    act = _activation_of(getattr(mlp, "act", None))
    known = {"attn": (Attention, AttentionRope, EvaAttention), "mlp": (Mlp, GluMlp, SwiGLU)}
    odd = [f"{n} is {type(m).__name__}" for n, m in (("attn", attn), ("mlp", mlp)) if type(m) not in known[n]]
    odd += [] if act else [f"mlp.act is {type(getattr(mlp, 'act', None)).__name__}"]
    linears = {f"attn.{n}": getattr(attn, n, None) for n in ("qkv", "q_proj", "k_proj", "v_proj", "proj")}
    linears |= {f"mlp.{n}": getattr(mlp, n, None) for n in ("fc1", "fc1_g", "fc1_x", "fc2")}
    odd += [f"{n} is {type(m).__name__}" for n, m in linears.items() if m is not None and type(m) is not nn.Linear]
    if odd:
        raise BackboneError(f"{where} is out of the ordinary ({', '.join(odd)}); {ADVICE}")
    return BlockForm(
        heads=attn.num_heads,
        kv_heads=getattr(attn, "num_kv_heads", attn.num_heads),
        norm1=_norm_form(block.norm1, where),
        norm2=_norm_form(block.norm2, where),
        query_norm=_norm_form(attn.q_norm, where),
        key_norm=_norm_form(attn.k_norm, where),
        inner_norm=_norm_form(getattr(attn, "norm", None), where),
        mlp_norm=_norm_form(getattr(mlp, "norm", None), where),
        mlp="separate" if isinstance(mlp, SwiGLU) else _gating(mlp) if isinstance(mlp, GluMlp) else "plain",
        activation=act,
        prefix=getattr(attn, "num_prefix_tokens", 0),
        half=bool(getattr(attn, "rotate_half", False)),
    )


def _activation_of(act: nn.Module | None) -> str | None:
    """Name of an activation, or None where it is none that is known."""
    if isinstance(act, nn.GELU):
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    names = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu", "ReLU": "relu"}
    return names.get(type(act).__name__)


def _gating(mlp: GluMlp) -> str:
    return "gate_last" if mlp.gate_last else "gate_first"


def _norm_form(norm: nn.Module | None, where: str) -> NormForm | None:
    if norm is None or isinstance(norm, nn.Identity):
        return None
    if isinstance(norm, nn.LayerNorm):
        return NormForm("layer", norm.eps)
    if isinstance(norm, RmsNorm | nn.RMSNorm):
        return NormForm("rms", norm.eps)
    raise BackboneError(f"{where} normalises by {type(norm).__name__}; LayerNorm and RMSNorm are known")


def read_weights(block: nn.Module) -> BlockWeights:
    """The tensors of a block, as they are now."""
    attn, mlp = block.attn, block.mlp
    return BlockWeights(
        norm1=_pair(block.norm1),
        projections=_projections(attn),
        query_norm=_pair(attn.q_norm),
        key_norm=_pair(attn.k_norm),
        inner_norm=_pair(getattr(attn, "norm", None)),
        gate=None if getattr(attn, "gate", None) is None else _pair(attn.gate),
        proj=_pair(attn.proj),
        scale1=_scale(block, "ls1", "gamma_1"),
        norm2=_pair(block.norm2),
        fc1=_pair(mlp.fc1_g if isinstance(mlp, SwiGLU) else mlp.fc1),
        fc1_x=_pair(mlp.fc1_x) if isinstance(mlp, SwiGLU) else None,
        mlp_norm=_pair(getattr(mlp, "norm", None)),
        fc2=_pair(mlp.fc2),
        scale2=_scale(block, "ls2", "gamma_2"),
    )


def _pair(module: nn.Module | None) -> Pair:
    return as_read(getattr(module, "weight", None)), as_read(getattr(module, "bias", None))


def _scale(block: nn.Module, plain: str, eva: str) -> Tensor | None:
    layer_scale = getattr(block, plain, None)
    return layer_scale.gamma if isinstance(layer_scale, LayerScale) else getattr(block, eva, None)


def _projections(attn: nn.Module) -> tuple[Pair, ...]:
    if getattr(attn, "qkv", None) is None:
        return _pair(attn.q_proj), _pair(attn.k_proj), _pair(attn.v_proj)
    weight, bias = _pair(attn.qkv)
    if getattr(attn, "q_bias", None) is not None:
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    return ((weight, bias),)


def run_block(
    form: BlockForm, w: BlockWeights, stream: Stream, rope: Tensor | None, ports: Ports, tokens: Tokens
) -> Stream:
    """One block on the residual stream.

    Args:
        form, w: of the block.
        stream: of [B, T, C].
        rope: rotary positions of the patch tokens, where the block has any.
        ports: what is plugged in.
        tokens: how the T tokens lie.
    """
    x, u = stream.normed(form.norm1, w.norm1)
    qkv = project(u, w.projections)
    for add in ports.qkv:
        qkv = add(u, qkv, tokens)
    a = _attend(form, w, u, qkv, rope)
    for change in ports.attention:
        a = change(a, tokens)
    x, h = Stream(x, a, w.scale1).normed(form.norm2, w.norm2)
    return leave(x, h, Stream(x, _mlp(form, w, h, ports, tokens), w.scale2), ports, tokens)


def leave(x: Tensor, h: Tensor, stream: Stream, ports: Ports, tokens: Tokens) -> Stream:
    """What the ports behind the MLP make of the stream; x and h as they saw it."""
    if not (ports.mlp or ports.block):
        return stream
    y = stream.total()
    for add in ports.mlp:
        y = add(x, h, y, tokens)
    for change in ports.block:
        y = change(y, tokens)
    return Stream(y)


def project(u: Tensor, projections: tuple[Pair, ...]) -> Tensor | tuple[Tensor, ...]:
    """Queries, keys and values of u [B, T, C]: one tensor [B, T, 3 inner], or three.

    None is a view: a function at the port may change it in place, and the gradient of a view that was changed is copied
    four times.
    """
    flat = u.flatten(0, -2)
    found = [torch.ops.aten._unsafe_view(y := F.linear(flat, *p), (*u.shape[:-1], y.shape[-1])) for p in projections]
    return found[0] if len(found) == 1 else tuple(found)


def _attend(form: BlockForm, w: BlockWeights, u: Tensor, qkv: Tensor | tuple, rope: Tensor | None) -> Tensor:
    batch, count = u.shape[:2]
    if isinstance(qkv, Tensor):
        qkv = qkv.chunk(3, dim=-1)  # its gradient is one cat; that of unbind along another axis a stack and a copy
    heads = (form.heads, form.kv_heads, form.kv_heads)
    q, k, v = (t.view(batch, count, n, -1).transpose(1, 2) for t, n in zip(qkv, heads, strict=True))
    if form.query_norm is not None:
        q = form.query_norm(q, w.query_norm)
    if form.key_norm is not None:
        k = form.key_norm(k, w.key_norm)
    if rope is not None:
        q, k = (_rotated(t, rope, form).type_as(v) for t in (q, k))
    if form.kv_heads != form.heads:
        k, v = (t.repeat_interleave(form.heads // form.kv_heads, dim=1) for t in (k, v))
    a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    if form.inner_norm is not None:
        a = form.inner_norm(a, w.inner_norm)
    if w.gate is not None:
        a = a * F.linear(u, *w.gate).sigmoid()
    return F.linear(a, *w.proj)


def _rotated(t: Tensor, rope: Tensor, form: BlockForm) -> Tensor:
    patches = apply_rot_embed_cat(t[:, :, form.prefix :], rope, half=form.half)
    return torch.cat([t[:, :, : form.prefix], patches], dim=2) if form.prefix else patches


def _mlp(form: BlockForm, w: BlockWeights, h: Tensor, ports: Ports, tokens: Tokens) -> Tensor:
    act, g = ACTIVATIONS[form.activation], F.linear(h, *w.fc1)
    for add in ports.fc1:
        g = add(h, g, tokens)
    if form.mlp == "separate":
        g = act(g) * F.linear(h, *w.fc1_x)
    elif form.mlp == "plain":
        g = act(g)
    else:
        first, second = g.chunk(2, dim=-1)
        g = act(first) * second if form.mlp == "gate_first" else first * act(second)
    if form.mlp_norm is not None:
        g = form.mlp_norm(g, w.mlp_norm)
    m = F.linear(g, *w.fc2)
    for add in ports.fc2:
        m = add(g, m, tokens)
    return m
