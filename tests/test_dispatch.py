"""Gates compiled into a dispatch plan, in C++ and in Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cegate import native
from cegate.dispatch import GatePlan, PythonGatePlan, compile_gates

PLANS = [PythonGatePlan] if native.EXTENSION is None else [PythonGatePlan, GatePlan]


@pytest.fixture(params=PLANS, ids=["python", "cpp"][: len(PLANS)], autouse=True)
def _plan(request, monkeypatch):
    monkeypatch.setattr("cegate.dispatch.GatePlan", request.param)


def test_gates_of_a_whole_batch():
    plan = compile_gates([[1, 0, 0], [0, 1, 1], [0, 0, 0]], weights=(10, 7, 5))
    assert (plan.layers, plan.samples, plan.first_layer, plan.last_layer) == (3, 0, 0, 2)
    assert plan.is_on(0, 0)
    assert not plan.is_on(2, 1)
    assert [plan.offset(1, layer) for layer in range(3)] == [-1, 10, 17]
    assert plan.packed_weights == 24
    assert plan.assignment(1, 1) == []
    assert repr(plan) == "GatePlan(3 layers, on: spatial.0 semantic.1 semantic.2)"


def test_gates_and_adapters_of_each_sample():
    gates = torch.zeros(3, 3, 2, dtype=torch.bool)
    gates[:, 0, 1] = True
    gates[1:, 2, 0] = True
    plan = compile_gates(gates, adapters=[1, 0, 1])
    assert plan.samples == 3
    assert plan.assignment(0, 1) == [1, 0, 1]
    assert plan.assignment(2, 0) == [-1, 0, 1]
    assert plan.order == [1, 0, 2]
    assert "3 samples" in repr(plan)


def test_adapters_of_samples_that_share_their_gates():
    plan = compile_gates([[1], [0], [0]], adapters=[2, 0])
    assert plan.samples == 2
    assert plan.assignment(0, 0) == [2, 0]
    assert plan.assignment(1, 0) == [-1, -1]


def test_samples_with_own_gates_and_one_set_of_weights():
    plan = compile_gates([[[1], [0], [0]], [[1], [1], [0]]])
    assert plan.assignment(0, 0) == []
    assert plan.assignment(1, 0) == [-1, 0]


def test_every_gate_off():
    plan = compile_gates(torch.zeros(3, 4, dtype=torch.int64))
    assert (plan.first_layer, plan.last_layer, plan.packed_weights) == (-1, -1, 0)
    assert repr(plan) == "GatePlan(4 layers, on: nothing)"


@pytest.mark.parametrize(
    ("gates", "options", "message"),
    [
        ([[1, 0], [0, 2], [0, 0]], {}, "gate semantic.1 of sample 0 is 2, accepted are 0 and 1"),
        ([[0], [0], [-1]], {}, "gate frequency.0 of sample 0 is -1, accepted are 0 and 1"),
        (torch.ones(2, 4), {}, r"gates have shape \(2, 4\), expected \[3, L\] or \[B, 3, L\]"),
        (torch.ones(3, 4), {}, "gates are torch.float32, expected integers or booleans"),
        ([[1], [1], [1]], {"adapters": [0, -2]}, r"adapters\[1\] is -2, accepted are 0 and more"),
        (torch.ones(2, 3, 1, dtype=torch.int), {"adapters": [0]}, "adapters has 1 entries for gates of 2 samples"),
        (torch.ones(1, 3, 1, dtype=torch.int), {"adapters": [0, 0]}, "adapters has 2 entries for gates of 1 sample"),
        ([[1], [1], [1]], {"weights": (1, -1, 0)}, "a semantic site has -1 weights"),
        ([[1], [1], [1]], {"weights": (1, 1)}, "weights has 2 entries, expected 3"),
    ],
)
def test_bad_values_are_named(gates, options, message):
    with pytest.raises(ValueError, match=message):
        compile_gates(gates, **options)


def test_a_layer_out_of_range_is_named():
    plan = compile_gates([[1], [1], [1]])
    with pytest.raises(IndexError, match=r"layer 1 is outside 0\.\.2, 0\.\.0"):
        plan.assignment(0, 1)


@pytest.mark.skipif(native.EXTENSION is None, reason=native.REASON)
@given(st.data())
def test_both_plans_agree(data):
    layers, samples = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    bits = st.integers(0, 1)
    gates = data.draw(st.lists(bits, min_size=3 * layers * samples, max_size=3 * layers * samples))
    table = torch.tensor(gates).view(samples, 3, layers).tolist()
    adapters = data.draw(st.one_of(st.just([]), st.lists(st.integers(0, 3), min_size=samples, max_size=samples)))
    weights = data.draw(st.lists(st.integers(0, 99), min_size=3, max_size=3))
    ours, plain = native.EXTENSION.GatePlan(table, adapters, weights), PythonGatePlan(table, adapters, weights)
    for name in ("layers", "samples", "first_layer", "last_layer", "packed_weights", "order"):
        assert getattr(ours, name) == getattr(plain, name), name
    for kind in range(3):
        for layer in range(layers):
            for question in ("is_on", "offset", "assignment"):
                assert getattr(ours, question)(kind, layer) == getattr(plain, question)(kind, layer), question
    assert repr(ours) == repr(plain)
