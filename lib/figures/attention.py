"""Figures of the notebook of Section 4: the construction, and attention inside models."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.evaluation.attention_maps import attention_weights, dialog_tokens, spans
from lib.evaluation.recall import Fact
from lib.figures.style import panels, shared_legend
from lib.model.transformer import Transformer

#: What each block of the circuit does, what its feed-forward layer adds, and what then is in the residual stream.
_BLOCKS = (
    ("counts", "place $p$ and $p^2$", "tokens, places"),
    ("reads", "which attribute is asked for", "attribute,\nlengths so far"),
    ("copies", "letters of the fixed text", "next letter"),
)


def sketch(heads: dict[str, tuple[int, int]]) -> Figure:
    """Sketch the transformer set by hand, `lib.model.circuit` (Section 4): what its blocks do, one after the other.

    heads: title -> (block, head). Blue boxes are heads, grey ones feed-forward layers; below is the residual stream.
    """
    top = 1 + max(sum(block == i for block, _ in heads.values()) for i in range(len(_BLOCKS)))
    with panels((9.6, 0.7 + 0.45 * top), rc={"axes.grid": False}) as (figure, axes):
        axes.annotate("", (2.75, -0.4), (-0.75, -0.4), arrowprops={"arrowstyle": "->", "color": "#777777"})
        axes.text(-0.6, -0.6, "tokens", ha="center", va="top")
        for i, (does, feed_forward, stream) in enumerate(_BLOCKS):
            axes.text(i, top, f"block {i + 1} {does}", ha="center", va="center", weight="bold")
            titles = [title for title, (block, _) in heads.items() if block == i]
            for y, title in enumerate(reversed(titles), 1):
                _box(axes, i, y, title, "#CCE3F2")
            _box(axes, i, 0, f"feed-forward: {feed_forward}", "#EEEEEE")
            axes.text(i + 0.5, -0.6, stream, ha="center", va="top")
        axes.set(xlim=(-0.8, 2.8), ylim=(-1.4, top + 0.4))
        axes.set_axis_off()
    return figure


def _box(axes: Axes, x: float, y: float, text: str, color: str) -> None:
    box = {"boxstyle": "round,pad=0.35", "facecolor": color, "edgecolor": "#999999", "linewidth": 0.6}
    axes.text(x, y, text, ha="center", va="center", fontsize=7.5, bbox=box)


def attention_maps(model: Transformer, fact: Fact, heads: dict[str, tuple[int, int]]) -> Figure:
    """Draw what heads attend to in a fact's in-tool dialog: a panel for each of `heads`, title -> (block, head).

    Rows are positions, from top to bottom, columns the positions they see; more attention is darker, from 0 to 1.
    Ticks say where the parts of the dialog begin.
    """
    weights = _weights(model, fact)
    parts = {span.part: span.start for span in reversed(spans(fact)) if span.stop - span.start > 2}  # the first of each
    ticks = sorted((start, part) for part, start in parts.items())
    n_rows = -(-len(heads) // 4)
    rc = {"font.size": 7, "axes.grid": False}
    with panels((11, 3.4 * n_rows), n_rows, min(4, len(heads)), rc, squeeze=False, sharey=True) as (figure, grid):
        for axes, (title, head) in zip(grid.flat, heads.items(), strict=False):
            _map(axes, title, head, weights[head], dict(ticks[::2]), interpolation="nearest", aspect="auto")
            for axis in (axes.xaxis, axes.yaxis):  # every other label stands further out, or they overlap
                axis.set_ticks(*zip(*ticks[1::2], strict=True), minor=True)
            axes.tick_params(which="minor", length=52, width=0.4, color="#BBBBBB")
            axes.tick_params("y", which="minor", length=52 if axes in grid[:, 0] else 3)
            axes.tick_params("x", which="both", rotation=90)
    return figure


def copying_maps(heads: dict[str, tuple[Transformer, int, int]], fact: Fact) -> Figure:
    """Draw how the name gets into the request: a panel for each of `heads`, title -> (model, block, head).

    Rows are the letters to be said next, columns the letters of the question; more attention is darker.
    """
    places = {span.part: span for span in spans(fact)}
    said, source = places["name asked"], places["name"]
    letters = dict(enumerate(map(chr, fact[0].encode())))
    rc = {"font.size": 8, "axes.grid": False}
    with panels((2.9 * len(heads), 2.9), 1, len(heads), rc, squeeze=False) as (figure, grid):
        for axes, (title, (model, *head)) in zip(grid.flat, heads.items(), strict=True):
            weights = _weights(model, fact)[*head, said.start - 1 : said.stop - 1, source.start : source.stop]
            _map(axes, title, head, weights, letters)
            axes.title.set_fontsize(8)
        grid[0, 0].set_ylabel("next letter of the request")
        figure.supxlabel("letter of the question (darker: more attention)", fontsize=8)
    return figure


def _weights(model: Transformer, fact: Fact) -> np.ndarray:
    """Return the attention of all heads in a fact's in-tool dialog: (L, H, S, S)."""
    return attention_weights(model, dialog_tokens(fact).to(model.device))[:, 0].cpu().numpy()


def _map(axes: Axes, title: str, head: tuple[int, int], weights: np.ndarray, ticks: dict[int, str], **options) -> None:
    axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, **options)
    axes.set_title(f"{title}\n(block {head[0] + 1}, head {head[1] + 1})")
    axes.set_xticks(list(ticks), ticks.values())
    axes.set_yticks(list(ticks), ticks.values())


_COLORS = ("#009E73", "#0072B2", "#56B4E9", "#999999", "#CC79A7")  # Okabe and Ito; in-tool blue as elsewhere


def copying_by_letter(tables: dict[str, pd.DataFrame]) -> Figure:
    """Draw how a name is copied, letter by letter: attention on the letter that is next, and whether it is said.

    tables: label -> rows of `attention_maps.copying` for one copy and one head. Letters that few names have are left
    out.
    """
    letters = pd.concat(tables, names=["label"]).groupby(["label", "word", "letter"])[["mass", "right"]]
    means = letters.mean()[letters.size() > 5].unstack("label").dropna()  # of letters that all tables have
    ticks = [f"{letter + 1}" if letter else f"1\nname {word + 1}" for word, letter in means.index]
    with panels((9.6, 3), 1, 2, sharey=True) as (figure, (mass, right)):
        for axes, column in ((mass, "mass"), (right, "right")):
            for label, marker, color in zip(tables, "DsovP", _COLORS, strict=False):
                axes.plot(range(len(means)), means[column, label], marker=marker, color=color, label=label)
            axes.set(ylim=(-0.05, 1.05), xlabel="letter of the name")
            axes.set_xticks(range(len(means)), ticks)
        mass.set_ylabel("attention on the next letter")
        right.set_ylabel("share of letters said right")
        shared_legend(figure, [mass], loc="outside lower center")
    return figure
