"""Figures: what is drawn is what the tables say, in whole files that are the same a second time."""

import json
import re
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from finished import FINISHED
from full_disk import full_after

from lib import paths
from lib.base import InputError, WorkError
from lib.config import ModelConfig
from lib.experiments import publishing, summaries, tables
from lib.experiments.published import published_by_paper
from lib.experiments.rows import sweep_dir
from lib.facts.entropy import entropy_bits_per_person
from lib.facts.people import ATTRIBUTES, RELEASED, FactsConfig
from lib.figures import generalization, parameter_bounds, record, style
from lib.model.bounds import BY_HAND_PARAMETERS, bits_at_recall
from lib.model.circuit import Circuit

PUBLISHED = published_by_paper("parameter_bounds")
PUBLISHED_RECALL = published_by_paper("recall_vs_parameters_in_weight")
PUBLISHED_UNSEEN = published_by_paper("generalization")


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch) -> Path:
    """runs, paper_data and the folder of this repository are somewhere else, and empty."""
    monkeypatch.setattr(paths, "ROOT", tmp_path / "root")
    monkeypatch.setattr(paths, "PAPER_DATA", tmp_path / "root" / "paper_data")
    monkeypatch.setenv("ITL_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("ITL_FIGURES", raising=False)
    base = SimpleNamespace(mode="in-tool", tokenizer="bytes", facts=FactsConfig(n_people=1), canonical_json=str)
    sizes, run_ids = range(99), [f"{size:012d}" for size in range(99)]
    search = SimpleNamespace(base=base, sizes=sizes, certain=sizes, run_ids=run_ids, threshold=None)
    monkeypatch.setattr(tables, "searches", lambda section, profile, tokenizer="bytes": [search])
    (tmp_path / "root" / "paper_data").mkdir(parents=True)
    return tmp_path


def _rows() -> list[dict]:
    """Two seeds that find their bound at d = 8 and d = 12, for both modes and two numbers of facts."""
    rows = []
    for mode in style.STYLES:
        for n_facts in (32, 128):
            for seed, enough in ((0, 8), (1, 12)):
                for d_model in (4, 8, 12):
                    rows.append(FINISHED | {
                        "run_id": f"{len(rows):012d}", "mode": mode, "n_facts": n_facts, "alpha": 0.0, "seed": seed,
                        "d_model": d_model, "n_params": ModelConfig(d_model=d_model).n_params,
                        "recall": 1.0 if d_model >= enough else 0.3, "stopped": "budget", "dialogs_seen": 640,
                        "commit": "a" * 40, **{f"nll_bits_{attribute}": 1.0 for attribute in ATTRIBUTES},
                        "new_pair_recall": 0.25, "trained_right_name": 0.75,
                    })  # fmt: skip
    return rows


def _finish(rows: list[dict], section: str, profile: str) -> None:
    for row in rows:
        folder = sweep_dir(section, profile) / row["run_id"]
        folder.mkdir(parents=True)
        (folder / "row.json").write_text(json.dumps(row))


def _png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", content[16:24])


def _pdf_text(path: Path) -> bytes:
    """A PDF with its compressed streams unpacked."""
    content = path.read_bytes()
    assert content.startswith(b"%PDF-") and content.rstrip().endswith(b"%%EOF")
    streams = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", content, re.DOTALL)
    return content + b"".join(zlib.decompressobj().decompress(stream) for stream in streams if stream[:1] == b"x")


@pytest.mark.parametrize("name", record.FIGURES)
def test_every_figure_is_drawn_to_whole_files_that_are_the_same_a_second_time_and_not_after_new_rows(places, name):
    sections = {"generalization": "05_2", "compressibility": "05_3", "patience": "05_1_patience"}
    section = sections.get(name, "05_1")

    def drawn(profile: str) -> list[bytes]:
        written = style.save(record.draw(name, profile), name, profile)
        assert [path.name for path in written] == [f"{name}.pdf", f"{name}.png"]
        assert sorted(path.name for path in written[0].parent.iterdir()) == sorted(path.name for path in written)
        width, height = _png_size(written[1])
        assert width > 1000 and height > 600  # 200 dots an inch
        return [path.read_bytes() for path in written]

    without_rows = drawn("laptop")
    _finish(_rows(), section, "laptop")
    publishing.table_of(section).add("laptop")
    with_rows = drawn("laptop")
    assert drawn("laptop") == with_rows != without_rows
    _finish(_rows(), section, "quick")
    shows_quick_rows = name != "bits_stored"
    assert (drawn("quick") != with_rows) == shows_quick_rows
    pdf = _pdf_text(paths.figures("quick") / f"{name}.pdf")
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf  # TrueType outlines, as journals ask for


def test_a_quick_figure_goes_to_runs_and_leaves_the_committed_ones(places):
    committed = places / "root" / "figures" / "parameter_bounds.png"
    committed.parent.mkdir()
    committed.write_bytes(b"committed")
    (pdf, png) = style.save(record.draw("parameter_bounds", "quick"), "parameter_bounds", "quick")
    assert pdf.parent == png.parent == places / "runs" / "quick" / "figures"
    assert committed.read_bytes() == b"committed" and len(list(committed.parent.iterdir())) == 1
    written = style.save(record.draw("parameter_bounds", "laptop"), "parameter_bounds", "laptop")
    assert written[1] == committed and committed.read_bytes() != b"committed"


def test_a_figure_that_cannot_be_written_leaves_the_earlier_one(places):
    (pdf, png) = style.save(record.draw("parameter_bounds"), "parameter_bounds", "quick")
    earlier = pdf.read_bytes(), png.read_bytes()
    with full_after(1_000), pytest.raises(WorkError, match="cannot write .*parameter_bounds.pdf: File too large"):
        style.save(record.draw("parameter_bounds"), "parameter_bounds", "quick")
    assert (pdf.read_bytes(), png.read_bytes()) == earlier and len(list(pdf.parent.iterdir())) == 2


# ---- What is drawn


def _with_own(table: pd.DataFrame, own: pd.DataFrame) -> pd.DataFrame:
    """The rows that count and those of the quick profile, as figures take them."""
    return pd.concat([table.assign(own=False), own.assign(own=True)], ignore_index=True)


def _lines(axes) -> dict[str, np.ndarray]:
    """Points (N, 2) of each labelled line; those with error bars too."""
    handles, labels = axes.get_legend_handles_labels()
    lines = [handle.lines[0] if hasattr(handle, "lines") else handle for handle in handles]
    return {label: line.get_xydata() for label, line in zip(labels, lines, strict=True)}


@pytest.mark.parametrize("threshold", [0.5, 0.95])
def test_the_published_points_are_drawn_where_the_table_has_them(threshold):
    (axes,) = record.draw("parameter_bounds", "laptop", threshold=threshold).axes
    drawn = _lines(axes)
    names = {label.split(", ")[0]: label for label in drawn if ", published" in label}
    assert set(names) == {"in-weight", "in-tool"}
    for mode in style.STYLES:
        table = PUBLISHED[(PUBLISHED["mode"] == mode) & (PUBLISHED.recall_threshold == threshold)]
        expected = table.dropna(subset="min_params_mean")[["n_facts", "min_params_mean"]].to_numpy()
        assert len(expected) > 5
        np.testing.assert_array_equal(drawn[names[mode]], expected[np.argsort(expected[:, 0])])
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert f"{threshold:.0%} recall" in axes.get_ylabel()


def _by_seed(rows: list[dict]) -> pd.DataFrame:
    return summaries.seeds_of_bounds(pd.DataFrame(rows)).query("recall_threshold == 0.95")


def test_every_seed_is_a_point_beside_the_others_of_its_number_of_facts():
    (axes,) = parameter_bounds.parameter_bounds(_by_seed(_rows()), PUBLISHED).axes
    drawn = _lines(axes)
    for mode in style.STYLES:
        x, y = drawn[f"{mode}, this repository"].T
        np.testing.assert_array_equal(y, [6_248, 10_908] * 2)  # seed 0, seed 1
        np.testing.assert_allclose(np.sqrt(x[::2] * x[1::2]), [32, 128])  # in the middle, on the logarithmic axis
        assert (x[::2] < x[1::2]).all() and (x[1::2] / x[::2] < 2**0.5).all()


def test_a_seed_without_a_bound_is_a_triangle_where_it_failed_or_succeeded():
    rows = [row for row in _rows() if row["n_facts"] == 128 and row["mode"] == "in-tool"]
    failed = [row | {"seed": 2, "recall": 0.3} for row in rows if row["seed"] == 0 and row["d_model"] < 12]
    reached = [row | {"seed": 3} for row in rows if row["seed"] == 1 and row["d_model"] == 12]
    seeds = _by_seed(rows + failed + reached)
    (axes,) = parameter_bounds.parameter_bounds(seeds, PUBLISHED).axes
    marks = {line.get_marker(): line.get_ydata().tolist() for line in axes.lines if line.get_marker() in ("^", "v")}
    assert {mark: [y for y in ys if y > 0] for mark, ys in marks.items()} == {"^": [6_248], "v": [10_908]}
    told = parameter_bounds.not_known_in_words(seeds)
    assert told == ["seed 2 needs more than 6,248", "seed 3 needs at most 10,908"]


def test_a_point_that_a_line_is_fitted_to_is_drawn_even_where_a_newer_recipe_has_its_place():
    seeds = _by_seed([row | {"n_facts": 256 * row["n_facts"]} for row in _rows()]).query("mode == 'in-tool'")
    earlier = seeds.assign(superseded=True, shown=seeds.n_facts < 32_768, recipe="earlier")
    newer = seeds.query("n_facts == 32_768")
    (axes,) = parameter_bounds.parameter_bounds(pd.concat([earlier, newer]), PUBLISHED).axes
    (dots,) = (line for line in axes.lines if line.get_marker() == "." and len(line.get_xdata()))
    assert sorted(dots.get_ydata()) == [6_248, 10_908]
    np.testing.assert_allclose(np.prod(dots.get_xdata()) ** 0.5, 32_768)


def test_the_fitted_line_and_its_legend_are_those_of_least_squares():
    rows = [row | {"n_facts": 256 * row["n_facts"]} for row in _rows() if row["n_params"] > 6_248 or row["seed"] == 0]
    (axes,) = parameter_bounds.parameter_bounds(_by_seed(rows), PUBLISHED).axes
    assert any(re.fullmatch("in-weight: [0-9.]+ parameters per fact", label) for label in _lines(axes))  # no interval
    points = pd.DataFrame(
        {"n_facts": [256, 512, 1024] * 3, "min_params": [5e3, 7e3, 1.2e4, 6e3, 7e3, 1.1e4] + [8e3] * 3}
    )
    points = points.assign(mode="in-weight", recall_threshold=0.95, seed=np.repeat(range(3), 3), shown=True)
    points = points.assign(more_than=np.nan, at_most=points.min_params)
    (axes,) = parameter_bounds.parameter_bounds(points, PUBLISHED).axes
    slope, intercept = np.polynomial.Polynomial.fit(points.n_facts, points.min_params, 1).convert().coef[::-1]
    (label,) = (label for label in _lines(axes) if "parameters per fact" in label)
    assert label.startswith(f"in-weight: {slope:.2g} (")
    x, y = _lines(axes)[label].T
    assert (x[0], x[-1]) == (256, 1024)
    np.testing.assert_allclose(y, intercept + slope * x)


def test_a_point_on_the_lower_bound_has_two_bits_a_parameter():
    (axes,) = record.draw("parameter_bounds", "laptop").axes
    (line,) = (line for label, line in _lines(axes).items() if "2 bits per parameter" in label)
    for n_facts, parameters in line:
        assert 2 * parameters == pytest.approx(n_facts / len(ATTRIBUTES) * bits_at_recall(0.95))


def test_quick_points_are_hollow_and_come_on_top_of_those_committed():
    table = _by_seed(_rows())
    (axes,) = parameter_bounds.parameter_bounds(_with_own(table, table), PUBLISHED).axes
    lines = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    for mode in style.STYLES:
        quick, committed = lines[f"{mode}, this repository (quick)"], lines[f"{mode}, this repository"]
        assert quick.get_markerfacecolor() == "white" != committed.get_markerfacecolor()
        assert quick.get_marker() == committed.get_marker()
        assert quick.get_zorder() > committed.get_zorder()


def test_the_modes_differ_by_more_than_color():
    colors, markers = zip(*((style["color"], style["marker"]) for style in style.STYLES.values()), strict=True)
    assert len(set(colors)) == len(set(markers)) == len(style.STYLES)
    red, green, blue = np.array([matplotlib.colors.to_rgb(color) for color in colors]).T
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    assert abs(grey[0] - grey[1]) > 0.08


def test_recall_is_drawn_against_parameters_as_measured():
    rows = pd.DataFrame(_rows())
    left, right = parameter_bounds.recall_against_parameters(rows, PUBLISHED_RECALL).axes
    for axes, mode in ((left, "in-weight"), (right, "in-tool")):
        assert axes.get_title() == mode and axes.get_xscale() == "log"
        drawn = {label: points for label, points in _lines(axes).items() if not label.startswith("published")}
        assert set(drawn) == {"32", "128"}
        for points in drawn.values():  # means over the two seeds
            np.testing.assert_allclose(points, [[2_612, 0.3], [6_248, 0.65], [10_908, 1.0]])


def test_a_number_of_facts_has_the_look_of_todays_recipe_in_the_legend_if_it_has_rows():
    rows = pd.DataFrame(_rows())
    both = pd.concat([rows.assign(superseded=False), rows.assign(superseded=True)])
    earlier = rows[rows.n_facts == 32].assign(superseded=True)
    for table, alphas in ((both, {"32": 1, "128": 1}), (earlier, {"32": style.EARLIER["alpha"]})):
        legend = parameter_bounds.recall_against_parameters(table, PUBLISHED_RECALL).axes[1].get_legend()
        shown = dict(zip((text.get_text() for text in legend.get_texts()), legend.legend_handles, strict=True))
        assert {name: handle.get_alpha() for name, handle in shown.items()} == alphas


def test_the_published_recall_curves_lie_behind_the_in_weight_panel():
    left, right = record.draw("recall_vs_parameters").axes
    assert len(right.lines) == 0
    curves = {float(np.nanmax(line.get_xdata())) for line in left.lines if len(line.get_xdata())}
    assert curves == {float(curve.min_params_mean.max()) for _, curve in PUBLISHED_RECALL.groupby("n_facts")}


def _held(**columns) -> pd.DataFrame:
    rows = pd.DataFrame([
        {"n_facts": 64, "n_params": 2000, "stored_bits": 490.0, "recall": 1.0, "stopped": "recall"},
        {"n_facts": 256, "n_params": 2000, "stored_bits": 900.0, "recall": 0.5, "stopped": "budget"},
        {"n_facts": 256, "n_params": 4000, "stored_bits": 100.0, "recall": 0.0, "stopped": "hopeless"},
    ])  # fmt: skip
    return rows.assign(entropy_bits=rows.n_facts * 7.8, **columns)


def test_full_models_are_filled_and_hopeless_ones_are_left_out():
    (axes,) = parameter_bounds.bits_stored(_held()).axes
    drawn = {
        tuple(point): line.get_markerfacecolor() != "white"
        for line in axes.lines if line.get_marker() == "o" for point in line.get_xydata()
    }  # fmt: skip
    assert drawn == {(2000, 490): False, (2000, 900): True}


def test_the_lines_of_one_and_two_bits_a_parameter_are_where_they_say():
    (axes,) = parameter_bounds.bits_stored(_held()).axes
    lines = [line for line in axes.lines if line.get_color() == "#777777"]
    for bits, line in zip((1, 2), lines, strict=True):
        x, y = line.get_data()
        np.testing.assert_allclose(y, bits * np.asarray(x))


def _shares() -> pd.DataFrame:
    """Two seeds of an in-tool model that copies pairs of known names only, and an in-weight control."""
    rows = []
    for seed in (0, 1):
        for n_facts in (256, 4096):
            for kind in generalization.KINDS:
                knows = kind == "trained" or (kind == "new_pair" and n_facts == 4096)
                point = {"n_facts": n_facts, "n_params": 60_372, "d_model": 36, "seed": seed, "kind": kind}
                for measure in ("recall", "right_name"):
                    rows.append({**point, "mode": "in-tool", "measure": measure, "share": knows * (0.8 + 0.2 * seed)})
                rows.append({**point, "mode": "in-weight", "measure": "recall", "share": 0.0})
    return pd.DataFrame(rows)


def test_the_construction_is_a_level_line():
    (axes,) = record.draw("parameter_bounds", "laptop").axes
    lines = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    assert list(lines["set by hand, for any number of facts"].get_ydata()) == [BY_HAND_PARAMETERS] * 2


def test_the_construction_has_as_many_parameters_as_figures_say():
    assert Circuit().n_params == BY_HAND_PARAMETERS


def test_recall_of_unseen_people_is_drawn_by_what_is_new_in_their_names_a_point_a_seed():
    *of_kinds, generalizing = generalization.generalization(_shares(), PUBLISHED_UNSEEN).axes
    assert [axes.get_title() for axes in of_kinds] == list(generalization.KINDS.values())[1:]
    for axes, knows in zip(of_kinds, (1, 0, 0, 0), strict=True):
        drawn = _lines(axes)
        # Both seeds with 256 facts, then both with 4,096; or by seed.
        np.testing.assert_allclose(sorted(drawn["60,372, in-tool"][:, 1]), [0, 0, 0.8 * knows, knows])
        np.testing.assert_allclose(drawn["60,372, in-weight"][:, 1], 0)
        assert len({*drawn["60,372, in-tool"][:, 0]}) == 4  # none hides another
    assert list(generalizing.lines[0].get_ydata()) == [0, 0]  # pairs of known names are not enough


def test_the_share_of_seeds_that_generalize_has_an_interval_that_holds_it():
    def share(generalize: int, seeds: int) -> np.ndarray:
        shares = _shares().query("mode == 'in-tool' and n_facts == 256 and seed == 0")
        shares = pd.concat(shares.assign(seed=i, share=0.9 + 0.1 * (i < generalize)) for i in range(seeds))
        return summaries.seeds_that_generalize(shares)[["share", "low", "high"]].to_numpy()[0]

    for generalize, seeds in ((0, 3), (2, 3), (9, 10), (10, 10)):
        found, low, high = share(generalize, seeds)
        assert found == generalize / seeds and 0 <= low <= found <= high <= 1
        for end in {low, high} - {0, 1}:  # the score test rejects no share inside, and all outside
            assert abs(found - end) == pytest.approx(1.96 * (end * (1 - end) / seeds) ** 0.5)


def test_the_largest_models_are_drawn_strongest_the_only_ones_among_them():
    def strengths(shares: pd.DataFrame) -> list[float]:
        handles, labels = generalization.generalization(shares, PUBLISHED_UNSEEN).axes[0].get_legend_handles_labels()
        return [h.get_alpha() for h, label in zip(handles, labels, strict=True) if "in-tool" in label]

    assert strengths(_shares()) == [1]
    small, middle, large = strengths(pd.concat(_shares().assign(n_params=n) for n in (900, 30_000, 7000)))
    assert 0 < small < middle < large == 1


def test_patience_is_drawn_against_passes_over_the_facts():
    held = pd.DataFrame({
        "n_facts": [64, 64], "n_params": [6_248, 6_248], "seed": [0, 0], "dialogs_seen": [640, 6_400],
        "recall": [0.25, 1.0], "stored_bits": [624.8, 3_124.0],
    })  # fmt: skip
    recall, bits = parameter_bounds.patience(held).axes
    (label,) = _lines(recall)
    np.testing.assert_allclose(_lines(recall)[label], [[10, 0.25], [100, 1]])
    np.testing.assert_allclose(_lines(bits)[label], [[10, 0.1], [100, 0.5]])


@pytest.mark.parametrize(("d_model", "recall", "known"), [
    (40, 0.975, "At 8,192 facts one in-weight model of 72,200 parameters reaches 95% (seed 0). The next smaller "
                "size was not tried, so this is a triangle in the figure."),
    (40, 0.5, "At 8,192 facts no smallest in-weight model is known yet (largest tried: 72,200 parameters)."),
])  # fmt: skip
def test_words_beside_the_main_figure_say_what_is_known_where_no_bound_is(d_model, recall, known):
    more = _rows()[0] | {"n_facts": 8192, "d_model": d_model, "n_params": ModelConfig(d_model=d_model).n_params}
    more |= {"mode": "in-weight", "recall": recall, "lr": 0.005}
    _finish([more], "05_1", "laptop")
    assert parameter_bounds.bounds_not_known("laptop") == [known]


def test_words_beside_the_main_figure_say_how_many_seeds_stand_behind_each_mode(monkeypatch):
    rows = pd.DataFrame(_rows()).query("mode == 'in-weight' or seed == 0").assign(lr=0.01, batch_size=32)
    rows["superseded"] = rows["mode"] == "in-tool"
    monkeypatch.setattr(summaries, "bounds_rows", lambda profile: rows)
    said = parameter_bounds.bounds_in_words("laptop")
    assert said[0].startswith(
        "At 128 facts our models need 8,578 parameters in weights (known for 2 of 2 seeds) and 6,248 with "
    )
    assert "(known for 1 of 1 seeds, earlier recipe), a factor of 1.4" in said[0]
    assert said[1:] == ["In weights: learning rate 0.01, batches of 32 (32 to 128 facts)."]
    decays = rows["mode"].map({"in-tool": 0.3, "in-weight": 0.1})
    rows = rows.assign(superseded=False, config=[json.dumps({"optim": {"weight_decay": decay}}) for decay in decays])
    assert parameter_bounds.bounds_in_words("laptop")[1] == "Weight decay: 0.1 in weights, 0.3 with a tool."


def test_words_beside_correlation_say_how_far_parameters_and_bits_fall():
    published = pd.read_csv(paths.PUBLISHED / "compressibility.csv")
    published = (
        published.query("n_facts == 4000 and recall_threshold == 0.95").set_index("correlation_alpha").min_params
    )
    bits = [entropy_bits_per_person(1000, 0, alpha, RELEASED) for alpha in (0.0, 1.0)]
    fall, less = 1 - published[1.0] / published[0.0], 1 - bits[1] / bits[0]
    assert f"published, parameters {fall:.0%} and bits {less:.0%}. " in parameter_bounds.falls_in_words("laptop")
    alphas = {(32, 1): 0.0, (128, 0): 1.0}  # d = 12 is enough, d = 8
    rows = [(alphas.get((row["n_facts"], row["seed"])), row) for row in _rows() if row["mode"] == "in-weight"]
    rows = [row | {"n_facts": 4000, "alpha": alpha, "seed": 0} for alpha, row in rows if alpha is not None]
    rows = pd.DataFrame(rows).assign(profile="laptop", run_id=lambda table: "f" + table.run_id.str[1:])  # not planned
    rows.to_csv(paths.PAPER_DATA / "compressibility.csv", index=False)
    told = parameter_bounds.falls_in_words("laptop")
    assert f"; ours, by an earlier recipe, parameters {1 - 6_248 / 10_908:.0%} and bits" in told


def test_compressibility_is_drawn_against_correlation_and_against_bits():
    published = pd.DataFrame({
        "n_facts": [4000, 4000], "alpha": [0.0, 1.0], "recall_threshold": [0.95, 0.95], "min_params": [50_000, 20_000],
        "entropy_bits": [31_000.0, 20_000.0],
    })  # fmt: skip
    ours = published.rename(columns={"min_params": "min_params_mean"}).assign(
        mode="in-weight", law="ours", min_params_min=published.min_params, min_params_max=published.min_params + 5000
    )
    by_alpha, by_entropy = parameter_bounds.compressibility(ours, published).axes
    for label in ("published: 4,000 facts, released law", "ours: 4,000 facts, cross-entropy loss, batches of 64"):
        np.testing.assert_allclose(_lines(by_alpha)[label], [[0, 50_000], [1, 20_000]])
    np.testing.assert_allclose(
        _lines(by_entropy)["ours: 4,000 facts, cross-entropy loss, batches of 64"], [[31_000, 50_000], [20_000, 20_000]]
    )


# ---- What is refused


def test_an_unknown_figure_is_one_sentence_that_lists_those_there_are():
    with pytest.raises(InputError, match="unknown figure 'bounds': there are parameter_bounds, recall"):
        record.draw("bounds")


#: What the label of published points says in each figure that has them: facts, of whom, by which law.
PUBLISHED_LABELS = {
    "parameter_bounds": {"in-weight, published: 8 to 65,536 independent facts",
                         "in-tool, published: 8 to 131,072 independent facts"},
    "recall_vs_parameters": {"published: 4,096 to 32,768 independent facts"},
    "generalization": {"new first name, published: 256 to 131,072 independent facts"},
    "compressibility": {"published: 4,000 facts, released law", "published: 32,768 facts, released law"},
}  # fmt: skip


@pytest.mark.parametrize("name", record.FIGURES)
def test_a_published_points_label_names_facts_people_and_law(name):
    figure = record.draw(name, "laptop")
    legends = [*figure.legends, *filter(None, (axes.get_legend() for axes in figure.axes))]
    labels = {text.get_text().replace("\n", " ") for legend in legends for text in legend.get_texts()}
    assert {label for label in labels if "published" in label} == PUBLISHED_LABELS.get(name, set())


def test_published_people_of_5_2_stand_among_those_with_new_first_names_only():
    grey = "#888888"
    for axes in record.draw("generalization", "laptop").axes:
        has_theirs = any(line.get_color() == grey for line in axes.get_lines())
        assert has_theirs == (axes.get_title() == "new first name")


def test_published_points_of_5_3_stand_at_the_entropy_of_the_released_law():
    by_entropy = record.draw("compressibility", "laptop").axes[1]
    bits = by_entropy.get_lines()[0].get_xdata()  # of 1,000 people, alpha from 0 to 1
    assert bits.max() == pytest.approx(31_250, abs=10) and bits.min() == pytest.approx(14_300, abs=50)


def test_an_option_that_a_figure_does_not_have_is_one_sentence():
    with pytest.raises(InputError, match="unknown option 'threshold' of the figure generalization: there are none"):
        record.draw("generalization", threshold=0.9)


def test_a_threshold_without_published_points_is_refused():
    with pytest.raises(InputError, match=r"unknown published threshold 0\.8: .* 0\.5, 0\.9, 0\.95, 0\.99"):
        record.draw("parameter_bounds", "laptop", threshold=0.8)
