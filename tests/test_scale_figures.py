"""Figures of Section 6: what is drawn is what the tables say, whatever is missing, and can be told apart in grey."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.container import BarContainer

from lib import figure_style, paths, scale_figures, scale_results

PUBLISHED = pd.read_csv(paths.PUBLISHED / "large_scale_final.csv")
PUBLISHED["n_facts"] = PUBLISHED.n_facts.map({"500": 500, "1k": 1_000, "5k": 5_000, "10k": 10_000, "50k": 50_000})
NAMES = {"Lam1B": "Llama-3.2-1B", "Lam3B": "Llama-3.2-3B", "Lam8B": "Llama-3.1-8B"}
NAMES |= {"Smol135M": "SmolLM-135M", "Smol360M": "SmolLM-360M", "Smol1.7B": "SmolLM-1.7B"}
AGAINST_FACTS = ("capability", "total_variation", "total_variation_against_steps", "steps_to_recall", "forgetting")


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
    fixed = {"profile": profile, "task": "facts", "base": "embedded", "adaptation": "full", "capability_task": "skills"}
    return table.assign(**{**errors, **fixed, "capability_base": 0.8, **columns})


def hybrid(frequencies) -> pd.DataFrame:
    shares = {"call_share": 0.5, "accuracy": 0.8, "accuracy_of_calls": 0.9, "n": 50}
    asked = [{"frequency": frequency, **shares} for frequency in frequencies]
    run = {"task": "hybrid", "seed": 0, "final": True, "by_frequency": asked}
    return scale_results.hybrid(pd.DataFrame([run]))


def tables() -> dict[str, pd.DataFrame]:
    every = pd.concat([rows(), rows("quick", seeds=(0,)), rows("paper", base="Big-7B", capability=np.nan)])
    return {
        "both": scale_results.comparable(every),
        "ours": scale_results.comparable(rows(seeds=(0,)), with_published=False),
        "published": scale_results.comparable(pd.DataFrame()),
        "nothing": scale_results.comparable(pd.DataFrame(), with_published=False),
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


@pytest.mark.parametrize(
    ("name", "panel", "x", "y"),
    [
        ("capability", 0, "n_facts", "hellaswag_absolute"),
        ("capability", 1, "n_facts", "hellaswag_relative"),
        ("total_variation", 0, "n_facts", "tv"),
        ("total_variation_against_steps", 0, "steps", "tv"),
        ("forgetting", 0, "n_facts", "recall_max"),
        ("forgetting", 1, "n_facts", "hellaswag_relative"),
        ("forgetting", 2, "n_facts", "tv"),
        ("steps_to_recall", 0, "n_facts", "steps"),
    ],
)
def test_published_points_are_where_the_table_has_them(name, panel, x, y):
    axes = getattr(scale_figures, name)(tables()["published"]).axes[panel]
    measured = PUBLISHED.dropna(subset=y)
    if name == "steps_to_recall":
        measured = measured[measured.recall_max >= 0.95]
    lines = _lines(axes)
    assert len(lines) == len(measured.groupby(["base", "mode"]))
    for (base, mode), points in measured.groupby(["base", "mode"]):
        label = f"{NAMES[base]} (published), {mode}"
        points = points.sort_values("n_facts")
        np.testing.assert_array_equal(_points(lines[label]), points[[x, y]])
        if f"{y}_stderr" in points:
            np.testing.assert_allclose(_bars(lines[label]), points[f"{y}_stderr"], rtol=1e-6)


def test_our_points_are_means_with_their_errors_and_nothing_is_drawn_for_what_was_not_measured():
    table = tables()["both"]
    hellaswag, skills, relative = scale_figures.capability(table).axes
    assert not [label for label in _lines(hellaswag) if "published" not in label]
    assert set(_lines(skills)) == {
        f"embedded ({p}), {m}" for p in ("laptop", "quick") for m in ("in-weight", "in-tool")
    }
    line = _lines(relative)["embedded (laptop), in-tool"]
    np.testing.assert_allclose(_points(line), [[100, 87.5], [1000, 87.5]])
    np.testing.assert_allclose(_bars(line), 87.5 * np.hypot(0.02 / 0.7, 0.02 / 0.8))
    (axes,) = scale_figures.total_variation(table).axes
    np.testing.assert_allclose(_points(_lines(axes)["Big-7B (paper), in-weight"]), [[100, 0.205], [1000, 0.205]])


def test_a_thin_line_per_run_leads_to_the_last_checkpoints():
    (axes,) = scale_figures.total_variation_against_steps(tables()["ours"], rows(seeds=(0,))).axes
    thin = [line for line in axes.lines if line.get_linewidth() < 1 and len(line.get_xdata())]
    assert len(thin) == 4
    for line in thin:
        height = 0.2 if line.get_linestyle() == "-" else 0.02
        np.testing.assert_allclose(line.get_xydata(), [[20, height / 2], [40, height]])


@pytest.mark.parametrize(("frequencies", "scale"), [([0, 2, 8], "symlog"), ([1, 10], "log"), ([0], "symlog")])
def test_a_hybrid_is_drawn_against_frequency_and_facts_never_seen_have_their_place(frequencies, scale):
    calls, right = scale_figures.hybrid(hybrid(frequencies)).axes
    assert (calls.get_xscale(), right.get_xscale()) == (scale, scale)
    assert ("linear below" in calls.get_xlabel()) == (scale == "symlog")
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
    figure = getattr(scale_figures, name)(tables()[which])
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
    listed = [text.get_text() for text in figure.legends[0].get_texts()]
    table = tables()[which]
    assert set(listed) == set(table.model) | set(table["mode"])


def test_every_point_drawn_is_in_sight():
    for name in AGAINST_FACTS:
        for axes in getattr(scale_figures, name)(tables()["both"]).axes:
            (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
            for line in _lines(axes).values():
                x, y = _points(line).T
                assert (x > left).all() and (x < right).all() and (y >= low).all() and (y <= high).all()


def test_models_modes_and_sources_differ_by_more_than_color():
    (axes,) = scale_figures.total_variation(tables()["both"]).axes
    looks = {label: container.lines[0] for label, container in _lines(axes).items()}
    published = [line for label, line in looks.items() if "(published), in-weight" in label]
    assert len({line.get_marker() for line in published}) == len(published) == 6
    in_weight, in_tool = (looks[f"embedded (laptop), {mode}"] for mode in ("in-weight", "in-tool"))
    assert in_weight.get_marker() == in_tool.get_marker()
    assert in_weight.get_linestyle() != in_tool.get_linestyle()
    assert (in_weight.get_fillstyle(), in_tool.get_fillstyle()) == ("full", "left")
    quick = looks["embedded (quick), in-weight"]
    assert quick.get_marker() == in_weight.get_marker()
    assert quick.get_markerfacecolor() == "white" != in_weight.get_markerfacecolor()
    assert in_weight.get_zorder() > published[0].get_zorder()
    lightness = [sum(matplotlib.colors.to_rgb(line.get_color())) for line in (*published, in_weight)]
    assert sorted(lightness, reverse=True) == lightness


@pytest.mark.parametrize("name", ["forgetting", "hybrid"])
def test_files_are_whole_and_the_same_a_second_time(name, tmp_path, monkeypatch):
    monkeypatch.setenv("ITL_FIGURES", str(tmp_path))
    table = hybrid([0, 1]) if name == "hybrid" else tables()["both"]
    pdf, png = figure_style.save(getattr(scale_figures, name)(table), name, "laptop")
    first = pdf.read_bytes(), png.read_bytes()
    assert first[0].startswith(b"%PDF-") and first[0].rstrip().endswith(b"%%EOF") and b"/Type3" not in first[0]
    assert first[1].startswith(b"\x89PNG\r\n\x1a\n") and first[1].endswith(b"IEND\xaeB`\x82")
    figure_style.save(getattr(scale_figures, name)(table), name, "laptop")
    assert (pdf.read_bytes(), png.read_bytes()) == first


def test_trivia_has_a_bar_for_each_way_and_kind_of_questions_with_its_error():
    ways, kinds = ["in-tool, native", "in-weight", "closed-book"], ["trained on", "held out"]
    table = pd.DataFrame(
        [{"way": way, "questions": kind, "accuracy": 0.1 * i + 0.05 * j, "standard_error": 0.01 * (i + 1)}
         for i, way in enumerate(ways) for j, kind in enumerate(kinds)]
    )  # fmt: skip
    figure = scale_figures.trivia(table)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["closed-book", "in-weight", "in-tool, native"]
    bars = [container for container in axes.containers if isinstance(container, BarContainer)]
    for j, container in enumerate(bars):
        assert [bar.get_height() for bar in container] == pytest.approx([0.2 + 0.05 * j, 0.1 + 0.05 * j, 0.05 * j])
        segments = container.errorbar.lines[2][0].get_segments()
        assert [high - low for (_, low), (_, high) in segments] == pytest.approx([0.06, 0.04, 0.02])
    corners = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for container in bars for bar in container)
    assert len(corners) == 6 and all(
        end <= start + 1e-9 for (_, end), (start, _) in zip(corners, corners[1:], strict=False)
    )
    assert [text.get_text() for text in figure.legends[0].get_texts()] == kinds
    assert len({bar.get_hatch() for container in bars for bar in container}) == 2
