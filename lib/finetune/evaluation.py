"""What fine-tuning did to a chat model: recall, general capability, and how far it moved from its base (Section 6)."""

import hashlib
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import cache
from math import nan
from pathlib import Path
from random import Random
from typing import NamedTuple

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.base import InputError
from lib.dialogs import question
from lib.facts import FactsConfig, load_people, unseen_people, write_database
from lib.finetune.data import ChatMode, check_mode
from lib.finetune.generation import answer_with_tool, encode_prompts, generate_tokens, reply_all
from lib.finetune.models import load_model, load_tokenizer, no_bars_in_logs
from lib.finetune.prompts import PROMPTS
from lib.monitor import progress
from lib.paths import runs
from lib.recall import Fact
from lib.run import write_json
from lib.tools import SqlTool

#: Tokens that a reply to a question about a fact may take, and one to a prompt.
FACT_TOKENS, PROMPT_TOKENS = 128, 256
#: Logits that are compared at a time: 128 tokens of a vocabulary of 128k, 64 MB in float32 for each array made.
CHUNK = 2**24
#: In the folder of a checkpoint: what was measured of it.
RECORD = "evaluation.json"


class Estimate(NamedTuple):
    """The mean of `n` independent measurements and its standard error (not a number for one measurement)."""

    mean: float
    stderr: float
    n: int

    def columns(self, name: str) -> dict[str, float]:
        return {name: self.mean, f"{name}_stderr": self.stderr}


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
    batch_size: int | None = None,
    description: str | None = None,
) -> Estimate:
    """Share of `facts`, (name, attribute, value), that a chat model knows when it is asked for them, greedily.

    It knows a fact if the value stands in its last reply, whatever else it says there, letter by letter and not as
    part of a longer word or number: 11/1/1950 is not 1/1/1950, but a civil engineer is an engineer. (Small models of
    Section 5 must say the whole sentence; chat models have words of their own.) In-tool the reply counts only if it
    follows a query of `tool` that really found the value.
    """
    check_mode(mode)
    options = {"max_new_tokens": FACT_TOKENS, "batch_size": batch_size, "description": description}
    questions = [question(name, attribute) for name, attribute, _ in facts]
    if mode == "in-weight":
        asked = [[{"role": "user", "content": text}] for text in questions]
        replies = reply_all(model, tokenizer, asked, **options)
        return estimate(says(reply, value) for reply, (*_, value) in zip(replies, facts, strict=True))
    answers = answer_with_tool(model, tokenizer, questions, mode, tool, **options)
    return estimate(
        answer.response is not None
        and answer.response.ok
        and answer.response.text == value
        and says(answer.reply, value)
        for answer, (*_, value) in zip(answers, facts, strict=True)
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
    drawn = p.multinomial(1, generator=generator)
    k1 = (log_p.gather(-1, drawn) - log_q.gather(-1, drawn)).squeeze(-1)
    return torch.stack([tv, kl, k1, k1.square() / 2, torch.expm1(-k1) + k1], dim=-1)


# ---- Capability


def measure_capability(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str | dict, *, batch_size: int = 16
) -> Estimate:
    """Accuracy in a multiple-choice task (`acc` of lm-eval): "hellaswag", or a task of one's own as a dict.

    No chat template is applied, which is how HellaSwag is usually reported. It seeds torch's, NumPy's and Python's
    global random states, as lm-eval does.
    Raises `InputError` for an unknown task, one without `acc`, and one whose data cannot be loaded.
    """
    name = task if isinstance(task, str) else task["task"]
    if isinstance(task, str) and task != "hellaswag":
        raise InputError(f"unknown task {task!r}: give hellaswag or a task of lm-eval as a dict")
    # To list all of lm-eval's own tasks takes seconds.
    hellaswag = Path(lm_eval.__file__).parent / "tasks" / "hellaswag"
    manager = TaskManager(include_path=str(hellaswag), include_defaults=False)
    try:
        with no_bars_in_logs():
            harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            measured = lm_eval.simple_evaluate(harness, tasks=[task], task_manager=manager, log_samples=False)
    except OSError as error:
        raise InputError(
            f"cannot load the data of the task {name} ({str(error).splitlines()[0]}): it comes from the hub once, so "
            "connect and unset HF_HUB_OFFLINE, or take a task whose data is here"
        ) from None
    results = measured["results"][name]
    if "acc,none" not in results:
        raise InputError(f"the task {name} has no metric acc: give a multiple-choice task")
    return Estimate(results["acc,none"], results["acc_stderr,none"], measured["n-samples"][name]["effective"])


# ---- All of it


def evaluate(
    checkpoint: str | Path,
    base: str | Path,
    facts: FactsConfig,
    mode: ChatMode,
    *,
    task: str | dict = "hellaswag",
    prompts: Sequence[str] = tuple(prompt for prompts in PROMPTS.values() for prompt in prompts),
    n_recall: int = 300,
    n_unseen_people: int = 100,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    record: Path | None = None,
    description: str | None = None,
) -> dict:
    """Measure a checkpoint that was fine-tuned from `base` on the people of `facts`; returns columns of its row.

    checkpoint, base: whatever `load_model` takes. Measured are recall of `n_recall` of the trained facts, drawn by
    `seed`; recall of all facts of people with new names (`new_both` of `lib.facts.unseen_people`), who in-tool are in
    the database with the others; capability in `task`; and the distances of `Divergence`. Each has its `_stderr`.
    n_recall and n_unseen count the facts asked for; evaluation_seconds is the time of all measurements.

    Every part is written to `record` (evaluation.json in the checkpoint's folder) once it is measured, and not measured
    again unless something that it depends on has changed. Errors are those of the functions above.
    """
    record = Path(record or Path(checkpoint) / RECORD)
    if not record.parent.is_dir():
        raise InputError(f"cannot write {record}: give a record in a folder that there is")
    check_mode(mode)
    trained = load_people(facts)
    unseen = unseen_people(facts, n_unseen_people)["new_both"]
    everybody = trained + unseen
    asked = _sample(list(trained.facts()), n_recall, seed)

    @cache
    def loaded(source: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_model(source, device, dtype), load_tokenizer(source)

    @cache
    def database() -> SqlTool | None:
        if mode == "in-weight":
            return None
        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "people.sqlite"
        write_database(everybody, path)
        return stack.enter_context(SqlTool(path))

    def told(part: str) -> str | None:
        return description and f"{description}, {part}"

    def recall_of(group: list[Fact], name: str) -> dict:
        measured = measure_recall(*loaded(checkpoint), group, mode, database(), description=told(name))
        return {**measured.columns(name), f"n_{name.removeprefix('recall_')}": measured.n}

    def capability() -> dict:
        return measure_capability(*loaded(checkpoint), task).columns("capability")

    def divergence() -> dict:
        model, _ = loaded(checkpoint)
        original, tokenizer = loaded(base)
        key = _digest(base_print, dtype, prompts, PROMPT_TOKENS)
        answers = _kept_answers(original, tokenizer, prompts, key, told("base's answers"))
        measured = measure_divergence(
            model, original, tokenizer, prompts, answers=answers, seed=seed, description=told("divergence")
        )
        return {key: value for name in measured._fields for key, value in getattr(measured, name).columns(name).items()}

    base_print = _fingerprint(base)
    recalled = (mode, asked, everybody.digest(), FACT_TOKENS)
    parts: dict[str, tuple[tuple, Callable[[], dict]]] = {
        "recall": (recalled, lambda: recall_of(asked, "recall")),
        "recall_unseen": (recalled, lambda: recall_of(list(unseen.facts()), "recall_unseen")),
        "capability": ((task,), capability),
        "divergence": ((base_print, prompts, PROMPT_TOKENS, seed), divergence),
    }
    of_all = (_fingerprint(checkpoint), dtype)
    with ExitStack() as stack:
        for name, (settings, measure) in parts.items():
            _measured_once(record, name, _digest(*of_all, *settings), measure)
    measured = _read(record)
    columns = {key: value for name in parts for key, value in measured[name]["columns"].items()}
    seconds = round(sum(measured[name]["seconds"] for name in parts), 2)
    task_name = task if isinstance(task, str) else task["task"]
    return {**columns, "capability_task": task_name, "evaluation_seconds": seconds}


def _sample(facts: list[Fact], n: int, seed: int) -> list[Fact]:
    """`n` of the facts, or all if there are no more, in their order."""
    places = sorted(Random(seed).sample(range(len(facts)), min(n, len(facts))))
    return [facts[i] for i in places]


def _measured_once(record: Path, name: str, digest: str, measure: Callable[[], dict]) -> None:
    """Have the part `name` in the record, measured now unless it is there with that digest of what it depends on."""
    if _read(record).get(name, {}).get("digest") == digest:
        return
    start = time.monotonic()
    part = {"digest": digest, "columns": measure(), "seconds": time.monotonic() - start}
    write_json(record, _read(record) | {name: part})


def _read(record: Path) -> dict:
    return json.loads(record.read_text()) if record.exists() else {}


def _kept_answers(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], key: str, description: str | None
) -> list[list[int]]:
    """`base_answers`, made once for all checkpoints of a base."""
    path = runs() / "base_answers" / f"{key}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        answers = base_answers(base, tokenizer, prompts, description=description)
        write_json(path, {"answers": answers})
    return json.loads(path.read_text())["answers"]


def _digest(*settings) -> str:
    """16 hexadecimal digits that tell these settings from others; a function counts by its name."""
    text = json.dumps(settings, default=lambda value: getattr(value, "__qualname__", type(value).__name__))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


#: The files that decide what a model says.
_MODEL_FILES = ("*.safetensors", "*.bin", "*config.json", "tokenizer*", "*.jinja")


def _fingerprint(source: str | Path) -> str:
    """Tells a model from others by the files in its folder, or by its name on the hub."""
    folder = Path(source)
    if not folder.is_dir():
        return str(source)
    files = sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern)})
    content = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            content.update(hashlib.file_digest(file, "sha256").digest() + path.name.encode())
    return content.hexdigest()[:16]
