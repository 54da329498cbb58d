"""What there is to play with: it follows its controls, and a picture of it is always there."""

import base64
import re

import ipywidgets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot as plt

from lib.base import InputError
from lib.config import ModelConfig
from lib.experiments.plan import SIZES
from lib.experiments.published import published_correlated
from lib.facts.entropy import entropy_bits_per_person
from lib.facts.people import RELEASED
from lib.figures import record
from lib.notebook import widgets


@pytest.fixture
def shown(monkeypatch) -> list:
    """What is displayed where somebody watches, in its order."""
    displayed = []
    monkeypatch.setattr(widgets, "display", displayed.append)
    monkeypatch.setattr(widgets, "is_watched", lambda: True)
    return displayed


def alt(window) -> str:
    """What the picture of an explorer shows, in words."""
    picture = window.children[1].children[-1].value
    assert base64.b64decode(re.search(r"base64,([^\"]+)", picture)[1]).startswith(b"\x89PNG")
    return re.search(r'alt="([^"]*)"', picture)[1]


@given(st.floats(1, 2e6), st.floats(0.25, 4))
def test_the_smallest_model_is_the_first_that_has_room(bits, bits_per_parameter):
    room = {size: ModelConfig(d_model=size).n_params for size in SIZES}
    enough = {size: n for size, n in room.items() if n * bits_per_parameter >= bits}
    assert widgets.smallest_model(bits, bits_per_parameter) == (min(enough.items()) if enough else None)


def test_who_does_not_watch_gets_the_picture_alone(shown, monkeypatch):
    widgets.show(ipywidgets.HTML("live"), "still")
    still, window = shown
    assert still == "still"
    assert "itl-live" in window._dom_classes and window.children[1].value == "live"

    monkeypatch.setattr(widgets, "is_watched", lambda: False)
    widgets.show(ipywidgets.HTML("live"), "still")
    assert shown[2:] == ["still"]


def test_a_figure_follows_its_controls_and_none_stays_open(shown):
    def draw(n: int) -> plt.Figure:
        figure, axes = plt.subplots()
        axes.set(xlabel=f'"{n}" < 9')
        return figure

    control = ipywidgets.IntSlider(value=3)
    widgets.explore(draw, n=control)
    still, window = shown
    assert still.axes[0].get_xlabel() == '"3" < 9'
    assert alt(window) == "Figure: &quot;3&quot; &lt; 9."
    control.value = 5
    assert alt(window) == "Figure: &quot;5&quot; &lt; 9."
    assert plt.get_fignums() == []


def test_capacity_can_be_explored(shown):
    widgets.explore_capacity("quick")
    facts, bits, _ = shown[1].children[1].children
    facts.value, bits.value = 65_536, 4.0
    # 16,384 people of log2(17,136 * 7 * 213 * 100) bits; 128,003 parameters of 4 bits would hold them.
    assert "65,536 facts, 512,011 bits: the bound allows d = 56 (129,752 parameters)" in alt(shown[1])
    bits.value = 0.25
    assert "the bound allows no model of the paper" in alt(shown[1])


def test_correlation_can_be_explored(shown, monkeypatch):
    few = published_correlated().query("n_facts == 4000")  # the entropy of more takes seconds
    figure = record.FIGURES["compressibility"]._replace(published=lambda: few)
    monkeypatch.setitem(record.FIGURES, "compressibility", figure)
    widgets.explore_correlation("quick")
    facts, alpha, bits, _ = shown[1].children[1].children
    assert (facts.value, bits.value) == (4000, 2)
    alpha.value = 0.75
    entropy = entropy_bits_per_person(1000, alpha=0.75, law=RELEASED)
    assert f"4,000 facts, alpha = 0.75: {entropy:.1f} bits a person, {1000 * entropy:,.0f} bits: " in alt(shown[1])


def test_a_threshold_that_the_paper_does_not_count_is_refused(shown):
    for explore in (widgets.explore_capacity, widgets.explore_correlation):
        with pytest.raises(InputError, match="unknown published threshold"):
            explore("quick", 0.8)
    assert shown == []
