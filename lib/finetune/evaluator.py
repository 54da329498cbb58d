"""Evaluate checkpoints of a fine-tuning: their task, general capability, and distance to the base (Section 6)."""

from collections.abc import Callable
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.finetune.config import FinetuneConfig
from lib.finetune.evaluation import (
    PROMPT_TOKENS,
    base_answers,
    capability_columns,
    capability_source,
    hellaswag_is_at_hand,
    kept,
    mean_columns,
    measure_capability,
    measure_divergence,
    trivia_choices,
)
from lib.finetune.models import fingerprint, load_model
from lib.finetune.tasks import Task
from lib.finetune.weights import base_source
from lib.paths import DATA, read_json, write_json

_BLOCKS = [block.splitlines() for block in (DATA / "prompts.txt").read_text(encoding="utf-8").split("\n\n")]
#: 25 everyday prompts of each of four categories, written for this purpose: none is an item of a benchmark.
PROMPTS = {title.removeprefix("# "): tuple(lines) for title, *lines in _BLOCKS}


class Evaluator:
    """Measures checkpoints of one run on `device` in `dtype`.

    The base's answers to prompts and the capability test are cached in runs, so it is asked once for all runs.
    max_new_tokens: of a turn in the task.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        dtype: torch.dtype,
        max_new_tokens: int,
        description: str | None = None,
    ):
        self.config, self.task, self.tokenizer, self.device, self.dtype = config, task, tokenizer, device, dtype
        self.max_new_tokens, self.description = max_new_tokens, description
        self.prompts = list(islice(chain.from_iterable(zip(*PROMPTS.values(), strict=True)), config.prompts))

    @cached_property
    def base(self) -> PreTrainedModel:
        """The base model, loaded as the checkpoints are."""
        return load_model(base_source(self.config.base), self.device, self.dtype)

    def __call__(self, model: PreTrainedModel, record: Path, is_last: Callable[[float], bool]) -> dict:
        """Return the columns of a checkpoint. Each part is written to `record` when measured, and not measured again.

        is_last: whether, given its recall, this is the base or the last checkpoint (see `capability_at_end`).
        """
        measured = read_json(record) if record.exists() else {}
        parts: dict[str, Callable[[], dict]] = {
            "recall": lambda: self.task.measure(
                model, self.tokenizer, max_new_tokens=self.max_new_tokens, description=self._doing("recall")
            ),
            "capability": lambda: self._capability(model, self._test(record), is_last(measured["recall"]["recall"])),
            "divergence": lambda: self._divergence(model),
        }
        for name, measure in parts.items():
            if name not in measured:
                measured[name] = measure()
                write_json(record, measured)
        return {key: value for name in parts for key, value in measured[name].items()}

    def _doing(self, what: str) -> str | None:
        return self.description and f"{self.description}, {what}"

    def _test(self, record: Path) -> str | None:
        """Return the capability test of this run. What is available is chosen once, for the base, and recorded."""
        of_base = record.with_name("0.parts")
        if self.config.capability != "any":
            return None if self.config.capability == "none" else self.config.capability
        if of_base.exists() and (chosen := read_json(of_base).get("capability")):
            return chosen["capability_task"]
        return "hellaswag" if hellaswag_is_at_hand() else "trivia"

    def _capability(self, model: PreTrainedModel, test: str | None, is_last: bool) -> dict:
        if test is None or (self.config.capability_at_end and not is_last):
            return {"capability": None, "capability_stderr": None, "capability_task": test}
        task = "hellaswag" if test == "hellaswag" else trivia_choices(self.tokenizer)
        n, source, doing = self.config.items, capability_source(test), self._doing(test)
        before = self._of_base([test, source, n], measure_capability, self.tokenizer, task, n, description=doing)
        right = before
        if model is not self.base:
            right = measure_capability(model, self.tokenizer, task, n, description=doing)
        about = {"capability_task": test, "capability_source": source, "n_capability": len(right["acc"])}
        return capability_columns(right, before) | about

    def _divergence(self, model: PreTrainedModel) -> dict:
        doing = self._doing("distance to the base")
        answers = self._of_base(
            [self.prompts, PROMPT_TOKENS], base_answers, self.tokenizer, self.prompts, description=doing
        )
        found = measure_divergence(model, self.base, self.tokenizer, self.prompts, answers, description=doing)
        return {key: value for name, values in found.items() for key, value in mean_columns(name, values).items()}

    def _of_base(self, key: list, measure: Callable, *arguments, **options):
        """Return `measure(base, ...)`, cached over runs. key: all that it depends on except the base."""
        key = [fingerprint(base_source(self.config.base)), str(self.dtype), *key]
        return kept(key, lambda: measure(self.base, *arguments, **options))
