"""Measure chat models: recall, general capability, and the distance to the base model (Section 6)."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import lm_eval
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.agent.tools import SqlTool
from lib.base import InputError
from lib.dialogs.templates import question
from lib.evaluation.recall import Fact
from lib.finetune.data import ChatMode, as_user
from lib.finetune.generation import answer_with_tool, encode_prompts, generate_tokens, reply_all
from lib.finetune.models import no_bars_in_logs
from lib.finetune.triviaqa import SHIPPED, load_questions
from lib.paths import read_bytes, read_json, runs, write_json
from lib.progress import progress

#: Maximum tokens of a reply to a question about a fact, and to a prompt.
FACT_TOKENS, PROMPT_TOKENS = 128, 256
#: Logits compared at a time: 128 tokens of a vocabulary of 128k, 64 MB in float32 for each array made.
CHUNK = 2**24


def mean_columns(name: str, values: Iterable[float]) -> dict[str, float | None]:
    """Return the mean of independent measurements and its standard error (None for a single one) as columns."""
    values = torch.tensor(list(values), dtype=torch.float64)
    if not len(values):
        raise InputError("there is nothing to measure: give at least one fact or prompt")
    stderr = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    return {name: float(values.mean()), f"{name}_stderr": stderr}


# ---- Recall


def measure_recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    mode: ChatMode,
    tool: SqlTool | None = None,
    *,
    max_new_tokens: int = FACT_TOKENS,
    description: str | None = None,
) -> list[bool]:
    """Return which `facts`, (name, attribute, value), a chat model recalls when it is asked for them, greedily.

    It recalls a fact if the value stands in its last reply, whatever else it says there, letter by letter and not as
    part of a longer word or number: 11/1/1950 is not 1/1/1950, but a civil engineer is an engineer. (Small models of
    Section 5 must say the whole sentence; chat models may word it freely.) In-tool the reply counts only if it
    follows a query of `tool` that really found the value. A turn is cut after `max_new_tokens`.
    """
    questions, values = [question(name, attribute) for name, attribute, _ in facts], [value for *_, value in facts]
    options = {"max_new_tokens": max_new_tokens, "description": description}
    if mode == "in-weight":
        replies = reply_all(model, tokenizer, as_user(questions), **options)
        return [says(reply, value) for reply, value in zip(replies, values, strict=True)]
    answers = answer_with_tool(model, tokenizer, questions, mode, tool, expected=values, **options)
    return [
        response is not None and response.ok and response.text == value and says(reply, value)
        for (response, reply), value in zip(answers, values, strict=True)
    ]


def says(reply: str, value: str) -> bool:
    """Return whether `value` stands in `reply`, not as part of a longer word or number."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", reply) is not None


# ---- Distance to the base


def measure_divergence(
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[list[int]],
    *,
    description: str | None = None,
) -> dict[str, list[float]]:
    """Return how far a model's predictions of the next token are from its base's, one value per prompt and measure.

    Both models read the base's greedy answers (see `base_answers`); a value is the mean over an answer's tokens, its
    end included. Keys are those of `divergences`. Raises `InputError` if the vocabularies differ in size.
    """
    generator = torch.Generator(base.device).manual_seed(0)
    rows = []
    with progress(len(prompts), description) as bar:
        for prompt, answer in zip(encode_prompts(tokenizer, as_user(prompts)), answers, strict=True):
            expected, found = (_answer_logits(m, prompt, answer).to(base.device) for m in (base, model))
            if expected.shape != found.shape:
                raise InputError(
                    f"the base has a vocabulary of {expected.shape[1]} and the model one of {found.shape[1]}: "
                    "give the base that was fine-tuned"
                )
            parts = zip(*(logits.split(max(1, CHUNK // logits.shape[1])) for logits in (expected, found)), strict=True)
            rows.append(torch.cat([divergences(*part, generator) for part in parts]).double().mean(0).tolist())
            bar.update(1)
    return dict(zip(DIVERGENCES, map(list, zip(*rows, strict=True)), strict=True))


def base_answers(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    description: str | None = None,
) -> list[list[int]]:
    """Return the model's own greedy answers to `prompts` as tokens, the end included."""
    asked = encode_prompts(tokenizer, as_user(prompts))
    return generate_tokens(base, tokenizer, asked, max_new_tokens=PROMPT_TOKENS, description=description)


def kept(key: Sequence, make: Callable[[], Any]) -> Any:
    """Return `make()`, cached in runs: a base model's answers are the same for all runs.

    key: all that the result depends on. Both are JSON.
    """
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = runs() / "of_base_models" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, make())
    return read_json(path, object)


@torch.inference_mode()
def _answer_logits(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Return the logits (A, V) with which `model` predicts each of A tokens of the answer, in the model's dtype."""
    tokens = torch.tensor([prompt + answer[:-1]], device=model.device)
    return model(tokens, logits_to_keep=len(answer)).logits[0]


#: Total variation, KL(base || model), and estimates of KL.
DIVERGENCES = ("tv", "kl", "k1", "k2", "k3")


@torch.inference_mode()
def divergences(base_logits: torch.Tensor, model_logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return `DIVERGENCES` at each of N places, from logits (N, V): (N, 5) in float32.

    With p the base's distribution and q the model's, total variation is sum |p - q| / 2, in [0, 1], and KL is
    sum p log(p / q), in nats. The others estimate KL from one token drawn from p (Schulman 2020, "Approximating KL
    divergence"): k1 = log(p / q), k2 = k1^2 / 2, k3 = q / p - 1 - log(q / p). k1 and k3 are unbiased, so their
    distance from KL checks the code.
    """
    log_p, log_q = base_logits.float().log_softmax(-1), model_logits.float().log_softmax(-1)
    p = log_p.exp()
    tv = (p - log_q.exp()).abs().sum(-1) / 2
    kl = (p * (log_p - log_q)).sum(-1)
    # By the inverse CDF: `multinomial` takes ten times as long on a CPU.
    place = torch.rand(len(p), 1, generator=generator, device=p.device)
    drawn = torch.searchsorted(p.cumsum(-1), place).clamp(max=p.shape[-1] - 1)
    k1 = (log_p.gather(-1, drawn) - log_q.gather(-1, drawn)).squeeze(-1)
    return torch.stack([tv, kl, k1, k1.square() / 2, torch.expm1(-k1) + k1], dim=-1)


# ---- Capability

#: How many items are asked between two updates of the progress bar.
ITEMS_AT_A_TIME = 100
#: Names a file with HellaSwag's validation set, a JSON object a line as the hub has it; else the hub is asked.
HELLASWAG = "ITL_HELLASWAG"


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
    right: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    with TemporaryDirectory() as folder:
        manager = TaskManager(include_path=str(_tasks_folder(folder)), include_defaults=False)
        try:
            with no_bars_in_logs():
                n_there = len(manager.load([task])["tasks"][name].eval_docs)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"cannot load the items of {name} ({str(error).splitlines()[0]}): HellaSwag comes from the hub, "
                f"once, or from a file that {HELLASWAG} names"
            ) from None
        items = range(min(n_items or n_there, n_there))
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warning is about something intended
        with progress(len(items), description) as bar:
            for start in items[::ITEMS_AT_A_TIME]:
                chunk = list(items[start : start + ITEMS_AT_A_TIME])
                options = {"samples": {name: chunk}, "bootstrap_iters": 0}
                with no_bars_in_logs():
                    measured = lm_eval.simple_evaluate(harness, tasks=[task], task_manager=manager, **options)
                rows = sorted(measured["samples"][name], key=lambda row: row["doc_id"])
                for metric, values in right.items():
                    values += [float(row[metric]) for row in rows]
                bar.update(len(chunk))
    return right


def capability_source(test: str) -> str:
    """Return the source of a test's items: "hub", or a digest of their file, the repository's for trivia."""
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


def _tasks_folder(folder: str) -> Path:
    """Return where lm-eval finds HellaSwag and nothing else: listing all its tasks takes seconds. `folder` is empty."""
    own = Path(lm_eval.__file__).parent / "tasks" / "hellaswag"
    if HELLASWAG not in os.environ:
        return own
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": os.environ[HELLASWAG]}}}
    task = {"task": "hellaswag", "include": str(own / "hellaswag.yaml"), "training_split": None, **source}
    write_json(Path(folder) / "hellaswag.yaml", task)  # JSON is YAML
    return Path(folder)


def capability_columns(right: dict[str, list[float]], before: dict[str, list[float]]) -> dict[str, float | None]:
    """Return columns for a checkpoint's answers `right`, and for their change from `before`, the base's answers.

    As both answer the same items, the change has a smaller standard error than the difference of two accuracies.
    """
    columns: dict[str, float | None] = {}
    for metric, name in (("acc", "capability"), ("acc_norm", "capability_norm")):
        changes = (now - then for now, then in zip(right[metric], before[metric], strict=True))
        columns |= mean_columns(name, right[metric]) | mean_columns(f"{name}_change", changes)
    return columns


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
