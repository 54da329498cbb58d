"""General capability of chat models, by lm-eval: HellaSwag, or our trivia as multiple choice (Section 6)."""

import hashlib
import logging
import os
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from random import Random
from typing import Literal

import lm_eval
from datasets import Dataset
from huggingface_hub import HfApi
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from pydantic import BaseModel, TypeAdapter
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from lib.base import parse_line
from lib.finetune.conversations import as_user
from lib.finetune.triviaqa import SHIPPED, load_questions
from lib.paths import read_bytes, reading
from lib.progress import progress

#: Environment variable with the path of HellaSwag's validation set, JSON lines like the hub's. Unset: the hub.
HELLASWAG = "ITL_HELLASWAG"
#: How many items are asked between two updates of the progress bar.
ITEMS_AT_A_TIME = 100


class _Item(BaseModel):
    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: tuple[str, str, str, str]
    label: Literal[0, 1, 2, 3, "0", "1", "2", "3"]


def measure_capability(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str | dict,
    n_items: int | None = None,
    *,
    description: str | None = None,
) -> dict[str, list[float]]:
    """Return which of the first `n_items` of an lm-eval task (multiple choice) are answered right: 1 or 0 per item.

    task: "hellaswag", from the file that the variable `HELLASWAG` names or from the hub; "trivia", of
    `trivia_choices`; or a task as a dict. Keys of the result are the metrics acc (the likeliest ending) and acc_norm
    (normalized by length). It seeds torch's, NumPy's and Python's global random states, as lm-eval does. Raises
    `InputError` if the items cannot be loaded.
    """
    task = trivia_choices(tokenizer) if task == "trivia" else task
    name, rows = task if isinstance(task, str) else task["task"], []
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about what is intended
    hellaswag = f"{Path(lm_eval.__file__).parent}/tasks/hellaswag"  # alone: listing all tasks takes seconds
    if task == "hellaswag" and (file := os.environ.get(HELLASWAG)):
        changed = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": file}}}
        task = {"group": "of_file", "task": [{"task": name, "training_split": None, **changed}]}
    with reading(f"the items of {name}, from the hub or a file that {HELLASWAG} names", KeyError):
        loaded = TaskManager(include_path=hellaswag, include_defaults=False).load([task])
        items = range(len(loaded["tasks"][name].eval_docs))[:n_items]
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)
    set_seed(1234)
    with progress(len(items), description) as bar, redirect_stderr(StringIO()):  # lm-eval has a bar of its own
        for start in items[::ITEMS_AT_A_TIME]:
            chunk = list(items[start : start + ITEMS_AT_A_TIME])
            measured = lm_eval.evaluate(harness, loaded, samples={name: chunk}, bootstrap_iters=0)
            rows += sorted(measured["samples"][name], key=lambda row: row["doc_id"])
            bar.update(len(chunk))
    return {metric: [float(row[metric]) for row in rows] for metric in ("acc", "acc_norm")}


def check_hellaswag() -> None:
    """Raise `InputError` if the file that `HELLASWAG` names cannot be read, or one of its lines is no item."""
    if not (file := os.environ.get(HELLASWAG)):
        return
    with reading(f"{file}, which {HELLASWAG} names"):
        lines, item = read_bytes(file).rstrip().splitlines(), TypeAdapter(_Item)  # the last lines may be blank
        for number, line in enumerate(lines or [b""], start=1):
            parse_line(item, line, number, "a line is an item as JSON, like the hub's")


def capability_source(test: str) -> str:
    """Return the source of a test's items: "hub", or a digest of their file (trivia: the shipped one)."""
    file = SHIPPED if test == "trivia" else os.environ.get(HELLASWAG)
    return f"file {hashlib.sha256(Path(file).read_bytes()).hexdigest()[:8]}" if file else "hub"


def choose_test(capability: str) -> str | None:
    """Return the test that `FinetuneConfig.capability` asks for; "any": HellaSwag, or trivia without the hub."""
    if capability == "any" and not os.environ.get(HELLASWAG):
        try:
            HfApi().dataset_info("Rowan/hellaswag", timeout=5)
        except Exception:  # errors without a connection depend on the HTTP client, and are not documented
            return "trivia"
    return {"any": "hellaswag", "none": None}.get(capability, capability)


def trivia_choices(tokenizer: PreTrainedTokenizerBase) -> dict:
    """Return our questions, in a chat template, as a task: four answers each, wrong ones from other questions."""
    questions, draw, rows = load_questions(), Random(0), []
    for text, answer, aliases in questions:
        wrong = {other.answer for other in questions if other.answer not in aliases}
        endings = [answer, *draw.sample(sorted(wrong), 3)]
        draw.shuffle(endings)
        context = tokenizer.apply_chat_template(*as_user([text]), add_generation_prompt=True, tokenize=False)
        rows.append({"ctx": context, "endings": endings, "label": endings.index(answer)})
    return choices("trivia", rows)


def choices(name: str, rows: list[dict]) -> dict:
    """Return multiple-choice questions as a task; a row has a text `ctx`, `endings`, and the right one's place."""
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "ctx",
        "doc_to_choice": "endings",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
