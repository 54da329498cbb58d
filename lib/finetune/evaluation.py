"""Evaluate checkpoints of a fine-tuning: recall, general capability, and distance to the base (Section 6)."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.finetune.bases import fingerprint
from lib.finetune.capability import capability_source, measure_capability
from lib.finetune.config import FinetuneConfig
from lib.finetune.conversations import as_user
from lib.finetune.generation import encode_prompts, generate_tokens
from lib.finetune.models import base_source, load_model
from lib.paths import DATA, read_json, runs, write_json
from lib.progress import progress

#: Maximum tokens of an answer to a prompt.
PROMPT_TOKENS = 256
#: Total variation, KL(base || model), and estimates of KL.
DIVERGENCES = ("tv", "kl", "k1", "k2", "k3")
_BLOCKS = [block.splitlines() for block in (DATA / "prompts.txt").read_text(encoding="utf-8").split("\n\n")]
#: 25 everyday prompts of each of four categories, written for this purpose: none is an item of a benchmark.
PROMPTS = {title.removeprefix("# "): tuple(lines) for title, *lines in _BLOCKS}


def mean_columns(name: str, values: Iterable[float]) -> dict[str, float | None]:
    """Return the mean of independent measurements and its standard error (None for a single one) as columns."""
    values = torch.tensor(list(values), dtype=torch.float64)
    stderr = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    return {name: float(values.mean()), f"{name}_stderr": stderr}


def capability_columns(right: dict[str, list[float]], before: dict[str, list[float]]) -> dict[str, float | None]:
    """Return columns: means of a checkpoint's scores `right`, and of their change per item since `before`."""
    columns: dict[str, float | None] = {}
    for metric, name in (("acc", "capability"), ("acc_norm", "capability_norm")):
        changes = (now - then for now, then in zip(right[metric], before[metric], strict=True))
        columns |= mean_columns(name, right[metric]) | mean_columns(f"{name}_change", changes)
    return columns


@torch.inference_mode()
def measure_divergence(
    model: PreTrainedModel,
    base: PreTrainedModel,
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    *,
    description: str | None = None,
) -> dict[str, list[float]]:
    """Return how far a model's predictions of the next token are from its base's, one value per prompt and measure.

    Both models read `answers`, the base's own greedy ones; a value is the mean over an answer's tokens, its end
    included. Keys are `DIVERGENCES`.
    """
    generator = torch.Generator(base.device).manual_seed(0)
    rows = []
    with progress(len(prompts), description) as bar:
        for prompt, answer in zip(prompts, answers, strict=True):
            tokens = torch.tensor([prompt + answer[:-1]], device=base.device)  # (1, S)
            expected, found = (m(tokens, logits_to_keep=len(answer)).logits[0] for m in (base, model))  # (A, V)
            rows.append(divergences(expected, found, generator).double().mean(0).tolist())
            bar.update(1)
    return dict(zip(DIVERGENCES, map(list, zip(*rows, strict=True)), strict=True))


@torch.inference_mode()
def divergences(base_logits: torch.Tensor, model_logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return `DIVERGENCES` at N positions, from logits (N, V): (N, 5) in float32.

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


@dataclass
class Evaluator:
    """Measures checkpoints of one run on `device` in `dtype`: recall, capability, and distance to the base.

    The base's answers to prompts and to the capability test are cached in `runs/`, so it is asked once for all runs.
    recall(model, description=...): columns of the task, see `Task.measure`.
    """

    config: FinetuneConfig
    recall: Callable[..., dict]
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    description: str | None = None

    @cached_property
    def base(self) -> PreTrainedModel:
        """The base model, loaded as the checkpoints are."""
        return load_model(base_source(self.config.base), self.device, self.dtype)

    def __call__(self, model: PreTrainedModel, test: str | None, is_last: Callable[[float], bool]) -> dict:
        """Return a checkpoint's columns. test: of `choose_test`. is_last(recall): is it the base or the last?"""
        recall = self.recall(model, description=self._doing("recall"))
        return recall | self._capability(model, test, is_last(recall["recall"])) | self._divergence(model)

    def _doing(self, what: str) -> str | None:
        return self.description and f"{self.description}, {what}"

    def _capability(self, model: PreTrainedModel, test: str | None, is_last: bool) -> dict:
        if test is None or (self.config.capability_at_end and not is_last):
            return {"capability": None, "capability_stderr": None, "capability_task": test}
        asked, source = (self.tokenizer, test, self.config.items), capability_source(test)
        measure = partial(measure_capability, description=self._doing(test))
        before = self._of_base([test, source, self.config.items], lambda: measure(self.base, *asked))
        right = before if model is self.base else measure(model, *asked)
        about = {"capability_task": test, "capability_source": source, "n_capability": len(right["acc"])}
        return capability_columns(right, before) | about

    def _divergence(self, model: PreTrainedModel) -> dict:
        prompts = [*chain.from_iterable(zip(*PROMPTS.values(), strict=True))][: self.config.prompts]  # round-robin
        asked = encode_prompts(self.tokenizer, as_user(prompts))
        doing = {"description": self._doing("distance to the base")}
        answer = partial(generate_tokens, max_new_tokens=PROMPT_TOKENS, **doing)
        key = [asked, PROMPT_TOKENS, self.device.type]
        answers = self._of_base(key, lambda: answer(self.base, self.tokenizer, asked))
        found = measure_divergence(model, self.base, asked, answers, **doing)
        return {key: value for name, values in found.items() for key, value in mean_columns(name, values).items()}

    def _of_base(self, key: list, measure: Callable[[], Any]) -> Any:
        """Return `measure()`, JSON about the base, cached over runs. key: all that it depends on except the base."""
        key = [fingerprint(base_source(self.config.base)), str(self.dtype), *key]
        path = runs() / "of_base_models" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, measure())
        return read_json(path, object)
