"""Section 6 as tidy tables: fine-tuned chat models, ours beside the published, over seeds. Needs no model libraries.

A row is an evaluated checkpoint: run_id, profile, base, task ("facts", "hybrid" or "trivia"), mode, adaptation
("full" or "lora"), n_facts, seed, batch_size, lr, step, final (whether it is the run's last), capability_task; recall,
capability, capability_base, tv and kl, each with its _stderr; in ours also capability_change (from the base, by item).
"""

from ast import literal_eval

import numpy as np
import pandas as pd

from lib.base import InputError
from lib.experiments.published import published_by_paper
from lib.experiments.rows import table_path
from lib.experiments.tables import read_table
from lib.finetune.bases import learning_rate

#: Measurements of a run's last checkpoint. capability_relative: in percent of the base model's.
METRICS = """recall capability capability_change capability_norm_change capability_relative
tv kl steps steps_to_recall""".split()
#: Columns that identify a point of a figure. source: "published", or the profile of our runs; model: a legend entry.
POINT = ["source", "model", "base", "adaptation", "mode", "n_facts", "capability_task", "capability_source"]
#: How the runs of a point were trained.
RECIPE = ["batch_size", "lr"]
#: The recall that counts as having learned.
LEARNED = 0.95


def published_rows() -> pd.DataFrame:
    """Return the released checkpoints of Section 6 in the columns of our rows, step 0 (the base model) before each run.

    profile is "published", and seed is 0 throughout: every run was made once.
    """
    table = published_by_paper("large_scale_checkpoints")
    table = table.drop(columns=["hellaswag_relative", "hellaswag_relative_stderr"])  # computed here, as for our rows
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


def committed_rows() -> pd.DataFrame:
    """Return our rows in paper_data, of all profiles; of runs that repeat a setting and seed, the latest."""
    rows = read_table(table_path("06"))
    if not len(rows):
        return rows
    run = ["profile", "base", "task", "mode", "adaptation", "n_facts", "seed", *RECIPE]
    latest = rows.sort_values("finished_at").drop_duplicates(run, keep="last").run_id
    return rows[rows.run_id.isin(latest)].reset_index(drop=True)


def rate(lr: float) -> str:
    """Return a learning rate as it is written in a recipe: 1e-3, 2.5e-3."""
    return np.format_float_scientific(lr, trim="-", exp_digits=1)


def batches(rows: pd.DataFrame) -> str:
    """Return a sentence on batch sizes: the most common one, then each other size and its runs."""
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


# ---- Runs at their last checkpoints


def comparable(rows: pd.DataFrame | None = None, with_published: bool = True) -> pd.DataFrame:
    """Return our runs at their last checkpoints and the paper's, over seeds: a row per `POINT`, smaller models first.

    rows: ours, in the columns above, possibly none; missing columns are NaN. Each of `METRICS` is the mean over
    the seeds that measured it. `_seeds` counts these, `seeds` counts all. `_std` is their standard deviation, `_stderr`
    the larger of std / sqrt(seeds) and the measurement's own error, which more seeds on the same questions do not
    reduce. `seeds_reaching_it` were averaged in `steps_to_recall`. If a point has several sources of capability items,
    capability is that of the named one ("": unnamed) with most runs. Runs of different `RECIPE` are different rows; if
    a mode has several rates, the model's name gives the rate. Two runs of one point, recipe and seed are an
    `InputError`.
    """
    tables = [each for each in (rows, published_rows() if with_published else None) if each is not None and len(each)]
    runs = pd.concat([_last_checkpoints(each) for each in tables]) if tables else pd.DataFrame()
    table = _over_seeds(runs, [*POINT, *RECIPE], METRICS)
    table = table.assign(ours=table.source != "published", size=_n_params(table.base))
    table = table.sort_values(["ours", "size", "model", "mode", "n_facts"], na_position="first", ignore_index=True)
    return table.drop(columns=["ours", "size"]).rename(columns={"steps_to_recall_seeds": "seeds_reaching_it"})


def _last_checkpoints(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a row per run on facts, with all of `METRICS`; hybrids are a mode of their own."""
    metrics = ("recall", "capability", "capability_change", "capability_norm_change", "capability_base", "tv", "kl")
    measured = [f"{metric}{suffix}" for metric in metrics for suffix in ("", "_stderr")]
    columns = rows.columns.union([*measured, "capability_task", "capability_source", *RECIPE])
    rows = rows.reset_index(drop=True).reindex(columns=columns)
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
    last = last.join(relative(last)).merge(steps_to_recall(rows), on="run_id")
    asked = last.capability_source.astype(object).fillna("")
    points = asked.groupby([last[name] for name in [*POINT[:-1], *RECIPE]], dropna=False)
    last["capability_source"] = points.transform(lambda of: [*of[of != ""].mode(), ""][0])
    capability = [name for name in last if name.startswith("capability") and name not in POINT]
    last.loc[asked != last.capability_source, capability] = np.nan  # measured on other items
    return last


def relative(rows: pd.DataFrame) -> pd.DataFrame:
    """Return capability in percent of capability_base, and its standard error, for every row.

    The error of the ratio a / b is, to first order, sqrt(da^2 + (a / b)^2 db^2) / b if a and b are measured
    independently. Here both answer the same questions, so it is rather too large. The published errors are computed
    alike. Our rows compare item by item: their error is that of the change (capability_change_stderr).
    """
    ratio = rows.capability / rows.capability_base
    error = np.hypot(rows.capability_stderr, ratio * rows.capability_base_stderr) / rows.capability_base
    if "capability_change_stderr" in rows:
        error = (rows.capability_change_stderr.astype(float) / rows.capability_base).fillna(error)
    return pd.DataFrame({"capability_relative": 100 * ratio, "capability_relative_stderr": 100 * error})


def steps_to_recall(rows: pd.DataFrame) -> pd.DataFrame:
    """Return by run_id the first evaluated step at which recall reaches `LEARNED`; NaN if it never does.

    The true crossing lies between the evaluation before and this one. `_stderr` is the standard deviation of a uniform
    distribution over this interval: its length / sqrt(12).
    """
    first = rows[rows.recall >= LEARNED].groupby("run_id").step.min()
    before = rows[rows.step < rows.run_id.map(first)].groupby("run_id").step.max().reindex(first.index, fill_value=0)
    table = pd.DataFrame({"steps_to_recall": first, "steps_to_recall_stderr": (first - before) / np.sqrt(12)})
    return table.reindex(pd.Index(rows.run_id.unique(), name="run_id")).astype(float)


def _over_seeds(runs: pd.DataFrame, point: list[str], metrics: list[str]) -> pd.DataFrame:
    """Return a row per point; two runs of one with the same seed are an `InputError`."""
    errors = [f"{metric}_stderr" for metric in metrics]
    runs = runs.reindex(columns=[*point, "seed", *metrics, *errors]).astype(dict.fromkeys([*metrics, *errors], float))
    for _, run in runs[runs.duplicated([*point, "seed"])].iterrows():
        where = ", ".join(f"{name} {run[name]}" for name in [*point, "seed"] if pd.notna(run[name]))
        raise InputError(f"two runs of {where} differ in something else: give the rows of one setting")
    groups = runs.groupby(point, dropna=False, sort=False)
    measured = groups[metrics]
    std, own = measured.std(), groups[errors].mean().set_axis(metrics, axis=1)
    error = np.fmax(std / np.sqrt(measured.count()), own)  # ignores a NaN
    statistics = {"": measured.mean(), "_seeds": measured.count(), "_std": std, "_stderr": error}
    columns = [table.add_suffix(suffix) for suffix, table in statistics.items()]
    table = pd.concat([groups.size().rename("seeds"), *columns], axis=1).reset_index()
    return table if len(table) else table.astype(object)  # else empty text columns become numbers


# ---- In tool beside in weights


def pairs(table: pd.DataFrame, equal_facts: bool = True) -> pd.DataFrame:
    """Return pairs of runs of one model, in tool and in weights: one row each, at equal n_facts if `equal_facts`.

    table: as `comparable` gives it. Columns of both end in _tool and _weight. same_recipe: whether learning rate and
    batch are equal. capability_saved: how much more of its capability a model keeps in tool, in percent of the base
    model's; points_saved: the same in points of accuracy, by capability_change. Each has the _stderr of two
    independent measurements (they answer the same questions, so it is rather too large), and is NaN if both answered
    items of different sources.
    """
    same = ["source", "base", "adaptation", "capability_task", *(["n_facts"] if equal_facts else [])]
    found = _in_tool_and_in_weight(table, same)
    percent = found.capability_relative_tool / found.capability_tool
    changes = found.capability_change_stderr_tool, found.capability_change_stderr_weight
    saved = {
        "capability_saved": found.capability_relative_tool - found.capability_relative_weight,
        "capability_saved_stderr": percent * np.hypot(found.capability_stderr_tool, found.capability_stderr_weight),
        "points_saved": 100 * (found.capability_change_tool - found.capability_change_weight),
        "points_saved_stderr": 100 * np.hypot(*changes),
    }
    same_items = found.capability_source_tool == found.capability_source_weight
    return found.assign(**{name: values.where(same_items) for name, values in saved.items()})


def at_equal_steps(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the last step at which the total variation of both runs of a pair was measured, and both values.

    rows: of checkpoints. A row per model, seed and number of facts: base, n_facts, step, same_recipe (see `pairs`),
    and of both modes (ending in _tool and _weight) tv and recall. The base model, step 0, does not count.
    """
    same = ["profile", "base", "task", "adaptation", "n_facts", "seed"]
    found = _in_tool_and_in_weight(rows[rows.step > 0].dropna(subset="tv"), [*same, "step"])
    found = found.sort_values("step").drop_duplicates(same, keep="last").sort_values(same)
    both = [f"{of}_{end}" for of in ("tv", "recall") for end in ("tool", "weight")]
    return found[["base", "n_facts", "step", "same_recipe", *both]].reset_index(drop=True)


def _in_tool_and_in_weight(table: pd.DataFrame, same: list[str]) -> pd.DataFrame:
    modes = table["mode"].str.removesuffix("-text")  # calls or text, depending on the chat template
    tool, weight = (table[modes == mode].drop(columns="mode") for mode in ("in-tool", "in-weight"))
    found = tool.merge(weight, on=same, suffixes=("_tool", "_weight"))
    return found.assign(
        same_recipe=(found.lr_tool == found.lr_weight) & (found.batch_size_tool == found.batch_size_weight)
    )


# ---- Hybrids, and figures


#: What a hybrid does with questions, by how often their facts were seen in training.
ASKED = ["call_share", "accuracy", "accuracy_of_calls"]


def hybrid(rows: pd.DataFrame) -> pd.DataFrame:
    """Return how often hybrids call the tool and are right, over seeds: a row per frequency in training.

    rows: as for `comparable`, of one setting, else an `InputError`. Only last checkpoints of hybrids are used: for each
    frequency, their `by_frequency` (a list, or its text in a file) holds the number of questions `n` and the shares
    `ASKED`. Columns are as in `comparable`; a share's own error is that of n questions, or of those looked up.
    """
    last = rows[rows.final & rows.task.eq("hybrid")] if len(rows) else rows
    table = [
        {**entry, "seed": run.seed}
        for run in last.itertuples()
        for entry in (literal_eval(run.by_frequency) if isinstance(run.by_frequency, str) else run.by_frequency)
    ]
    table = pd.DataFrame(table, columns=["frequency", "seed", "n", *ASKED], dtype=float)
    asked = dict.fromkeys(ASKED, table.n) | {"accuracy_of_calls": (table.n * table.call_share).round()}
    errors = {f"{name}_stderr": np.sqrt(table[name] * (1 - table[name]) / (n - 1)) for name, n in asked.items()}
    return _over_seeds(table.assign(**errors), ["frequency"], ASKED).sort_values("frequency", ignore_index=True)


def of_facts(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows about facts of people; hybrids are a mode of their own."""
    rows = rows[rows.task != "trivia"]
    return rows.assign(mode=rows["mode"].where(rows.task != "hybrid", "hybrid"))


def panels(rows: pd.DataFrame) -> pd.DataFrame:
    """Return our checkpoints on facts; `base` names their panel in `lib.figures.scale.against_steps`.

    A panel is a model in a profile. A learning rate that both modes have is a panel of its own, named "equal rates";
    it has the rows of this rate. Its rows are in the model's own panel, too, if it is the default rate of their mode.
    Adapters and hybrids are left out.
    """
    if not len(rows):
        return published_rows().iloc[:0]
    rows, model = rows.query("task == 'facts' and adaptation == 'full'"), ["profile", "base"]
    in_weight = rows["mode"] == "in-weight"
    shared = in_weight.groupby([rows[name] for name in (*model, "lr")]).transform("nunique") == 2
    default = [
        learning_rate(base, mode) == lr for base, mode, lr in rows[["base", "mode", "lr"]].itertuples(index=False)
    ]
    own, equal = rows[np.array(default, dtype=bool) | ~shared].assign(name=""), rows[shared]
    both = pd.concat([own, equal.assign(name=[f", equal rates {rate(lr)}" for lr in equal.lr])], ignore_index=True)
    return both.assign(base=both.base + both.pop("name") + " (" + both.profile + ")")


def by_family(bases) -> list[str]:
    """Return models family by family, smaller ones first: SmolLM-135M, SmolLM-360M, ..., Llama-3.2-1B, ..."""
    table = pd.DataFrame({"base": list(dict.fromkeys(bases))}, dtype=str)
    table = table.assign(size=_n_params(table.base), family=table.base.str.split("-").str[0])
    first = table.groupby("family")["size"].transform("min")
    return list(table.assign(first=first).sort_values(["first", "family", "size"]).base)


def _n_params(base: pd.Series) -> pd.Series:
    """Return the parameters that a model's name gives, 135M say; else NaN."""
    size = base.astype(str).str.extract(r"(\d+(?:\.\d+)?)([MB])\b")
    return size[0].astype(float) * size[1].map({"M": 1e6, "B": 1e9}).astype(float)
