"""Gates compiled into a dispatch plan, in C++ and in Python."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cegate import native
from cegate.dispatch import DispatchPlan, PythonDispatchPlan, compile_gates

PLANS = [PythonDispatchPlan] if native.EXTENSION is None else [PythonDispatchPlan, DispatchPlan]


@pytest.fixture(params=PLANS, ids=["python", "cpp"][: len(PLANS)], autouse=True)
def _plan(request, monkeypatch):
    monkeypatch.setattr("cegate.dispatch.DispatchPlan", request.param)


def test_gates_of_a_whole_batch():
    plan = compile_gates([[1, 0, 0], [0, 1, 1], [0, 0, 0]])
    assert (plan.layers, plan.samples) == (3, 0)
    assert plan.is_on(0, 0)
    assert not plan.is_on(2, 1)
    assert plan.assignment(1, 1) == []
    assert repr(plan) == "DispatchPlan(3 layers, on: spatial.0 semantic.1 semantic.2)"


def test_gates_and_adapters_of_each_sample():
    gates = torch.zeros(3, 3, 2, dtype=torch.bool)
    gates[:, 0, 1] = True
    gates[1:, 2, 0] = True
    plan = compile_gates(gates, adapters=[1, 0, 1])
    assert plan.samples == 3
    assert plan.assignment(0, 1) == [1, 0, 1]
    assert plan.assignment(2, 0) == [-1, 0, 1]
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
    assert not any(plan.is_on(kind, layer) for kind in range(3) for layer in range(4))
    assert repr(plan) == "DispatchPlan(4 layers, on: nothing)"


@pytest.mark.parametrize(
    ("gates", "options", "message"),
    [
        ([[1, 0], [0, 2], [0, 0]], {}, "gate semantic.1 of sample 0 is 2, accepted are 0 and 1"),
        ([[0], [0], [-1]], {}, "gate frequency.0 of sample 0 is -1, accepted are 0 and 1"),
        (torch.ones(2, 4), {}, r"gates have shape \(2, 4\), expected \[3, L\] or \[B, 3, L\] for the kinds spatial, "),
        (torch.ones(3, 0), {}, r"gates have shape \(3, 0\), expected"),
        (torch.ones(3, 4), {}, "gates are torch.float32, expected integers or booleans"),
        ([[1], [1], [1]], {"adapters": [0, -2]}, r"adapters\[1\] is -2, accepted are 0 and more"),
        (torch.ones(2, 3, 1, dtype=torch.int), {"adapters": [0]}, "adapters has 1 entries for gates of 2 samples"),
        (torch.ones(1, 3, 1, dtype=torch.int), {"adapters": [0, 0]}, "adapters has 2 entries for gates of 1 sample"),
        ([[1, 3]], {"kinds": ["mm_adapter"]}, "gate mm_adapter.1 of sample 0 is 3"),
    ],
)
def test_bad_values_are_named(gates, options, message):
    with pytest.raises(ValueError, match=message):
        compile_gates(gates, **options)


def test_a_layer_out_of_range_is_named():
    plan = compile_gates([[1], [1], [1]])
    with pytest.raises(IndexError, match=r"layer 1 is outside 0\.\.2, 0\.\.0"):
        plan.assignment(0, 1)


@pytest.mark.parametrize("kinds", [["one"], list("abcde")], ids=len)
def test_any_number_of_kinds(kinds):
    gates = torch.zeros(2, len(kinds), 2, dtype=torch.bool)
    gates[1, -1, 1] = True
    plan = compile_gates(gates, kinds=kinds, adapters=[3, 4])
    assert plan.assignment(len(kinds) - 1, 1) == [-1, 4]
    assert repr(plan) == f"DispatchPlan(2 layers, 2 samples, on: {kinds[-1]}.1)"
    with pytest.raises(IndexError, match=rf"kind {len(kinds)}, layer 0 is outside 0\.\.{len(kinds) - 1}, 0\.\.1"):
        plan.is_on(len(kinds), 0)


@pytest.mark.skipif(native.EXTENSION is None, reason=native.REASON)
@given(st.data())
def test_both_plans_agree(data):
    kinds = [f"kind{i}" for i in range(data.draw(st.integers(1, 4)))]
    layers, samples = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    size = len(kinds) * layers * samples
    gates = data.draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))
    table = torch.tensor(gates).view(samples, len(kinds), layers).tolist()
    adapters = data.draw(st.one_of(st.just([]), st.lists(st.integers(0, 3), min_size=samples, max_size=samples)))
    ours, plain = native.EXTENSION.DispatchPlan(kinds, table, adapters), PythonDispatchPlan(kinds, table, adapters)
    assert (ours.layers, ours.samples, repr(ours)) == (plain.layers, plain.samples, repr(plain))
    for site in product(range(len(kinds)), range(layers)):
        assert (ours.is_on(*site), ours.assignment(*site)) == (plain.is_on(*site), plain.assignment(*site))
