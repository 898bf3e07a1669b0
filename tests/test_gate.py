from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cegate.errors import ConfigError
from cegate.gate import GatePlan, draw_k, normalize, select_top_k
from cegate.sites import SiteId, kinds

KINDS = kinds()

SITES = st.builds(lambda kind, layer: f"{kind}.{layer}", st.sampled_from(KINDS), st.integers(0, 23))
SCORES = st.dictionaries(
    SITES, st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]) | st.floats(0, 1e6), min_size=1, max_size=40
)


@given(SCORES, st.data())
def test_plan_activates_the_largest(scores, data):
    k = data.draw(st.integers(1, len(scores)))
    plan = select_top_k(scores, k)
    idle = scores.keys() - set(plan.active)
    assert len(plan.active) == k
    assert all(scores[a] >= scores[i] for a in plan.active for i in idle)


@given(SCORES, st.randoms(), st.data())
def test_plan_does_not_depend_on_the_order_of_scores(scores, random, data):
    k = data.draw(st.integers(1, len(scores)))
    shuffled = list(scores.items())
    random.shuffle(shuffled)
    assert select_top_k(dict(shuffled), k) == select_top_k(scores, k)


def test_ties_go_to_the_lower_kind_then_layer():
    scores = dict.fromkeys(["frequency.0", "semantic.10", "semantic.9", "spatial.11"], 1.0)
    assert select_top_k(scores, 3).active == ("spatial.11", "semantic.9", "semantic.10")


@pytest.mark.parametrize("k", [0, 5, -1])
def test_k_out_of_range_names_the_range(k):
    with pytest.raises(ConfigError, match=rf"k={k} .*1\.\.2"):
        select_top_k({"spatial.0": 1.0, "spatial.1": 2.0}, k)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_named(bad):
    with pytest.raises(ConfigError, match=r"semantic\.3"):
        select_top_k({"spatial.0": 1.0, "semantic.3": bad}, 1)
    with pytest.raises(ConfigError, match=r"semantic\.3"):
        normalize({"spatial.0": 1.0, "semantic.3": bad})


@given(SCORES)
def test_kind_and_layer_shares_add_up_to_one(scores):
    for axis, how in enumerate(("kind", "layer")):
        shares = normalize(scores, how)
        group_of = {site: (SiteId(site).kind, SiteId(site).layer)[axis] for site in scores}
        for group in set(group_of.values()):
            mass = [scores[s] for s in scores if group_of[s] == group]
            share = sum(shares[s] for s in scores if group_of[s] == group)
            assert share == pytest.approx(1.0 if sum(mass) > 0 else 0.0)


def test_normalisation_by_hand():
    scores = {"spatial.0": 1.0, "spatial.1": 3.0, "semantic.0": 2.0, "semantic.1": 0.0}
    assert normalize(scores, "kind") == {"spatial.0": 0.25, "spatial.1": 0.75, "semantic.0": 1.0, "semantic.1": 0.0}
    assert normalize(scores, "layer")["spatial.0"] == pytest.approx(1 / 3)
    assert normalize(scores, "mean", dict.fromkeys(scores, 4))["spatial.1"] == 0.75
    assert normalize(scores, "none") == scores


def test_mean_needs_the_number_of_weights():
    with pytest.raises(ConfigError, match="number of weights"):
        normalize({"spatial.0": 1.0}, "mean", {})


def test_equal_choices_make_equal_plans_and_active_beats_frozen():
    plan = GatePlan(["semantic.1", "spatial.2"], ["spatial.2", "spatial.0"])
    assert plan == GatePlan(["spatial.2", "semantic.1"], ["spatial.0"])
    assert plan.on == ("spatial.0", "spatial.2", "semantic.1")
    assert plan.matrix(3) == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]


def test_random_plans_cover_all_sites_alike():
    sites = [f"{kind}.{layer}" for kind in KINDS for layer in range(6)]
    drawn = Counter(site for i in range(600) for site in draw_k(sites, 6, seed=3, iteration=i).active)
    assert set(drawn) == set(sites)
    assert all(140 < count < 260 for count in drawn.values())  # 200 expected, deviation 12


def test_a_random_plan_refuses_too_many_sites():
    with pytest.raises(ConfigError, match=r"gate\.k=4 is out of range; the model has 3 sites"):
        draw_k(["spatial.0", "spatial.1", "spatial.2"], 4, seed=0, iteration=0)


def test_streams_of_a_kind_compete():
    scores = {"spatial.0": 1.0, "spatial.0.dsm": 3.0, "semantic.0": 2.0}
    assert normalize(scores, "kind") == {"spatial.0": 0.25, "spatial.0.dsm": 0.75, "semantic.0": 1.0}
    plan = select_top_k(scores, 2)
    assert plan.on == ("spatial.0.dsm", "semantic.0") or plan.on == ("semantic.0", "spatial.0.dsm")
    assert plan.matrix(1, ["spatial", "spatial.dsm", "semantic"]) == [[0], [1], [1]]
