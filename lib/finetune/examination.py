"""What is asked of every checkpoint of a fine-tuning, beside its lesson: general capability, distance to the base."""

import json
from collections.abc import Callable
from functools import partial
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
    measure_capability,
    measure_divergence,
    trivia_choices,
)
from lib.finetune.lessons import Lesson
from lib.finetune.models import fingerprint, load_model
from lib.finetune.prompts import PROMPTS
from lib.finetune.weights import base_source
from lib.paths import write_json


class Examination:
    """What a run asks of its checkpoints.

    The base answers prompts and the capability test once for all runs: that is kept in runs. It is loaded once.
    max_new_tokens: of a turn about what was taught, as long as the longest that is right; None: of any length.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        lesson: Lesson,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int | None = None,
        description: str | None = None,
    ):
        self.config, self.lesson, self.tokenizer = config, lesson, tokenizer
        self.options = {"max_new_tokens": max_new_tokens} if max_new_tokens else {}
        self.description = description
        in_turns = chain.from_iterable(zip(*PROMPTS.values(), strict=True))  # of each category as many
        self.prompts = list(islice(in_turns, config.prompts))
        self._base: PreTrainedModel | None = None

    def __call__(self, model: PreTrainedModel, record: Path, is_last: Callable[[float], bool] = lambda _: True) -> dict:
        """Columns of a checkpoint's row. Each part is in `record` once it is measured, and not measured again.

        is_last: whether this is the base or, given its recall, the last checkpoint (see `capability_at_end`).
        """
        measured = json.loads(record.read_text()) if record.exists() else {}
        recall = partial(self.lesson.measure, model, self.tokenizer, description=self._doing("recall"), **self.options)
        parts: dict[str, Callable[[], dict]] = {
            "recall": recall,
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
        """The capability test of this run; what is at hand is looked up once, for the base, whose record says it."""
        of_base = record.with_name("0.parts")
        if self.config.capability != "any":
            return None if self.config.capability == "none" else self.config.capability
        if of_base.exists() and (said := json.loads(of_base.read_text()).get("capability")):
            return said["capability_task"]
        return "hellaswag" if hellaswag_is_at_hand() else "trivia"

    def _capability(self, model: PreTrainedModel, test: str | None, is_last: bool) -> dict:
        if test is None or (self.config.capability_at_end and not is_last):
            return {"capability": None, "capability_stderr": None, "capability_task": test}
        task = "hellaswag" if test == "hellaswag" else trivia_choices(self.tokenizer)
        n, source = self.config.items, capability_source(test)

        def ask(asked: PreTrainedModel, who: str) -> dict[str, list[float]]:
            return measure_capability(asked, self.tokenizer, task, n, description=self._doing(f"{test}{who}"))

        base = self.base(model.device, model.dtype)
        before = kept([*self._key(model), test, source, n], lambda: ask(base, " of the base"))
        right = before if model is base else ask(model, "")
        about = {"capability_task": test, "capability_source": source, "n_capability": len(right["acc"])}
        return capability_columns(right, before) | about

    def _divergence(self, model: PreTrainedModel) -> dict:
        base, doing = self.base(model.device, model.dtype), self._doing("base's answers to prompts")
        answers = kept(
            [*self._key(model), self.prompts, PROMPT_TOKENS],
            lambda: base_answers(base, self.tokenizer, self.prompts, description=doing),
        )
        doing = self._doing("distance to the base")
        found = measure_divergence(model, base, self.tokenizer, self.prompts, answers=answers, description=doing)
        return {key: value for name in found._fields for key, value in getattr(found, name).columns(name).items()}

    def _key(self, model: PreTrainedModel) -> list[str]:
        return [fingerprint(base_source(self.config.base)), str(model.dtype)]

    def base(self, device: str | torch.device, dtype: torch.dtype) -> PreTrainedModel:
        """The base model, as the checkpoints beside it are loaded."""
        if self._base is None:
            self._base = load_model(base_source(self.config.base), device, dtype)
        return self._base
