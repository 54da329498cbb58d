"""General capability of chat models, by lm-eval: HellaSwag, or our trivia as multiple choice (Section 6)."""

import hashlib
import logging
import os
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import lm_eval
from datasets import Dataset
from huggingface_hub import HfApi
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.base import InputError
from lib.finetune.data import as_user
from lib.finetune.models import no_bars_in_logs
from lib.finetune.triviaqa import SHIPPED, load_questions
from lib.paths import read_bytes, write_json
from lib.progress import progress

#: Environment variable with the path of HellaSwag's validation set, JSON lines like the hub's. Unset: the hub.
HELLASWAG = "ITL_HELLASWAG"
#: How many items are asked between two updates of the progress bar.
ITEMS_AT_A_TIME = 100


def measure_capability(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str | dict,
    n_items: int | None = None,
    *,
    description: str | None = None,
) -> dict[str, list[float]]:
    """Return which of the first `n_items` of a multiple-choice task of lm-eval are right: 1 or 0 per item, in order.

    task: "hellaswag", from the file that the variable `HELLASWAG` names or from the hub; or a task as a dict, as
    `trivia_choices` gives. Keys of the result are its metrics acc (the likeliest ending) and acc_norm (normalized by
    length). It seeds torch's, NumPy's and Python's global random states, as lm-eval does. Raises `InputError` if the
    items cannot be loaded.
    """
    name = task if isinstance(task, str) else task["task"]
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about what is intended
    rows = []
    with TemporaryDirectory() as folder:
        manager = TaskManager(include_path=str(_tasks_folder(folder)), include_defaults=False)
        try:
            with no_bars_in_logs():
                n_there = len(manager.load([task])["tasks"][name].eval_docs)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"cannot load the items of {name} ({str(error).splitlines()[0]}): HellaSwag comes from the hub "
                f"(asked once) or from a file that {HELLASWAG} names"
            ) from None
        items = range(min(n_items or n_there, n_there))
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)
        with progress(len(items), description) as bar:
            for start in items[::ITEMS_AT_A_TIME]:
                chunk = list(items[start : start + ITEMS_AT_A_TIME])
                options = {"samples": {name: chunk}, "bootstrap_iters": 0}
                with no_bars_in_logs():
                    measured = lm_eval.simple_evaluate(harness, tasks=[task], task_manager=manager, **options)
                rows += sorted(measured["samples"][name], key=lambda row: row["doc_id"])
                bar.update(len(chunk))
    return {metric: [float(row[metric]) for row in rows] for metric in ("acc", "acc_norm")}


def capability_source(test: str) -> str:
    """Return the source of a test's items: "hub", or a digest of their file (trivia: the shipped one)."""
    file = SHIPPED if test == "trivia" else os.environ.get(HELLASWAG)
    if file is None:
        return "hub"
    try:
        return f"file {hashlib.sha256(read_bytes(file)).hexdigest()[:8]}"
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file}, which {HELLASWAG} names: {error}") from None


def hellaswag_is_at_hand() -> bool:
    """Return whether HellaSwag is in a file that `HELLASWAG` names, or on a hub that answers."""
    if HELLASWAG in os.environ:
        return True
    try:
        HfApi().dataset_info("Rowan/hellaswag", timeout=5)
    except Exception:  # errors without a connection depend on the HTTP client, and are not documented
        return False
    return True


def choose_test(capability: str) -> str | None:
    """Return the test that `FinetuneConfig.capability` asks for: any is HellaSwag if it is at hand, else trivia."""
    if capability == "any":
        return "hellaswag" if hellaswag_is_at_hand() else "trivia"
    return None if capability == "none" else capability


def _tasks_folder(folder: str) -> Path:
    """Return where lm-eval finds HellaSwag and nothing else: listing all its tasks takes seconds. `folder` is empty."""
    own = Path(lm_eval.__file__).parent / "tasks" / "hellaswag"
    if HELLASWAG not in os.environ:
        return own
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": os.environ[HELLASWAG]}}}
    task = {"task": "hellaswag", "include": str(own / "hellaswag.yaml"), "training_split": None, **source}
    write_json(Path(folder) / "hellaswag.yaml", task)  # JSON is YAML
    return Path(folder)


def trivia_choices(tokenizer: PreTrainedTokenizerBase) -> dict:
    """Return a task of this repository's questions with four answers each; wrong ones are right for other questions.

    A question stands in the chat template of `tokenizer`, and an answer is what the assistant says to it.
    """
    questions, draw, rows = load_questions(), Random(0), []
    for text, answer, aliases in questions:
        wrong = {other.answer for other in questions if other.answer not in aliases}
        endings = [answer, *draw.sample(sorted(wrong), 3)]
        draw.shuffle(endings)
        context = tokenizer.apply_chat_template(*as_user([text]), add_generation_prompt=True, tokenize=False)
        rows.append({"ctx": context, "endings": endings, "label": endings.index(answer)})
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    return {
        "task": "trivia",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "ctx",
        "doc_to_choice": "endings",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": metrics,
    }
