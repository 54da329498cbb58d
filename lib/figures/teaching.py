"""Figures of the notebooks that teach or measure: of a training's inside, of a dialog, of speed."""

from collections.abc import Sequence
from itertools import cycle

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lib.base import InputError
from lib.figures.style import RC, STYLES
from lib.training.probes import MOMENTS


def performance(training: pd.DataFrame, curve: pd.DataFrame, growth: pd.DataFrame) -> Figure:
    """What speed was measured: throughput and share of the matrix-product peak against size, time to recall, growth.

    Tables as `lib.benchmarks` gives them: training (those of `training_throughput`, concatenated), curve
    (`learning_curve`), growth (`growth`). Bars go from the slowest to the fastest round.
    """
    with matplotlib.rc_context({**RC, "figure.figsize": (8.6, 6.2)}):
        figure, ((speed, share), (recall, cost)) = plt.subplots(2, 2)
        for (mode, contender), rows in training[training.dtype == "float32"].groupby(["mode", "contender"]):
            style = {**STYLES[mode], **_CONTENDERS[contender]}
            bars = [rows.per_second - rows.least, rows.most - rows.per_second]
            speed.errorbar(rows.d_model, rows.per_second, yerr=bars, capsize=2, label=f"{mode}, {contender}", **style)
            share.plot(rows.d_model, rows.share_of_peak, **style)
        speed.set(xscale="log", yscale="log", xlabel="d_model", ylabel="dialogs trained a second", title="throughput")
        share.set(
            xscale="log",
            xlabel="d_model",
            ylabel="share of the peak",
            title="the model's arithmetic, of the matrix-product peak",
        )
        share.set_ylim(bottom=0)
        for axes in (speed, share):
            axes.set_xticks(sorted(training.d_model.unique()), sorted(training.d_model.unique()))
            axes.minorticks_off()
        speed.set_ylim(top=2.5 * training.most.max())  # room for the legend
        speed.legend(fontsize=6.5, ncols=2, loc="upper center")
        recall.plot(curve.seconds, curve.recall, color=STYLES["in-weight"]["color"])
        recall.axhline(0.95, color="#999999", linewidth=0.8, linestyle="--")
        recall.set(xlabel="seconds of training", ylabel="recall", ylim=(-0.03, 1.06), title="time to recall, in-weight")
        bars = growth.microseconds - 1e6 / growth.most, 1e6 / growth.least - growth.microseconds
        cost.errorbar(growth.n_facts, growth.microseconds, yerr=bars, capsize=2, **STYLES["in-weight"])
        cost.set(
            xscale="log", xlabel="facts", ylabel="microseconds a dialog", title="a step does not grow with the facts"
        )
        cost.set_ylim(0, 1.3 * (1e6 / growth.least).max())
    return figure


_CONTENDERS = {
    "ours": {"linestyle": "--", "alpha": 0.7},
    "ours, compiled": {"linestyle": "-"},
    "Hugging Face": {"linestyle": ":", "markerfacecolor": "white"},
}


def probes(rows: list[dict], tensors: list[str] | None = None) -> Figure:
    """Moments of activations (above) and of the loss's gradient there (below) over steps, a line per tensor.

    rows: what a run wrote to probes.jsonl. tensors: which; by default the residual stream and what is read from it:
    the embedding, the sum after each block, the last norm and the logits. One that is not there is an `InputError`.
    """
    table = pd.DataFrame(rows, columns=["step", "tensor", "of", *MOMENTS])
    known = table.tensor.unique()
    names = tensors or [name for name in known if name.count(".") <= 1]
    if missing := [name for name in names if name not in known]:
        raise InputError(f"there are no probes of {missing[0]!r}: there are {', '.join(known)}")
    with matplotlib.rc_context({**RC, "figure.figsize": (9.6, 4.2), "lines.markersize": 3}):
        figure, panels = plt.subplots(2, len(MOMENTS), sharex=True)
        for of, line in zip(("output", "gradient"), panels, strict=True):
            for moment, axes in zip(MOMENTS, line, strict=True):
                for shade, marker, name in zip(np.linspace(0, 0.85, len(names)), cycle("osD^v"), names, strict=False):
                    chosen = table[(table.tensor == name) & (table.of == of)]
                    style = {"color": plt.get_cmap("viridis")(shade), "marker": marker, "linewidth": 1}
                    axes.plot(chosen.step, chosen[moment].astype(float), label=name, **style)
                axes.set(yscale=_SCALES[moment])
                axes.set_title(f"{moment} of the {of}", fontsize=9)
        for axes in panels[-1]:
            axes.set_xlabel("steps")
        if len(names):
            figure.legend(*panels[0, 0].get_legend_handles_labels(), fontsize=7, loc="outside right center")
    return figure


def trained_characters(tokens: Sequence[int], trained: Sequence[bool], width: int = 46) -> Figure:
    """A dialog of bytes, a character a cell, special tokens as U, A, D and E; what is trained is colored.

    tokens, trained: as `dialogs.encode_dialog` gives them for the byte tokenizer; of ASCII text.
    """
    shown = [_SPECIAL_TOKENS.get(token) or chr(token).replace("\n", "\u21b5") for token in tokens]
    with matplotlib.rc_context({**RC, "figure.figsize": (9, 0.26 * (len(tokens) // width + 1))}):
        figure, axes = plt.subplots()
        for i, (character, is_trained) in enumerate(zip(shown, trained, strict=True)):
            box = {"facecolor": "#F0B48A" if is_trained else "#EEEEEE", "edgecolor": "none", "pad": 2}
            axes.text(i % width, -(i // width), character, family="monospace", fontsize=9, bbox=box, ha="center")
        axes.set(xlim=(-1, width), ylim=(-(len(tokens) // width) - 0.5, 0.8))
        axes.axis("off")
    marked = zip(trained, [False, *trained], shown, strict=False)
    text = "".join(("" if now == before else "[" if now else "]") + character for now, before, character in marked)
    text += "]" * trained[-1]
    figure.set_label(f"A dialog, a character a cell; colored, here in brackets, is what is trained: {text}")
    return figure


_SPECIAL_TOKENS = {256: "U", 257: "A", 258: "D", 259: "E"}

#: The tails of gradients span orders of magnitude; near zero "symlog" is linear.
_SCALES = {"mean": "linear", "std": "log", "skew": "linear", "kurtosis": "symlog"}
