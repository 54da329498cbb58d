"""What the notebook of Section 4 shows of models from the inside, and how the construction grows."""

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lib.evaluation.attention_maps import attention_weights, dialog_tokens, spans
from lib.evaluation.recall import Fact
from lib.figures.style import RC
from lib.model.transformer import Transformer


def attention_maps(model: Transformer, fact: Fact, heads: dict[str, tuple[int, int]]) -> Figure:
    """What heads attend to in a fact's in-tool dialog: a panel for each of `heads`, title -> (block, head).

    A row is a position, from top to bottom, a column what it sees; more attention is darker, from 0 to 1. Ticks
    say where the parts of the dialog begin.
    """
    weights = attention_weights(model, dialog_tokens(fact).to(model.device))[:, 0].cpu()
    parts = [span for span in spans(fact) if span.stop - span.start > 2]
    starts, names = [span.start for span in parts], [span.part for span in parts]
    n_rows = -(-len(heads) // 4)
    with matplotlib.rc_context({**RC, "figure.figsize": (11, 3.1 * n_rows), "font.size": 7, "axes.grid": False}):
        figure, panels = plt.subplots(n_rows, min(4, len(heads)), squeeze=False, sharey=True)
        for axes, (title, (block, head)) in zip(panels.flat, heads.items(), strict=False):
            axes.imshow(
                weights[block, head].numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="auto"
            )
            axes.set_title(f"{title}\n(block {block + 1}, head {head + 1})")
            axes.set_xticks(starts, names, rotation=90)
            axes.set_yticks(starts, names)
    return figure


def copying_maps(heads: dict[str, tuple[Transformer, int, int]], fact: Fact) -> Figure:
    """How the name comes into the request: a panel for each of `heads`, title -> (model, block, head).

    A row is the letter that is to be said next, a column a letter of the question; more attention is darker.
    """
    places = {span.part: span for span in spans(fact)}
    said, source = places["name asked"], places["name"]
    letters = [chr(byte) for byte in fact[0].encode()]
    with matplotlib.rc_context({**RC, "figure.figsize": (2.9 * len(heads), 2.9), "font.size": 8, "axes.grid": False}):
        figure, panels = plt.subplots(1, len(heads), squeeze=False)
        for axes, (title, (model, block, head)) in zip(panels.flat, heads.items(), strict=True):
            weights = attention_weights(model, dialog_tokens(fact).to(model.device))[block, 0, head].cpu()
            shown = weights[said.start - 1 : said.stop - 1, source.start : source.stop].numpy()
            axes.imshow(shown, cmap="Blues", vmin=0, vmax=1)
            axes.set_title(f"{title}\n(block {block + 1}, head {head + 1})", fontsize=8)
            axes.set_xticks(range(len(letters)), letters)
            axes.set_yticks(range(len(letters)), letters)
        panels[0, 0].set_ylabel("next letter of the request")
        figure.supxlabel("letter of the question", fontsize=8)
    return figure


def copying_by_letter(tables: dict[str, pd.DataFrame]) -> Figure:
    """How a name is copied, letter by letter: attention on the letter that is next, and whether it is said.

    tables: by what a legend calls them, rows of `inside.copying` of one copy and one head; letters that stand in few
    of the names are left out.
    """
    with matplotlib.rc_context({**RC, "figure.figsize": (9.6, 3)}):
        figure, panels = plt.subplots(1, 2, sharey=True)
        means = {label: rows.groupby(["word", "letter"])[["mass", "right"]].mean() for label, rows in tables.items()}
        common = [
            place
            for place in sorted(set.intersection(*(set(table.index) for table in means.values())))
            if all((rows.groupby(["word", "letter"]).size()[place] > 5) for rows in tables.values())
        ]
        ticks = [f"{letter + 1}" if letter else f"1\nname {word + 1}" for word, letter in common]
        markers = dict(zip(means, "sov^D", strict=False))
        for axes, column in zip(panels, ("mass", "right"), strict=True):
            for label, table in means.items():
                axes.plot(range(len(common)), table.loc[common, column], marker=markers[label], label=label)
            axes.set(ylim=(-0.05, 1.05), xlabel="letter of the name")
            axes.set_xticks(range(len(common)), ticks)
        panels[0].set_ylabel("attention on the next letter")
        panels[1].set_ylabel("share said rightly")
        figure.legend(*panels[0].get_legend_handles_labels(), fontsize=7, loc="outside lower center", ncols=len(tables))
    return figure


def parameters_by_attributes(sizes: pd.DataFrame) -> Figure:
    """Parameters of the construction against |A|, and a square law through the last point.

    sizes: n_attributes and n_params.
    """
    with matplotlib.rc_context({**RC, "figure.figsize": (4.6, 3.2)}):
        figure, axes = plt.subplots()
        x, y = sizes.n_attributes.to_numpy(float), sizes.n_params.to_numpy(float)
        axes.plot(x, y[-1] * (x / x[-1]) ** 2, color="#777777", linestyle="--", label="proportional to $|A|^2$")
        axes.plot(x, y, marker="o", color="#009E73", linestyle="none", label="constructed by hand")
        axes.set(xscale="log", yscale="log", xlabel="attributes $|A|$", ylabel="parameters")
        axes.set_xticks(x, [f"{n:.0f}" for n in x])
        axes.minorticks_off()
        axes.set_ylim(bottom=np.min(y) / 2)
        axes.legend(fontsize=8)
    return figure
