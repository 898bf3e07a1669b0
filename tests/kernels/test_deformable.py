import pytest
import torch
from torch import Tensor

from cegate.kernels import deformable
from cegate.kernels.deformable import deformable_attention

SIZES = ((3, 5), (2, 2), (1, 4))
# heads and channels that fill no block, and more queries than one program takes
SHAPES = [(2, 7, 3, 5, 2), (1, 40, 2, 32, 1)]


def make(batch: int, queries: int, heads: int, channels: int, points: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, levels = sum(h * w for h, w in SIZES), len(SIZES)
    values = torch.randn(batch, rows, heads, channels, generator=generator)
    places = torch.randn(batch, queries, heads, levels, points, 2, generator=generator)  # a third lies outside
    places.view(-1)[:3] = torch.tensor([1e30, -1e30, 1.0])
    weights = torch.rand(batch, queries, heads, levels, points, generator=generator)
    return [tensor.to(device) for tensor in (values, places, weights)]


def op(backend: str):
    return lambda *tensors: deformable_attention(*tensors, SIZES, backend=backend)


@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_those_of_sampled_grids(shape, device, assert_as_accurate):
    assert_as_accurate(op("triton"), op("torch"), make(*shape, device))


def test_the_plain_form_is_the_definition():
    values, places, weights = make(1, 3, 2, 4, 2, torch.device("cpu"))
    found = op("torch")(values, places, weights)
    for query in range(3):
        for head in range(2):
            total, first = torch.zeros(4), 0
            for level, (height, width) in enumerate(SIZES):
                for point in range(2):
                    place = places[0, query, head, level, point]
                    x, y = ((place + 1) * torch.tensor([width, height]) - 1) / 2
                    for row in range(height):
                        for column in range(width):
                            share = max(0, 1 - abs(x - column)) * max(0, 1 - abs(y - row))
                            value = values[0, first + row * width + column, head]
                            total += weights[0, query, head, level, point] * share * value
                first += height * width
            torch.testing.assert_close(found[0, query, head], total)


def test_what_is_not_finite_stays_so(device):
    values, places, weights = make(*SHAPES[0], device)
    places[0, 2, 1, 0, 0, 0] = torch.nan
    found = op("triton")(values, places, weights)
    assert found[0, 2, 1].isnan().all()
    assert found.isnan().sum() == values.shape[-1]


def test_strided_tensors_and_a_table_at_hand(device):
    values, places, weights = make(*SHAPES[0], device)
    turned = values.transpose(1, 2).contiguous().transpose(1, 2)
    table = deformable.level_table(SIZES, device)
    found = deformable_attention(turned, places, weights, SIZES, table=table, backend="triton")
    torch.testing.assert_close(found, op("torch")(values, places, weights))


def test_values_of_other_levels_and_second_derivatives_are_refused(device):
    values, places, weights = make(*SHAPES[0], device)
    with pytest.raises(ValueError, match="22 values for levels of"):
        op("torch")(values[:, :-1], places, weights)
    found = op("triton")(values.requires_grad_(), places, weights)
    with pytest.raises(NotImplementedError, match="deformable_attention"):
        torch.autograd.grad(found.square().sum(), values, create_graph=True)


def test_where_order_matters_it_does_not_run(device):
    tensors = make(*SHAPES[0], device)
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="no fixed order"):
            op("triton")(*tensors)
    finally:
        torch.set_deterministic_debug_mode(before)
