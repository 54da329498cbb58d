"""What is asked of every checkpoint of a fine-tuning, beside its lesson: general capability, distance to the base."""

import json
from collections.abc import Callable
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.base import InputError
from lib.finetune.bases import EMBEDDED, base_source, load_base
from lib.finetune.config import FinetuneConfig
from lib.finetune.embedded import multiple_choice_task
from lib.finetune.evaluation import kept_answers, measure_capability, measure_divergence
from lib.finetune.lessons import Lesson
from lib.finetune.prompts import PROMPTS
from lib.finetune.skills import prompts as skill_prompts
from lib.run import write_json


class Examination:
    """What a run asks of its checkpoints. The base is loaded once, at the first question that takes it."""

    def __init__(self, config: FinetuneConfig, lesson: Lesson, tokenizer: PreTrainedTokenizerBase):
        self.config, self.lesson, self.tokenizer = config, lesson, tokenizer
        self.of_skills = config.base in EMBEDDED
        self.capability = config.capability or ("skills" if self.of_skills else "hellaswag")
        if not self.of_skills and config.prompts > (n := sum(map(len, PROMPTS.values()))):
            raise InputError(f"prompts = {config.prompts}: there are {n}")
        self._base: PreTrainedModel | None = None
        self._answers: list[list[int]] = []

    def __call__(self, model: PreTrainedModel, record: Path) -> dict:
        """Columns of a checkpoint's row. Each part is in `record` once it is measured, and not measured again."""
        parts: dict[str, Callable[[], dict]] = {
            "recall": lambda: self.lesson.measure(model, self.tokenizer),
            "capability": lambda: self._capability(model),
            "divergence": lambda: self._divergence(model),
        }
        measured = json.loads(record.read_text()) if record.exists() else {}
        for name, measure in parts.items():
            if name not in measured:
                measured[name] = measure()
                write_json(record, measured)
        return {key: value for name in parts for key, value in measured[name].items()}

    def _capability(self, model: PreTrainedModel) -> dict:
        if self.capability == "none":
            return {"capability": None, "capability_stderr": None, "capability_task": None}
        of_skills = self.capability == "skills"
        task = multiple_choice_task(self.tokenizer, self.config.items) if of_skills else "hellaswag"
        found = measure_capability(model, self.tokenizer, task)
        return {**found.columns("capability"), "capability_task": self.capability}

    def _divergence(self, model: PreTrainedModel) -> dict:
        if self._base is None:
            self._base, _ = load_base(self.config.base, model.device, model.dtype)
            self._answers = kept_answers(self._base, self.tokenizer, self.prompts, base_source(self.config.base))
        found = measure_divergence(model, self._base, self.tokenizer, self.prompts, answers=self._answers)
        return {key: value for name in found._fields for key, value in getattr(found, name).columns(name).items()}

    @cached_property
    def prompts(self) -> list[str]:
        """Of each category as many, in turns."""
        if self.of_skills:
            drawn = (row for _, row in skill_prompts(4 * self.config.prompts, seed=0))
            plain = (row["messages"] for row in drawn if len(row["messages"]) == 1 and "tools" not in row)
            return [message["content"] for (message,) in islice(plain, self.config.prompts)]
        in_turns = chain.from_iterable(zip(*PROMPTS.values(), strict=True))
        return list(islice(in_turns, self.config.prompts))
