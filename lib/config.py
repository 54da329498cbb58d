"""`RunConfig`: everything that decides the outcome of one run, in one object.

The same object is built by a notebook cell, the command line, a sweep and a cluster job.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lib.base import Config, Identified, InputError
from lib.dialogs import ByteTokenizer
from lib.facts import MAX_PEOPLE, FactsConfig
from lib.model import ModelConfig
from lib.optim import OptimConfig


class TrainingConfig(Config):
    """How long and on what batches."""

    #: The schedule's length; a run may stop earlier (see `EvaluationConfig.stop_at_recall`). None: 150 passes over the
    #: data, and at least 600 steps.
    steps: int | None = Field(None, ge=1)
    #: Dialogs a step, never more than the dataset holds.
    batch_size: int = Field(64, ge=1)
    #: So many batches at a time are sorted by the length of their dialogs, for less padding; 1: batches are random.
    length_pool: int = Field(8, ge=1)
    #: Share of the dialogs trained on that are biographies: all that is known of a person in one turn, nobody asking.
    biographies: float = Field(0.0, ge=0, lt=1)
    #: Files of dialogs (`lib.shards`), and the share of the dialogs trained on that comes from each.
    files: dict[str, Annotated[float, Field(gt=0, lt=1)]] = {}
    #: "cross-entropy", or "focal": each trained token's cross-entropy weighted by (1 - p)^focal_gamma, p the model's
    #: probability of it, with weights that add up to one over a batch (Lin et al., 2017).
    loss: Literal["cross-entropy", "focal"] = "cross-entropy"
    focal_gamma: float = Field(2.0, gt=0, le=5)
    #: A step's batch is cut into this many parts whose gradients add up.
    grad_accumulation: int = Field(1, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    checkpoint_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _something_is_left_for_questions(self) -> Self:
        others = self.biographies + sum(self.files.values())
        if others >= 1:
            raise ValueError(
                f"training.files and training.biographies take {others:g} of the dialogs, which must be less than 1"
            )
        return self

    @property
    def gamma(self) -> float:
        """The exponent of the focal loss, 0 for cross-entropy."""
        return self.focal_gamma if self.loss == "focal" else 0.0

    @property
    def questions(self) -> float:
        """Share of the dialogs trained on that are questions about the people."""
        return 1 - self.biographies - sum(self.files.values())

    def total_steps(self, n_dialogs: int) -> int:
        """Steps of the schedule on a dataset of `n_dialogs`."""
        return self.steps or max(600, math.ceil(150 * n_dialogs / self.batch_size))


class EvaluationConfig(Config):
    """How recall is measured while training goes on, and when it is enough."""

    #: Steps between two measurements; None measures at the end only.
    every: int | None = Field(100, ge=1)
    #: Questions asked while training goes on, the first ones of the dataset; the end always asks all.
    questions: int = Field(1024, ge=1)
    #: Training ends when the last two measurements reached this recall; None trains to the last step.
    stop_at_recall: float | None = Field(1.0, gt=0, le=1)
    #: Training ends when a measurement in the second half of the schedule is below this recall; None never gives up.
    give_up_below: float | None = Field(None, gt=0, le=1)
    #: People of each kind that nobody was trained on who are asked about after the last step (`lib.generalization`).
    unseen_people: int = Field(0, ge=0, le=10_000)


class RunConfig(Identified):
    """One run: facts + model + optimizer + training + evaluation."""

    mode: Literal["in-weight", "in-tool"] = "in-weight"
    #: Seeds the initialization and the order of the data; `facts.seed` draws the people.
    seed: int = Field(0, ge=0, lt=2**63)
    #: "bytes", or a file with a vocabulary (`lib.tokenizers`), whose size `model.vocab_size` must then be.
    tokenizer: str = "bytes"
    facts: FactsConfig = FactsConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _tokens_fit(self) -> Self:
        if self.tokenizer == "bytes" and self.model.vocab_size < ByteTokenizer.vocab_size:
            raise ValueError(
                f"model.vocab_size = {self.model.vocab_size} is too small for bytes and special tokens: "
                f"give at least {ByteTokenizer.vocab_size}"
            )
        return self

    @model_validator(mode="after")
    def _unseen_people_exist(self) -> Self:
        unseen = self.evaluation.unseen_people
        if unseen and self.facts.csv is not None:
            raise ValueError(
                "evaluation.unseen_people must be 0 where facts.csv gives the people: nobody else is known"
            )
        if self.facts.n_people + unseen > MAX_PEOPLE:
            raise ValueError(
                f"facts.n_people + evaluation.unseen_people = {self.facts.n_people + unseen:,}: "
                f"there are {MAX_PEOPLE:,} names"
            )
        return self

    def flops(self) -> float:
        """Floating-point operations of the whole training, about: three forward passes a step."""
        n_dialogs = 4 * self.facts.n_people
        share = self.training.biographies
        # Tokens of a dialog, in the mean, if they are bytes; those of files are taken for questions.
        length = round((1 - share) * (66 if self.mode == "in-weight" else 184) + share * 140)
        batch = min(self.training.batch_size, n_dialogs)
        return 3.0 * self.training.total_steps(n_dialogs) * batch * self.model.forward_flops(length, length // 2)


def read_config(path: Path) -> RunConfig:
    """The configuration in a JSON file, or an `InputError` that names the file."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the configuration {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    return RunConfig.parse(values)


def override(config: RunConfig, assignments: dict[str, object]) -> RunConfig:
    """`config` with fields replaced by dotted name: `{"model.d_model": 64}`. Raises `InputError`."""
    values = config.model_dump(exclude_defaults=True)
    for name, value in assignments.items():
        *groups, field = name.split(".")
        target = values
        for group in groups:
            target = target.setdefault(group, {})
            if not isinstance(target, dict):
                raise InputError(f"unknown configuration key {name!r}: {group} has no fields")
        target[field] = value
    return RunConfig.parse(values)
