"""What fine-tuning did to a chat model: recall, general capability, and how far it moved from its base (Section 6)."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from math import nan
from pathlib import Path
from typing import NamedTuple

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.base import InputError
from lib.dialogs import question
from lib.finetune.data import ChatMode, check_mode
from lib.finetune.generation import answer_with_tool, encode_prompts, generate_tokens, reply_all
from lib.finetune.models import fingerprint, no_bars_in_logs
from lib.monitor import progress
from lib.paths import runs
from lib.recall import Fact
from lib.run import write_json
from lib.tools import SqlTool

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


def kept_answers(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    source: str | Path,
    *,
    description: str | None = None,
) -> list[list[int]]:
    """`base_answers`, made once for all checkpoints of a base; source: where it was loaded from, which tells it."""
    what = json.dumps([fingerprint(source), str(base.dtype), prompts, PROMPT_TOKENS])
    key = hashlib.sha256(what.encode()).hexdigest()[:16]
    path = runs() / "base_answers" / f"{key}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"answers": base_answers(base, tokenizer, prompts, description=description)})
    return json.loads(path.read_text())["answers"]


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
