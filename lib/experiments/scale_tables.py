"""Section 6 as tidy tables: fine-tuned chat models, ours beside the published, over seeds. Takes no model libraries.

Rows are one per evaluated checkpoint: run_id, profile, base, task ("facts", "hybrid" or "trivia"), mode, adaptation
("full" or "lora"), n_facts, seed, batch_size, lr, step, final (is it the run's last?), capability_task; recall,
capability, capability_base, tv and kl, each with its _stderr; and of ours capability_change, from the base's, item by
item.
"""

from ast import literal_eval

import numpy as np
import pandas as pd

from lib import paths
from lib.base import InputError
from lib.experiments.published import published_by_paper

#: What is known of a run at its last checkpoint. capability_relative: in percent of the model's before fine-tuning.
METRICS = ("recall", "capability", "capability_change", "capability_relative", "tv", "kl", "steps", "steps_to_recall")
#: What a point of a figure is about. source: "published", or the profile of our runs; model: as a legend names it.
POINT = ["source", "model", "base", "adaptation", "mode", "n_facts", "capability_task"]
#: With which settings of the training the runs of a point were made.
RECIPE = ["batch_size", "lr"]


def published_rows() -> pd.DataFrame:
    """Return the released checkpoints of Section 6 in the columns of our rows, step 0 (the base model) before each run.

    profile is "published", and seed is 0 throughout: every run was made once.
    """
    table = published_by_paper("large_scale_checkpoints").drop(columns=_COMPUTED)
    table.columns = table.columns.str.replace("hellaswag", "capability")
    trained, setting = table[table.step > 0], ["base", "mode", "n_facts", "max_epochs", *RECIPE]
    before = table[table.step == 0].drop(columns=setting[2:]).merge(trained[setting].drop_duplicates())
    base = before.groupby("base")[["capability", "capability_stderr"]].first()
    base = base.set_axis(["capability_base", "capability_base_stderr"], axis=1)
    rows = pd.concat([before, trained]).astype({"n_facts": int, "batch_size": int}).join(base, on="base")
    rows["run_id"] = "published/" + rows.base + "/" + rows["mode"] + "/" + rows.n_facts.astype(str)
    fixed = {"profile": "published", "task": "facts", "adaptation": "full", "seed": 0, "capability_task": "hellaswag"}
    rows = rows.assign(final=rows.step == rows.groupby("run_id").step.transform("max"), **fixed)
    return rows.sort_values(["run_id", "step"], ignore_index=True)


#: Released, but computed here as for our rows.
_COMPUTED = ["hellaswag_relative", "hellaswag_relative_stderr"]


def committed_rows() -> pd.DataFrame:
    """Return our rows in paper_data/scale.csv, of all profiles, of the latest run where one was made by two recipes."""
    path = paths.PAPER_DATA / "scale.csv"
    text = dict.fromkeys(("run_id", "commit", "python", "torch"), str)
    if not path.exists():
        return pd.DataFrame()
    rows = pd.read_csv(path, dtype=text)
    run = ["profile", "base", "task", "mode", "adaptation", "n_facts", "seed", *RECIPE]
    latest = rows.sort_values("finished_at").drop_duplicates(run, keep="last").run_id
    return rows[rows.run_id.isin(latest)].reset_index(drop=True)


def rate(lr: float) -> str:
    """Return a learning rate as it is written in a recipe: 1e-3, 2.5e-3."""
    mantissa, exponent = f"{lr:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def batches(rows: pd.DataFrame) -> str:
    """Return a sentence on the batches of runs: the commonest size, then each other one and which runs had it."""
    runs = rows.drop_duplicates("run_id")
    common = int(runs.batch_size.mode()[0])
    others = [
        f"{int(size)} for {base} {mode} with {' and '.join(', '.join(f'{n:,}' for n in facts).rsplit(', ', 1))} facts"
        for (size, base, mode), facts in runs[runs.batch_size != common]
        .sort_values("n_facts")
        .groupby(["batch_size", "base", "mode"])
        .n_facts
    ]
    return "; ".join([f"Batches of {common} conversations", *others]) + "."


def comparable(rows: pd.DataFrame | None = None, with_published: bool = True, threshold: float = 0.95) -> pd.DataFrame:
    """Return our runs at their last checkpoints and the paper's, over seeds: a row per `POINT`, smaller models first.

    rows: ours, as above, possibly none; what has no column is NaN. Of each of `METRICS` there are the mean over the
    `_seeds` in which it was measured, of `seeds`; `_std`; and `_stderr`, the larger of std / sqrt(seeds) and the
    measurement's own error, which seeds that answer the same questions do not lessen. `seeds_reaching_it` were averaged
    in `steps_to_recall`. Runs of different `RECIPE` are different rows; where those of a mode have several rates, their
    model's name says which. Two runs of one point, recipe and seed are an `InputError`.
    """
    tables = [each for each in (rows, published_rows() if with_published else None) if each is not None and len(each)]
    runs = pd.concat([_last_checkpoints(each, threshold) for each in tables]) if tables else pd.DataFrame()
    table = _over_seeds(runs, POINT, METRICS, RECIPE)
    order = table.assign(ours=table.source != "published", size=_n_params(table.base))
    order = order.sort_values(["ours", "size", "model", "mode", "n_facts"], na_position="first")
    table = table.loc[order.index].reset_index(drop=True)
    return table.rename(columns={"steps_to_recall_seeds": "seeds_reaching_it"})


def at_equal_facts(table: pd.DataFrame) -> pd.DataFrame:
    """Return runs in tool beside those in weights of the same model on as many facts: a row a pair.

    table: as `comparable` gives it. Columns of both end in _tool and _weight. same_recipe: whether learning rate and
    batch are equal. capability_saved: how much more of its capability a model keeps in tool, in percent of the base
    model's, with the _stderr of two independent accuracies (they answer the same questions, so it is rather too large).
    """
    pairs = _in_tool_and_in_weight(table, ["source", "base", "adaptation", "capability_task", "n_facts"])
    percent = pairs.capability_relative_tool / pairs.capability_tool
    return pairs.assign(
        capability_saved=pairs.capability_relative_tool - pairs.capability_relative_weight,
        capability_saved_stderr=percent * np.hypot(pairs.capability_stderr_tool, pairs.capability_stderr_weight),
    )


def at_any_facts(table: pd.DataFrame) -> pd.DataFrame:
    """Return each recipe in tool beside each one in weights of the same model, whatever their facts: a row a pair.

    table: as `comparable` gives it. Columns as in `at_equal_facts`, but capability_saved is in points of accuracy: how
    many more the runs in weights lost, by capability_change, with the _stderr of two independent changes.
    """
    pairs = _in_tool_and_in_weight(table, ["source", "base", "adaptation", "capability_task"])
    errors = pairs.capability_change_stderr_tool, pairs.capability_change_stderr_weight
    saved = pairs.capability_change_tool - pairs.capability_change_weight
    return pairs.assign(capability_saved=100 * saved, capability_saved_stderr=100 * np.hypot(*errors))


def at_equal_steps(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the last step at which runs in tool and in weights of one model, seed and number of facts were evaluated.

    rows: of checkpoints. A row a pair: base, n_facts, step, same_recipe (see `at_equal_facts`), metric_tool and
    metric_weight. The base model, step 0, does not count, and nor does what was not measured in both.
    """
    rows = rows[rows.step > 0].dropna(subset=metric)
    same = ["profile", "base", "task", "adaptation", "n_facts", "seed"]
    pairs = _in_tool_and_in_weight(rows, [*same, "step"]).sort_values("step").drop_duplicates(same, keep="last")
    columns = ["base", "n_facts", "step", "same_recipe", f"{metric}_tool", f"{metric}_weight"]
    return pairs.sort_values(same)[columns].reset_index(drop=True)


def _in_tool_and_in_weight(table: pd.DataFrame, same: list[str]) -> pd.DataFrame:
    modes = table["mode"].str.removesuffix("-text")  # calls or words, as the model's template has it
    tool, weight = (table[modes == mode].drop(columns="mode") for mode in ("in-tool", "in-weight"))
    pairs = tool.merge(weight, on=same, suffixes=("_tool", "_weight"))
    return pairs.assign(
        same_recipe=(pairs.lr_tool == pairs.lr_weight) & (pairs.batch_size_tool == pairs.batch_size_weight)
    )


def relative(rows: pd.DataFrame) -> pd.DataFrame:
    """capability in percent of capability_base, and its standard error, for every row.

    The error of the ratio a / b is, to first order, sqrt(da^2 + (a / b)^2 db^2) / b as if a and b were measured
    independently. They answer the same questions, so it is rather too large. The published error is this one, too.
    Where both were compared item by item (capability_change_stderr), as ours are, it is that of the change.
    """
    ratio = rows.capability / rows.capability_base
    error = np.hypot(rows.capability_stderr, ratio * rows.capability_base_stderr) / rows.capability_base
    if "capability_change_stderr" in rows:
        error = (rows.capability_change_stderr.astype(float) / rows.capability_base).fillna(error)
    return pd.DataFrame({"capability_relative": 100 * ratio, "capability_relative_stderr": 100 * error})


def steps_to_recall(rows: pd.DataFrame, threshold: float = 0.95) -> pd.DataFrame:
    """The first evaluated step at which a run's recall is `threshold`, whatever comes later; NaN where there is none.

    A row per run_id. The crossing is somewhere since the evaluation before: a stretch that, every place in it as likely
    as another, has a standard deviation of its length / sqrt(12), the `_stderr`.
    """
    first = rows[rows.recall >= threshold].groupby("run_id").step.min()
    before = rows[rows.step < rows.run_id.map(first)].groupby("run_id").step.max().reindex(first.index, fill_value=0)
    table = pd.DataFrame({"steps_to_recall": first, "steps_to_recall_stderr": (first - before) / np.sqrt(12)})
    return table.reindex(pd.Index(rows.run_id.unique(), name="run_id")).astype(float)


def steps_table(table: pd.DataFrame) -> str:
    """Steps to recall for LaTeX (booktabs): a row per model, a column per mode and number of facts.

    table: as `comparable` gives it. Several seeds: mean ± standard deviation, and how many of them where some did not
    reach the recall. A dash: none did; an empty cell: not run.
    """
    cells = table.assign(
        cell=[_cell(*row) for row in table[[*_CELL, "seeds_reaching_it", "seeds"]].itertuples(index=False)],
        order=table["mode"].map({"in-weight": 0}).fillna(1),  # before the tool
    )
    columns = cells[["order", "mode", "n_facts"]].drop_duplicates().sort_values(["order", "mode", "n_facts"])
    columns = pd.MultiIndex.from_frame(columns[["mode", "n_facts"]], names=["", "facts"])
    if cells.duplicated(["model", "mode", "n_facts"]).any():
        raise InputError("runs of one model differ in their capability task or recipe: give those of one")
    wide = cells.pivot(index="model", columns=["mode", "n_facts"], values="cell")
    wide = wide.reindex(index=table.model.unique(), columns=columns).fillna("")
    wide.columns = wide.columns.set_levels([f"{n:,}" for n in wide.columns.levels[1]], level=1)
    wide.index.name = None
    return wide.to_latex(escape=True, multicolumn_format="c", column_format="l" + "r" * len(columns))


_CELL = ["steps_to_recall", "steps_to_recall_std"]


def _cell(mean: float, std: float, reaching: int, seeds: int) -> str:
    if not reaching:
        return "--"
    spread = f" ± {std:,.0f}" if reaching > 1 else ""
    return f"{mean:,.0f}{spread}" + (f" ({reaching} of {seeds})" if reaching < seeds else "")


#: What a hybrid does with questions, by how often their facts were seen in training.
ASKED = ("call_share", "accuracy", "accuracy_of_calls")


def hybrid(rows: pd.DataFrame) -> pd.DataFrame:
    """How often hybrids call the tool and how often they are right, over seeds: a row per frequency in training.

    rows: as above, possibly none; the last checkpoints of hybrids count, whose `by_frequency` (a list, or its text in a
    file) holds, for each frequency, `n` questions and the shares `ASKED`. All of one setting, or an `InputError`. The
    columns are as in `comparable`; a share's own error is that of n questions, or as many as were looked up.
    """
    last = rows[rows.final & rows.task.eq("hybrid")] if len(rows) else rows
    table = [
        {**entry, "seed": run.seed}
        for run in last.itertuples()
        for entry in (literal_eval(run.by_frequency) if isinstance(run.by_frequency, str) else run.by_frequency)
    ]
    table = pd.DataFrame(table, columns=["frequency", "seed", "n", *ASKED], dtype=float)
    asked = {"call_share": table.n, "accuracy": table.n, "accuracy_of_calls": (table.n * table.call_share).round()}
    errors = {f"{share}_stderr": _share_stderr(table[share], n) for share, n in asked.items()}
    return _over_seeds(table.assign(**errors), ["frequency"], ASKED).sort_values("frequency", ignore_index=True)


def _over_seeds(runs: pd.DataFrame, point: list[str], metrics: tuple[str, ...], recipe=()) -> pd.DataFrame:
    """Return a row per point and recipe; two runs of one with the same seed are an `InputError`."""
    statistics = [f"{metric}{suffix}" for metric in metrics for suffix in ("", "_seeds", "_std", "_stderr")]
    if not len(runs):
        return pd.DataFrame(columns=[*point, *recipe, "seeds", *statistics])
    runs = runs.reindex(columns=[*point, *recipe, "seed", *statistics])
    for _, run in runs[runs.duplicated([*point, *recipe, "seed"])].iterrows():
        where = ", ".join(f"{name} {run[name]}" for name in [*point, "seed"] if pd.notna(run[name]))
        raise InputError(f"two runs of {where} differ in something else: give the rows of one setting")
    groups = runs.groupby([*point, *recipe], dropna=False, sort=False)
    table = {"seeds": groups.size()}
    for metric in metrics:
        count, std, own = groups[metric].count(), groups[metric].std(), groups[f"{metric}_stderr"].mean()
        table |= {metric: groups[metric].mean(), f"{metric}_seeds": count, f"{metric}_std": std}
        table[f"{metric}_stderr"] = np.fmax(std / np.sqrt(count), own)  # passes over a NaN
    return pd.DataFrame(table).reset_index()


def of_facts(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that are about facts of people; what hybrids learn is a mode of its own."""
    rows = rows[rows.task != "trivia"]
    return rows.assign(mode=rows["mode"].where(rows.task != "hybrid", "hybrid"))


def panels(rows: pd.DataFrame) -> pd.DataFrame:
    """Return our checkpoints on facts, possibly none, their bases named as panels of `scale_figures.against_steps`.

    A panel is a model in a profile; runs in weights at the rate of those in tool have their own, ", equal rates". Runs
    in tool are in every panel of their model. Adapters and hybrids are left out.
    """
    if not len(rows):
        return published_rows().iloc[:0]
    rows, model = rows[rows.task.eq("facts") & rows.adaptation.eq("full")], ["profile", "base"]
    tool, weight = (rows[rows["mode"].eq("in-weight") == is_weight] for is_weight in (False, True))
    rates = tool[[*model, "lr"]].drop_duplicates().assign(name=", equal rates")
    weight = weight.merge(rates, on=[*model, "lr"], how="left").fillna({"name": ""})
    tool = tool.merge(weight[[*model, "name"]].drop_duplicates(), on=model, how="left").fillna({"name": ""})
    both = pd.concat([weight, tool], ignore_index=True)
    return both.assign(base=both.base + both.name + " (" + both.profile + ")").drop(columns="name")


def _last_checkpoints(rows: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Our runs on facts: a row each, with all of `METRICS`; what hybrids learn is a mode of its own."""
    metrics = ("recall", "capability", "capability_change", "capability_base", "tv", "kl")
    measured = [f"{metric}{suffix}" for metric in metrics for suffix in ("", "_stderr")]
    rows = rows.reset_index(drop=True).reindex(columns=rows.columns.union([*measured, "capability_task", *RECIPE]))
    rows = rows.astype(dict.fromkeys(measured, float))  # a column may be None throughout
    last = of_facts(rows[rows.final & rows.step.gt(0)]).astype({"n_facts": int})
    lora = last.adaptation.eq("lora").map({True: ", LoRA", False: ""})
    rates = last.groupby(["profile", "base", "task", "mode", "adaptation"]).lr.transform("nunique")
    named = last.lr.map(lambda lr: f", rate {rate(lr)}", na_action="ignore").where(rates > 1, "")
    last = last.assign(
        source=last.profile,
        model=last.base + lora + named + " (" + last.profile + ")",
        steps=last.step,
        capability_task=last.capability_task.fillna(last.groupby("base").capability_task.transform("first")),
    )
    return last.join(relative(last)).merge(steps_to_recall(rows, threshold), on="run_id")


def _share_stderr(share: pd.Series, n: int) -> pd.Series:
    return np.sqrt(share * (1 - share) / (n - 1))


def by_family(bases) -> list[str]:
    """Return models family by family, smaller ones first: SmolLM-135M, SmolLM-360M, ..., Llama-3.2-1B, ..."""
    table = pd.DataFrame({"base": list(dict.fromkeys(bases))}, dtype=str)
    table = table.assign(size=_n_params(table.base), family=table.base.str.split("-").str[0])
    first = table.groupby("family")["size"].transform("min")
    return list(table.assign(first=first).sort_values(["first", "family", "size"]).base)


def _n_params(base: pd.Series) -> pd.Series:
    """Parameters as a model's name says them, 135M say; NaN where it does not."""
    size = base.astype(str).str.extract(r"(\d+(?:\.\d+)?)([MB])\b")
    return size[0].astype(float) * size[1].map({"M": 1e6, "B": 1e9}).astype(float)
