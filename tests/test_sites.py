from __future__ import annotations

import copy
import itertools
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cegate import sites
from cegate.errors import ConfigError
from cegate.sites import PAPER_KINDS, SiteId, find_kind, kinds, register_kind

COORDINATES = st.tuples(
    st.sampled_from(PAPER_KINDS), st.integers(0, 39), st.none() | st.sampled_from(["dsm", "image", "s1"])
)


@pytest.fixture
def registry(monkeypatch):
    """The built-in kinds, for tests that add more."""
    monkeypatch.setattr(sites, "_KINDS", dict(sites._KINDS))


@given(COORDINATES)
def test_a_site_is_its_text_and_knows_its_coordinates(coordinates):
    kind, layer, stream = coordinates
    text = f"{kind}.{layer}" + (f".{stream}" if stream else "")
    site = SiteId.of(*coordinates)
    assert (site.kind, site.layer, site.stream) == coordinates
    assert site == text and hash(site) == hash(text) and {text: 1}[site] == {site: 1}[text] == 1
    assert json.dumps({site: [site]}) == json.dumps({text: [text]})
    for same in (SiteId.parse(text), SiteId(site), copy.deepcopy(site), pickle.loads(pickle.dumps(site))):
        assert same == site and type(same) is SiteId and (same.kind, same.layer, same.stream) == coordinates


@given(st.lists(COORDINATES, max_size=9))
def test_sites_sort_by_kind_layer_and_stream(coordinates):
    by_hand = sorted(coordinates, key=lambda c: (PAPER_KINDS.index(c[0]), c[1], c[2] or ""))
    assert sorted(SiteId.of(*c) for c in coordinates) == [SiteId.of(*c) for c in by_hand]
    for a, b in itertools.product((SiteId.of(*c) for c in coordinates), repeat=2):
        assert (a < b, a > b, a <= b, a >= b) == (b > a, b < a, b >= a, b <= a)
        assert (a < b) + (a > b) + (a == b) == 1


def test_layers_sort_as_numbers_also_beside_a_text():
    assert SiteId("spatial.10") > SiteId("spatial.9") and SiteId("spatial.10") > "spatial.9"
    assert max(SiteId("semantic.0"), SiteId("spatial.23")) == "semantic.0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spatal.7", "did you mean 'spatial.7'?"),
        ("Spatial.7", "did you mean 'spatial.7'?"),
        ("spatial_7", "did you mean 'spatial.7'?"),
        ("7.spatial", "did you mean 'spatial.7'?"),
        ("spatial.07", "did you mean 'spatial.7'?"),
        ("frequency", "did you mean 'frequency.0'?"),
        ("spatial.-1", "did you mean 'spatial.1'?"),
        ("spatial.\u0663", "kinds are spatial, semantic, frequency, layers count from 0"),  # an Arabic digit
        ("spatial.7.", "is not <kind>.<layer> or <kind>.<layer>.<stream>"),
        ("spatial." + "9" * 5000, "is not <kind>.<layer>"),
        ("", "is not <kind>.<layer>"),
        ("x.1", "kinds are spatial, semantic, frequency"),
    ],
    ids=lambda text: text[:20],
)
def test_what_is_no_site_is_refused_with_the_nearest(text, message):
    with pytest.raises(ConfigError) as error:
        SiteId.parse(text)
    assert message in str(error.value) and len(str(error.value)) < 300


def test_the_paper_s_kinds_come_first(registry):
    register_kind("another", title="a test", colour="#123456", marker="D")
    assert kinds() == ("spatial", "semantic", "frequency", "another")
    assert SiteId.of("another", 0) > SiteId.of("frequency", 23)
    assert find_kind("another").title == "a test"


def test_a_kind_may_be_registered_twice_but_not_as_two(registry):
    first = register_kind("another", title="a test")
    assert register_kind("another", title="a test") == first
    with pytest.raises(ConfigError, match=r"kind 'another' is registered already, as .*a test.*; choose another name"):
        register_kind("another", title="something else")
    with pytest.raises(ConfigError, match=r"kind 'spatial' is registered already"):
        register_kind("spatial")
    with pytest.raises(ConfigError, match=r"kind 'a\.b' is no name; use small letters"):
        register_kind("a.b")
    with pytest.raises(ConfigError, match=r"kind 'semantc' is unknown; .*; did you mean 'semantic'\?"):
        find_kind("semantc")


def test_configurations_know_a_registered_kind(registry):
    from cegate.configfile import read_config

    given = {"toolbox": {"kinds": ["another"]}, "gate": {"method": "fixed", "sites": ["another.3.dsm"]}}
    with pytest.raises(
        ConfigError, match=r"toolbox\.kinds=\[another\] is not accepted; expected a list of \(spatial, "
    ):
        read_config(given)
    register_kind("another")
    assert read_config(given).toolbox.kinds == ["another"]
