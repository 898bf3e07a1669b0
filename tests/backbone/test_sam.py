from __future__ import annotations

from functools import partial

import pytest
import torch
from timm.layers import resample_abs_pos_embed_nhwc
from timm.models.vision_transformer_sam import VisionTransformerSAM, window_partition
from torch import nn

from cegate.backbone import sam
from cegate.backbone.backbone import FAMILIES, Backbone
from cegate.backbone.ports import Circuit, Plug
from cegate.backbone.vit import load_weights
from cegate.errors import BackboneError

PATCH, WINDOW, WIDTH, HEADS = 4, 5, 16, 2


@pytest.fixture(autouse=True)
def _known_family(monkeypatch):
    monkeypatch.setitem(FAMILIES, VisionTransformerSAM, sam.Sam())


def small_sam(grid: int = 12, dtype: torch.dtype = torch.float64, **options) -> VisionTransformerSAM:
    """Windowed and global blocks in turn; every weight away from zero."""
    given = {"use_rel_pos": True, "window_size": WINDOW, "global_attn_indexes": (1, 3), "neck_chans": 8, **options}
    vit = VisionTransformerSAM(
        img_size=grid * PATCH,
        patch_size=PATCH,
        num_classes=0,
        embed_dim=WIDTH,
        depth=4,
        num_heads=HEADS,
        norm_layer=partial(nn.LayerNorm, eps=sam.EPS),
        **given,
    )
    for weight in vit.parameters():
        nn.init.normal_(weight, std=0.4)
    return vit.to(dtype).eval().requires_grad_(False)


def draw(grid: tuple[int, int], dtype: torch.dtype = torch.float64, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, grid[0] * PATCH, grid[1] * PATCH, dtype=dtype, requires_grad=True)


def timms_own(vit: VisionTransformerSAM, images: torch.Tensor, grid: tuple[int, int]) -> list[torch.Tensor]:
    """timm's blocks and neck behind positions that are resampled as SAM does."""
    own = vit.pos_embed
    vit.pos_embed = nn.Parameter(sam.resize_positions(own, grid), requires_grad=False)
    try:
        last, maps = vit.forward_intermediates(images)
    finally:
        vit.pos_embed = own
    return [*maps, last]


GRIDS = [(12, 12), (10, 5), (7, 13), (3, 4), (1, 1), (5, 6)]
"""The model's own; whole windows; cut at both sides; smaller than a window; one token; cut at one side."""


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_program_is_timms_encoder_forward_and_backward(grid):
    vit, images = small_sam(), draw(grid)
    ours = Backbone(vit).run(images, range(4)).maps
    ours.append(sam.Sam().finish(vit, ours[-1]))
    theirs = timms_own(vit, images, grid)
    for a, b in zip(ours, theirs, strict=True):
        # timm resamples tables in float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    probes = [torch.randn_like(a) for a in ours]
    grads = [
        torch.autograd.grad(sum((a * p).sum() for a, p in zip(maps, probes, strict=True)), images, retain_graph=True)[0]
        for maps in (ours, theirs)
    ]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5 * float(grads[1].abs().max()))


def test_at_its_own_size_the_program_is_exact():
    vit, images = small_sam(), draw((12, 12))
    for a, b in zip(Backbone(vit).run(images, range(4)).maps, vit.forward_intermediates(images)[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", [(5, 2), (2, 5), (3, 4), (5, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_one_key_stands_for_all_padding(side, bias):
    """Against a whole padded window, written down as SAM does it."""
    d, window = 6, 5
    qkv = torch.randn(1, side[0] * side[1], 3 * HEADS * d, dtype=torch.float64)
    rows = torch.randn(3 * HEADS * d, dtype=torch.float64) if bias else None
    tables = [torch.randn(2 * window - 1, d, dtype=torch.float64) for _ in "hw"]
    places = sam.find_places(*tables, side, window)
    ours = sam.attend(qkv, rows, HEADS, window, side, places)

    whole = torch.zeros(1, window, window, 3 * HEADS * d, dtype=torch.float64) + (0 if rows is None else rows)
    whole[:, : side[0], : side[1]] = qkv.unflatten(1, side)
    q, k, v = whole.flatten(1, 2).unflatten(2, (3, HEADS, d)).permute(2, 0, 3, 1, 4)
    y, x = torch.arange(window**2) // window, torch.arange(window**2) % window
    relative = tables[0][y[:, None] - y + window - 1] + tables[1][x[:, None] - x + window - 1]  # [T, T, d]
    logits = q @ k.mT / d**0.5 + torch.einsum("bntd,tsd->bnts", q, relative)
    full = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2).unflatten(1, (window, window))
    torch.testing.assert_close(ours, full[:, : side[0], : side[1]].flatten(1, 2), rtol=1e-10, atol=1e-10)


def test_ports_see_samples_and_never_windows():
    vit, seen = small_sam(), []

    def note(*arguments):
        *tensors, tokens = arguments
        seen.append((tuple(tensors[-1].shape), tokens.grid))
        return tensors[-1]

    ports = ("qkv", "attention", "fc1", "fc2", "mlp", "block")
    circuit = Circuit(Plug(port, 0, 0, note) for port in ports)
    Backbone(vit).run(draw((7, 9)), [0], circuit)
    widths = (3 * WIDTH, WIDTH, 4 * WIDTH, WIDTH, WIDTH, WIDTH)
    assert seen == [((2, 63, width), (7, 9)) for width in widths]


def test_what_a_port_adds_is_what_it_adds_in_timms_block():
    """An update of qkv that has no bias is zero on padding, so that padded windows and ours agree."""
    vit, grid = small_sam(), (7, 9)
    update = torch.randn(3 * WIDTH, WIDTH, dtype=torch.float64)
    plug = Plug("qkv", 0, 0, lambda u, qkv, tokens: qkv + u @ update.mT)
    images = draw(grid)
    ours = Backbone(vit).run(images, [0], Circuit([plug])).maps[0]
    vit.blocks[0].attn.qkv.weight += update
    torch.testing.assert_close(ours, timms_own(vit, images, grid)[0], rtol=1e-10, atol=1e-10)


def test_positions_are_resampled_without_antialiasing():
    positions = torch.randn(1, 12, 12, WIDTH)
    plain = sam.resize_positions(positions, (4, 6))
    expected = nn.functional.interpolate(positions.permute(0, 3, 1, 2), size=(4, 6), mode="bicubic")
    torch.testing.assert_close(plain, expected.permute(0, 2, 3, 1))
    assert (plain - resample_abs_pos_embed_nhwc(positions, [4, 6])).abs().max() > 0.1
    assert sam.resize_positions(positions, (12, 12)) is positions


def test_no_bias_of_all_pairs_of_tokens_is_made():
    """32 x 32 tokens: 1024^2 pairs; nothing of that size, nor a tenth of it, is made in the forward pass."""
    vit, largest = small_sam(32, torch.float32), 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    images = draw((32, 32), torch.float32, batch=1).detach()
    with torch.no_grad(), Watch():
        Backbone(vit).run(images, [3])
    assert largest < HEADS * 1024**2 / 10


def test_tables_are_resampled_once_and_anew_when_weights_change():
    vit, program = small_sam(), sam.Sam()
    images = draw((6, 8))
    with torch.inference_mode():
        program.stem(vit, images)
    first, second = (program.stem(vit, images)[2] for _ in "12")
    assert all(a.rows is b.rows for a, b in zip(first, second, strict=True))
    sam.forget_relative_positions(vit)
    assert all(not p.rows.any() and not p.columns.any() for p in program.stem(vit, images)[2])


def test_a_pass_of_inference_mode_leaves_nothing_that_training_cannot_use():
    vit, images = small_sam(), draw((6, 8))
    with torch.inference_mode():
        Backbone(vit).run(images, [3])
    Backbone(vit).run(images, [3]).maps[0].sum().backward()
    assert images.grad.abs().sum() > 0


def test_a_tuned_encoder_learns_its_positions():
    vit = small_sam().requires_grad_(True)
    Backbone(vit).run(draw((6, 8)), [3]).maps[0].square().sum().backward()
    without = [name for name, w in vit.named_parameters() if w.grad is None or not w.grad.any()]
    assert all(name.startswith("neck.") for name in without)


def test_half_precision_is_close_to_float32():
    vit, images = small_sam(dtype=torch.float32), draw((7, 9), torch.float32)
    exact = Backbone(vit).run(images, [3]).maps[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = Backbone(vit).run(images, [3]).maps[0]
    assert (rounded - exact).abs().max() < 0.1 * exact.abs().max()


# weights -------------------------------------------------------------------------------------------------------------


def sams_file(vit: nn.Module) -> dict[str, torch.Tensor]:
    names = {f"image_encoder.{k}".replace("mlp.fc", "mlp.lin"): v.clone() for k, v in vit.state_dict().items()}
    return {**names, "prompt_encoder.no_mask_embed.weight": torch.zeros(1), "mask_decoder.x": torch.zeros(1)}


def test_sams_own_file_fits_weight_by_weight():
    vit = small_sam()
    found = sam.from_sam_names(sams_file(vit), vit)
    other = small_sam()
    other.load_state_dict(found, strict=True)
    images = draw((12, 12))
    assert torch.equal(Backbone(other).run(images, [3]).maps[0], Backbone(vit).run(images, [3]).maps[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("image_encoder.blocks.2.attn.rel_pos_h"),
            r"1 weights .* missing, blocks.2.attn.rel_pos_h first",
        ),
        (lambda s: s.update({"image_encoder.blocks.9.norm1.weight": torch.zeros(1)}), "none of SAM's, blocks.9.norm1"),
        (lambda s: s.update({"other.weight": torch.zeros(1)}), "none of SAM's, other.weight first"),
        (
            lambda s: s.update({"image_encoder.patch_embed.proj.weight": torch.zeros(1024, 3, PATCH, PATCH)}),
            "width 1024, which is samvit_large_patch16; the backbone has 16",
        ),
        (
            lambda s: s.update({"image_encoder.pos_embed": torch.zeros(1, 64, 64, WIDTH)}),
            r"pos_embed is \[1, 64, 64, 16\] in SAM's file and \[1, 12, 12, 16\] in the backbone; build it",
        ),
    ],
    ids=["missing", "unexpected", "foreign", "another size", "another grid"],
)
def test_weights_that_do_not_fit_are_refused(change, message, tmp_path):
    vit = small_sam()
    state = sams_file(vit)
    change(state)
    with pytest.raises(BackboneError, match=message):
        sam.from_sam_names(state, vit)
    torch.save(state, tmp_path / "sam.pth")
    with pytest.raises(BackboneError, match=rf"sam\.pth does not fit the backbone .*{message}"):
        load_weights(vit, tmp_path / "sam.pth", "samvit_base_patch16")


def test_created_models_have_sams_sizes_and_epsilon():
    with torch.device("meta"):
        vit = sam.create_sam("samvit_base_patch16")
    assert vit.pos_embed.shape == (1, 64, 64, 768)
    assert [len(block.attn.rel_pos_h) for block in vit.blocks] == [27, 27, 127] * 4
    assert {norm.eps for norm in vit.modules() if isinstance(norm, nn.LayerNorm)} == {1e-6}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_rel_pos": False, "use_rope": True}, "block 0 .* no relative positions"),
        ({"init_values": 1e-5}, "block 0 .* scales its layers"),
        ({"qk_norm": True}, "block 0 .* normalises queries"),
    ],
    ids=["rotary", "layer scale", "query norm"],
)
def test_other_encoders_of_the_class_are_refused(options, message):
    with pytest.raises(BackboneError, match=message):
        Backbone(small_sam(**options))


def test_windows_of_the_reference_are_timms():
    """The padding that the module spares: 16 x 16 tokens fill four windows of 14 x 14."""
    windows, padded = window_partition(torch.zeros(1, 16, 16, 1), 14)
    assert (len(windows), padded) == (4, (28, 28))
    assert sam._stretches(16, 14) == [(0, 14), (14, 2)]
