"""What fine-tuning did to a chat model: recall, general capability, and how far it moved from its base (Section 6)."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from math import nan
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

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
from lib.finetune.data import ChatMode, check_mode
from lib.finetune.generation import answer_with_tool, encode_prompts, generate_tokens, reply_all
from lib.finetune.models import no_bars_in_logs
from lib.finetune.triviaqa import SHIPPED, load_questions
from lib.paths import runs, write_json
from lib.progress import progress

#: Tokens that a reply to a question about a fact may take, and one to a prompt.
FACT_TOKENS, PROMPT_TOKENS = 128, 256
#: Logits that are compared at a time: 128 tokens of a vocabulary of 128k, 64 MB in float32 for each array made.
CHUNK = 2**24


class Estimate(NamedTuple):
    """The mean of `n` independent measurements and its standard error (not a number for one measurement)."""

    mean: float
    stderr: float
    n: int

    def columns(self, name: str) -> dict[str, float | None]:
        return {name: self.mean, f"{name}_stderr": self.stderr if self.n > 1 else None}


def estimate(values: Iterable[float]) -> Estimate:
    values = torch.tensor(list(values), dtype=torch.float64)
    if not len(values):
        raise InputError("there is nothing to measure: give at least one fact or prompt")
    stderr = float(values.std() / len(values) ** 0.5) if len(values) > 1 else nan
    return Estimate(float(values.mean()), stderr, len(values))


# ---- Recall


def measure_recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    mode: ChatMode,
    tool: SqlTool | None = None,
    *,
    max_new_tokens: int = FACT_TOKENS,
    batch_size: int | None = None,
    description: str | None = None,
) -> Estimate:
    """Share of `facts`, (name, attribute, value), that a chat model knows when it is asked for them, greedily.

    It knows a fact if the value stands in its last reply, whatever else it says there, letter by letter and not as
    part of a longer word or number: 11/1/1950 is not 1/1/1950, but a civil engineer is an engineer. (Small models of
    Section 5 must say the whole sentence; chat models have words of their own.) In-tool the reply counts only if it
    follows a query of `tool` that really found the value. A turn that is not over after `max_new_tokens` is cut there.
    """
    check_mode(mode)
    options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "description": description}
    questions = [question(name, attribute) for name, attribute, _ in facts]
    if mode == "in-weight":
        asked = [[{"role": "user", "content": text}] for text in questions]
        replies = reply_all(model, tokenizer, asked, **options)
        return estimate(says(reply, value) for reply, (*_, value) in zip(replies, facts, strict=True))
    values = [value for *_, value in facts]
    answers = answer_with_tool(model, tokenizer, questions, mode, tool, expected=values, **options)
    return estimate(
        answer.response is not None
        and answer.response.ok
        and answer.response.text == value
        and says(answer.reply, value)
        for answer, value in zip(answers, values, strict=True)
    )


def says(reply: str, value: str) -> bool:
    """Whether `value` stands in `reply`, not as part of a longer word or number."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", reply) is not None


# ---- Distance to the base


class Divergence(NamedTuple):
    """How far a model's predictions of the next token are from its base's; all in nats but `tv`, which is in [0, 1]."""

    tv: Estimate  # total variation
    kl: Estimate  # KL(base || model), over the whole vocabulary
    k1: Estimate  # estimates of `kl` from one token each, see `divergences`
    k2: Estimate
    k3: Estimate


def measure_divergence(
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    answers: Sequence[list[int]] | None = None,
    seed: int = 0,
    description: str | None = None,
) -> Divergence:
    """Both models read the base's greedy answers to `prompts`: how differently do they expect each token of them?

    Averaged over the tokens of an answer, its end included, then over prompts; standard errors are over prompts.
    `answers` are `base_answers` if there are any already. `seed` draws the tokens of the estimates k1 to k3. Raises
    `InputError` if the two have vocabularies of different size.
    """
    if answers is None:
        answers = base_answers(base, tokenizer, prompts, description=description and f"{description}, base's answers")
    generator = torch.Generator(base.device).manual_seed(seed)
    rows = []
    with progress(len(prompts), description) as bar:
        for prompt, answer in zip(encode_prompts(tokenizer, _asked(prompts)), answers, strict=True):
            expected, found = (_answer_logits(m, prompt, answer).to(base.device) for m in (base, model))
            if expected.shape != found.shape:
                raise InputError(
                    f"the base has a vocabulary of {expected.shape[1]} and the model one of {found.shape[1]}: "
                    "give the base that was fine-tuned"
                )
            parts = zip(*(logits.split(max(1, CHUNK // logits.shape[1])) for logits in (expected, found)), strict=True)
            rows.append(torch.cat([divergences(*part, generator) for part in parts]).double().mean(0).tolist())
            bar.update(1)
    return Divergence(*map(estimate, zip(*rows, strict=True)))


def base_answers(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    description: str | None = None,
) -> list[list[int]]:
    """The model's own greedy answers to `prompts`, as tokens, the end included."""
    asked = encode_prompts(tokenizer, _asked(prompts))
    return generate_tokens(base, tokenizer, asked, max_new_tokens=PROMPT_TOKENS, description=description)


def kept(what: Sequence, make: Callable[[], Any]) -> Any:
    """`make()`, which is JSON, made once and kept in runs: what the base says, asked once for all runs.

    what: all that decides it, also JSON.
    """
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    path = runs() / "of_base_models" / f"{key}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, make())
    return json.loads(path.read_text())


def _asked(prompts: Sequence[str]) -> list[list[dict]]:
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


@torch.inference_mode()
def _answer_logits(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """What `model` expects in place of each of A tokens of the answer: (A, V), in the model's dtype."""
    tokens = torch.tensor([prompt + answer[:-1]], device=model.device)
    return model(tokens, logits_to_keep=len(answer)).logits[0]


@torch.inference_mode()
def divergences(base_logits: torch.Tensor, model_logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Total variation, KL(base || model), k1, k2 and k3 at each of N places, from logits (N, V): (N, 5) in float32.

    With p the base's distribution and q the model's, total variation is sum |p - q| / 2 and KL sum p log(p / q). The
    others estimate the latter from one token x drawn from p (Schulman 2020, "Approximating KL divergence"), where the
    whole distributions are not at hand: k1 = log(p / q), k2 = k1^2 / 2, k3 = q / p - 1 - log(q / p). k1 and k3 are
    unbiased, which their distance from KL lets one check.
    """
    log_p, log_q = base_logits.float().log_softmax(-1), model_logits.float().log_softmax(-1)
    p = log_p.exp()
    tv = (p - log_q.exp()).abs().sum(-1) / 2
    kl = (p * (log_p - log_q)).sum(-1)
    # By the inverse of the distribution function: `multinomial` takes ten times as long on a CPU.
    place = torch.rand(len(p), 1, generator=generator, device=p.device)
    drawn = torch.searchsorted(p.cumsum(-1), place).clamp(max=p.shape[-1] - 1)
    k1 = (log_p.gather(-1, drawn) - log_q.gather(-1, drawn)).squeeze(-1)
    return torch.stack([tv, kl, k1, k1.square() / 2, torch.expm1(-k1) + k1], dim=-1)


# ---- Capability

#: How many items are asked between two signs of progress.
ITEMS_AT_A_TIME = 100
#: Names a file with HellaSwag's validation set, a JSON object a line as the hub has it; else the hub is asked.
HELLASWAG = "ITL_HELLASWAG"


def measure_capability(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str | dict,
    n_items: int | None = None,
    *,
    batch_size: int = 16,
    description: str | None = None,
) -> dict[str, list[float]]:
    """Which of the first `n_items` of a multiple-choice task of lm-eval are right: 1 or 0 an item, in their order.

    task: "hellaswag", from the file that the variable `HELLASWAG` names or from the hub; or one of one's own as a dict,
    as `trivia_choices` gives, with the metrics acc (the likeliest ending) and acc_norm (with likelihoods by length).
    These are the keys of what is returned. It seeds torch's, NumPy's and Python's global random states, as lm-eval
    does. Raises `InputError` for another task, and for one whose items cannot be loaded.
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
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        with progress(len(items), description) as bar:
            for start in items[::ITEMS_AT_A_TIME]:
                chunk = list(items[start : start + ITEMS_AT_A_TIME])
                options = {"samples": {name: chunk}, "bootstrap_iters": 0}
                with no_bars_in_logs():
                    measured = lm_eval.simple_evaluate(harness, tasks=[task], task_manager=manager, **options)
                rows = sorted(measured["samples"][name], key=lambda row: row["doc_id"])
                for metric in right:
                    if metric not in rows[0]:
                        raise InputError(f"the task {name} has no metric {metric}: give a multiple-choice task")
                    right[metric] += [float(row[metric]) for row in rows]
                bar.update(len(chunk))
    return right


def capability_source(test: str) -> str:
    """Where the items of a test come from: "hub", or a digest of the file they are in, the repository's for trivia."""
    file = SHIPPED if test == "trivia" else os.environ.get(HELLASWAG)
    if file is None:
        return "hub"
    try:
        with open(file, "rb") as content:
            return f"file {hashlib.file_digest(content, 'sha256').hexdigest()[:8]}"
    except OSError as error:
        raise InputError(f"cannot read {file}, which {HELLASWAG} names: {error.strerror}") from None


def hellaswag_is_at_hand() -> bool:
    """Whether HellaSwag is in a file that `HELLASWAG` names, or on a hub that answers."""
    if HELLASWAG in os.environ:
        return True
    try:
        HfApi().dataset_info("Rowan/hellaswag", timeout=5)
    except Exception:  # what is raised where nothing answers depends on the HTTP client, and is not documented
        return False
    return True


def _tasks_folder(folder: str) -> Path:
    """Where lm-eval finds HellaSwag and nothing else, as to list all its tasks takes seconds; `folder` is empty."""
    own = Path(lm_eval.__file__).parent / "tasks" / "hellaswag"
    if HELLASWAG not in os.environ:
        return own
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": os.environ[HELLASWAG]}}}
    task = {"task": "hellaswag", "include": str(own / "hellaswag.yaml"), "training_split": None, **source}
    write_json(Path(folder) / "hellaswag.yaml", task)  # JSON is YAML
    return Path(folder)


def capability_columns(right: dict[str, list[float]], before: dict[str, list[float]]) -> dict[str, float | None]:
    """Columns of a checkpoint that answered as `right`, and of its change from `before`, the base's, item by item.

    As both answer the same items, the change has a smaller standard error than the difference of two accuracies.
    """
    columns: dict[str, float | None] = {}
    for metric, name in (("acc", "capability"), ("acc_norm", "capability_norm")):
        changes = (now - then for now, then in zip(right[metric], before[metric], strict=True))
        columns |= estimate(right[metric]).columns(name) | estimate(changes).columns(f"{name}_change")
    return columns


def trivia_choices(tokenizer: PreTrainedTokenizerBase) -> dict:
    """The questions of this repository with four answers to choose from, the wrong ones right for other questions.

    A question stands in the chat template of `tokenizer`, and an answer is what the assistant says to it.
    """
    questions, draw, rows = load_questions(), Random(0), []
    for text, answer, aliases in questions:
        wrong = {other.answer for other in questions if other.answer not in aliases}
        endings = [answer, *draw.sample(sorted(wrong), 3)]
        draw.shuffle(endings)
        context = tokenizer.apply_chat_template(*_asked([text]), add_generation_prompt=True, tokenize=False)
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
