"""Figures of Section 6: what is drawn is what the tables say, whatever is missing, and can be told apart in grey."""

import re
from functools import cache

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.container import BarContainer

from lib import paths
from lib.experiments import scale_tables
from lib.figures import scale, style

RELEASED = pd.read_csv(paths.PUBLISHED / "large_scale_checkpoints.csv").query("step > 0").sort_values("step")
RUN = ["base", "mode", "n_facts"]
LAST = RELEASED.drop_duplicates(RUN, keep="last")
AGAINST_FACTS = ("steps_to_recall", "forgetting")
CURVES = {"recall": "recall", "capability_relative": "hellaswag_relative", "tv": "tv", "kl": "kl"}


def rows(profile="laptop", seeds=(0, 1), **columns) -> pd.DataFrame:
    """Two checkpoints a run, in-weight and in-tool, with 100 and 1,000 facts."""
    table = pd.DataFrame([
        {
            "run_id": f"{profile}-{mode}-{n_facts}-{seed}", "mode": mode, "n_facts": n_facts, "seed": seed,
            "step": step, "final": step == 40, "tv": (0.2 if mode == "in-weight" else 0.02) * step / 40 + 0.01 * seed,
            "recall": step / 40, "capability": 0.7,
        }
        for mode in ("in-weight", "in-tool") for n_facts in (100, 1000) for seed in seeds for step in (0, 20, 40)
    ])  # fmt: skip
    errors = {f"{name}_stderr": 0.02 for name in ("tv", "recall", "capability", "capability_base")}
    fixed = {
        "profile": profile,
        "task": "facts",
        "base": "SmolLM2-135M",
        "adaptation": "full",
        "capability_task": "trivia",
    }
    return table.assign(**{**errors, **fixed, "capability_base": 0.8, **columns})


def hybrid(frequencies) -> pd.DataFrame:
    shares = {"call_share": 0.5, "accuracy": 0.8, "accuracy_of_calls": 0.9, "n": 50}
    asked = [{"frequency": frequency, **shares} for frequency in frequencies]
    run = {"task": "hybrid", "seed": 0, "final": True, "by_frequency": asked}
    return scale_tables.hybrid(pd.DataFrame([run]))


@cache
def tables() -> dict[str, pd.DataFrame]:
    every = pd.concat([rows(), rows("quick", seeds=(0,)), rows("paper", base="Big-7B", capability=np.nan)])
    return {
        "both": scale_tables.comparable(every),
        "ours": scale_tables.comparable(rows(seeds=(0,)), with_published=False),
        "published": scale_tables.comparable(pd.DataFrame()),
        "nothing": scale_tables.comparable(pd.DataFrame(), with_published=False),
    }


def _lines(axes) -> dict[str, object]:
    """The containers of lines with error bars by their label."""
    handles, labels = axes.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


def _points(container) -> np.ndarray:
    return container.lines[0].get_xydata()


def _bars(container) -> np.ndarray:
    """Half the height of every vertical bar."""
    segments = container.lines[2][-1].get_segments()
    return np.array([(segment[1, 1] - segment[0, 1]) / 2 for segment in segments])


# ---- Where points are


@cache
def curves() -> pd.DataFrame:
    rows = scale_tables.published_rows()
    return rows.join(scale_tables.relative(rows))


def _rate(text: str, mode: str) -> float:
    """The learning rate of a mode that a label names: "rate 1e-3", or "rate 1e-3 in-weight, 1e-4 in-tool"."""
    rates = dict(re.findall(r"([\d.]+e-\d+) (in-[a-z]+)", text))
    rates = {mode: value for value, mode in rates.items()}
    return float(rates[mode] if rates else re.search(r"rate ([\d.]+e-\d+)", text)[1])


@pytest.mark.parametrize(("panel", "y"), [(0, "recall"), (1, "hellaswag_relative"), (2, "tv")])
def test_published_points_are_where_the_table_has_them(panel, y):
    axes = scale.forgetting(tables()["published"]).axes[panel]
    measured = LAST.dropna(subset=y)
    lines = _lines(axes)
    assert len(lines) == len(measured.groupby(["base", "mode"]))
    for (base, mode), points in measured.groupby(["base", "mode"]):
        (label,) = (label for label in lines if label.startswith(f"{base} (published), {mode}, "))
        points = points.sort_values("n_facts")
        np.testing.assert_allclose(_points(lines[label]), points[["n_facts", y]], rtol=5e-5)
        np.testing.assert_allclose(_bars(lines[label]), points[f"{y}_stderr"], rtol=1e-4)


@pytest.mark.parametrize("metric", CURVES)
def test_a_curve_is_a_released_run_and_its_label_names_facts_and_rate(metric):
    figure = scale.against_steps(curves(), metric)
    assert [axes.get_title().split("\n")[0] for axes in figure.axes] == scale_tables.by_family(RELEASED.base)
    for axes in figure.axes:
        base, rates = axes.get_title().split("\n")
        drawn = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        runs = RELEASED[RELEASED.base == base]
        assert len(drawn) == len(runs.groupby(RUN)) == 6
        for (_, mode, n_facts), run in runs.groupby(RUN):
            line = drawn[f"{mode}, {n_facts:,.0f} facts, rate {scale_tables.rate(run.lr.iloc[0])}"]
            run = run[run[CURVES[metric]] > 0] if metric in ("tv", "kl") else run
            np.testing.assert_allclose(line.get_xydata(), run[["step", CURVES[metric]]], rtol=1e-4)
            assert _rate(rates, mode) == LAST.set_index(RUN).lr[base, mode, n_facts]  # to read, too
        assert any(text.get_text() == "in-tool: no values" for text in axes.texts) == (
            base == "Llama-3.1-8B" and metric in ("tv", "kl")
        )


def test_the_legend_of_curves_tells_modes_and_numbers_of_facts_apart():
    figure = scale.against_steps(curves(), "recall")
    (legend,) = figure.legends
    listed = {text.get_text(): line for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)}
    kinds = LAST[["mode", "n_facts"]].drop_duplicates()
    assert set(listed) == {f"{mode}, {n_facts:,.0f} facts" for mode, n_facts in kinds.itertuples(index=False)}
    look = lambda line: (line.get_color(), line.get_linestyle(), line.get_marker())  # noqa: E731
    assert len({look(line)[1:] for line in listed.values()}) == len(listed)  # without color
    for axes in figure.axes:
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True):
            assert look(line) == look(listed[label.partition(", rate")[0]])


@pytest.mark.parametrize("name", AGAINST_FACTS)
def test_every_label_of_published_points_names_their_facts_and_rate(name):
    figure = getattr(scale, name)(tables()["both"])
    (legend,) = figure.legends
    shown = dict(text.get_text().split("\n", 1) for text in legend.get_texts() if "\n" in text.get_text())
    labels = {label for axes in figure.axes for label in _lines(axes)}
    for (base, mode), runs in LAST.groupby(["base", "mode"]):
        facts = [f"{n:,.0f}" for n in sorted({runs.n_facts.min(), runs.n_facts.max()})]
        (rate,) = set(runs.lr)
        text = f"{mode}, {' to '.join(facts)} facts, rate {scale_tables.rate(rate)}"
        assert text in [line.strip() for line in shown[f"{base} (published)"].split("\n")]
        if name == "forgetting":
            assert f"{base} (published), {text}" in labels


def test_nothing_to_draw_is_said():
    assert [text.get_text() for text in scale.against_steps(curves()[:0], "tv").axes[0].texts] == [
        "no fine-tuned runs yet"
    ]


def test_our_points_are_means_with_their_errors_and_nothing_is_drawn_for_what_was_not_measured():
    table = tables()["both"]
    _, relative, variation = scale.forgetting(table).axes
    lines = _lines(relative)
    assert not [label for label in lines if label.startswith("Big-7B")]
    line = lines["SmolLM2-135M (laptop), in-tool, 100 to 1,000 facts"]
    np.testing.assert_allclose(_points(line), [[100, 87.5], [1000, 87.5]])
    np.testing.assert_allclose(_bars(line), 87.5 * np.hypot(0.02 / 0.7, 0.02 / 0.8))
    line = _lines(variation)["Big-7B (paper), in-weight, 100 to 1,000 facts"]
    np.testing.assert_allclose(_points(line), [[100, 0.205], [1000, 0.205]])


def test_the_axis_names_the_task_of_capability_if_there_is_one():
    both, published = (scale.forgetting(tables()[which]).axes[1].get_ylabel() for which in ("both", "published"))
    assert both == "capability, % of the base model's" and published == "HellaSwag accuracy, % of the base model's"


@pytest.mark.parametrize(("frequencies", "axis"), [([0, 2, 8], "symlog"), ([1, 10], "log"), ([0], "symlog")])
def test_a_hybrid_is_drawn_against_frequency_and_facts_never_seen_have_their_place(frequencies, axis):
    calls, right = scale.hybrid(hybrid(frequencies)).axes
    assert (calls.get_xscale(), right.get_xscale()) == (axis, axis)
    assert ("linear below" in calls.get_xlabel()) == (axis == "symlog")
    drawn = {label: _points(line)[:, 1] for label, line in _lines(right).items()}
    np.testing.assert_array_equal(drawn["all questions"], [0.8] * len(frequencies))
    np.testing.assert_array_equal(drawn["those looked up"], [0.9] * len(frequencies))
    positions = calls.transData.transform([(frequency, 0.5) for frequency in frequencies])[:, 0]
    assert np.isfinite(positions).all() and (np.diff(positions) > 0).all()
    low, high = calls.get_xlim()
    assert low < min(frequencies) and max(frequencies) < high


# ---- Whole, and readable


@pytest.mark.parametrize("name", AGAINST_FACTS)
@pytest.mark.parametrize("which", ["both", "ours", "published", "nothing"])
def test_nothing_lies_over_anything_whatever_is_missing(name, which):
    figure = getattr(scale, name)(tables()[which])
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    frames = [axes.get_window_extent(renderer) for axes in figure.axes]
    outside = [label for axes in figure.axes for label in (axes.xaxis.label, axes.yaxis.label)] + figure.legends
    for box in (artist.get_window_extent(renderer) for artist in outside):
        if box.width and box.height:
            assert not any(box.overlaps(frame) for frame in frames)
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
    ticks = [axes.xaxis.get_ticklabels() for axes in figure.axes]
    for labels in ticks:
        boxes = [label.get_window_extent(renderer) for label in labels if label.get_text()]
        assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))
    listed = [text.get_text().split("\n")[0] for text in figure.legends[0].get_texts()]
    table = tables()[which]
    assert set(listed) == set(table.model) | set(table["mode"])


def test_every_point_drawn_is_in_sight():
    for name in AGAINST_FACTS:
        for axes in getattr(scale, name)(tables()["both"]).axes:
            (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
            for line in _lines(axes).values():
                x, y = _points(line).T
                assert (x > left).all() and (x < right).all() and (y >= low).all() and (y <= high).all()


def test_models_modes_and_sources_differ_by_more_than_color():
    axes = scale.forgetting(tables()["both"]).axes[2]
    looks = {label: container.lines[0] for label, container in _lines(axes).items()}
    published = [line for label, line in looks.items() if "(published), in-weight" in label]
    assert len({line.get_marker() for line in published}) == len(published) == 6
    in_weight, in_tool = (
        looks[f"SmolLM2-135M (laptop), {mode}, 100 to 1,000 facts"] for mode in ("in-weight", "in-tool")
    )
    assert in_weight.get_marker() == in_tool.get_marker()
    assert in_weight.get_linestyle() != in_tool.get_linestyle()
    assert (in_weight.get_fillstyle(), in_tool.get_fillstyle()) == ("full", "left")
    quick = looks["SmolLM2-135M (quick), in-weight, 100 to 1,000 facts"]
    assert quick.get_marker() == in_weight.get_marker()
    assert quick.get_markerfacecolor() == "white" != in_weight.get_markerfacecolor()
    assert in_weight.get_zorder() > published[0].get_zorder()
    lightness = [sum(matplotlib.colors.to_rgb(line.get_color())) for line in (*published, in_weight)]
    assert sorted(lightness, reverse=True) == lightness


@pytest.mark.parametrize("name", ["forgetting", "hybrid"])
def test_files_are_the_same_a_second_time(name, tmp_path, monkeypatch):
    monkeypatch.setenv("ITL_FIGURES", str(tmp_path))
    table = hybrid([0, 1]) if name == "hybrid" else tables()["both"]
    drawn = [[path.read_bytes() for path in style.save(getattr(scale, name)(table), name, "laptop")] for _ in range(2)]
    assert drawn[0] == drawn[1] and b"/Type3" not in drawn[0][0]


def test_trivia_has_a_bar_for_each_way_and_kind_of_questions_with_its_error():
    ways, kinds = ["in-tool, native", "in-weight", "closed-book"], ["trained on", "held out"]
    table = pd.DataFrame(
        [{"way": way, "questions": kind, "accuracy": 0.1 * i + 0.05 * j, "n_questions": 20 * (i + 1)}
         for i, way in enumerate(ways) for j, kind in enumerate(kinds)]
    )  # fmt: skip
    figure = scale.trivia(table, "SmolLM2-135M")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["closed-book", "in-weight", "in-tool, native"]
    bars = [container for container in axes.containers if isinstance(container, BarContainer)]
    for j, container in enumerate(bars):
        assert [bar.get_height() for bar in container] == pytest.approx([0.2 + 0.05 * j, 0.1 + 0.05 * j, 0.05 * j])
        segments = container.errorbar.lines[2][0].get_segments()
        for bar, ((_, low), (_, high)), n in zip(container, segments, (60, 40, 20), strict=True):
            assert low < high  # also at 0 of 20
            for end in (low, high):  # as far from the share as 1.96 of its own standard errors
                assert (bar.get_height() - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / n, abs=1e-9)
    corners = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for container in bars for bar in container)
    assert len(corners) == 6 and all(
        end <= start + 1e-9 for (_, end), (start, _) in zip(corners, corners[1:], strict=False)
    )
    assert [text.get_text() for text in figure.legends[0].get_texts()] == kinds
    assert len({bar.get_hatch() for container in bars for bar in container}) == 2


def test_like_with_like_joins_the_released_values_of_each_model():
    pairs = scale_tables.pairs(scale_tables.comparable()).query("same_recipe")
    capability, variation = scale.like_with_like(pairs).axes
    models = [label.get_text().split(",")[0] for label in capability.get_yticklabels()]
    assert models == ["Llama-3.1-8B", "Llama-3.2-3B", "Llama-3.2-1B"]  # from below
    last = LAST[LAST.n_facts == 500].set_index(["mode", "base"])
    for axes, column in ((capability, "hellaswag_relative"), (variation, "tv")):
        for container, label in zip(*axes.get_legend_handles_labels(), strict=True):
            drawn = container.lines[0].get_xdata().astype(float)
            np.testing.assert_allclose(drawn, last.loc[label].loc[models, column].to_numpy(float), rtol=1e-3)
    for axes in scale.like_with_like(pairs.iloc[:0]).axes:
        assert [text.get_text() for text in axes.texts] == ["no comparable runs yet"]
