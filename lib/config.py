"""`RunConfig`: everything that decides the outcome of one run, in one object.

The same object is built by a notebook cell, the command line, a sweep and a cluster job.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from reprlib import repr as brief
from typing import Annotated, Any, Literal, Self

from pydantic import Field, FiniteFloat, Json, TypeAdapter, ValidationError, model_validator

from lib.base import Config, Identified, InputError, unique_fields
from lib.dialogs.templates import QuestionMode
from lib.dialogs.tokenizers import ByteTokenizer
from lib.facts.people import MAX_PEOPLE, RELEASED, FactsConfig
from lib.paths import LARGEST_TEXT, read_bytes, read_json, reading


class ModelConfig(Config):
    """Shape of the transformer. The defaults are the paper's: 2 layers, 2 heads, byte vocabulary."""

    d_model: int = Field(32, ge=2)
    n_layers: int = Field(2, ge=1, le=1_000)
    n_heads: int = Field(2, ge=1)
    n_kv_heads: int | None = Field(None, ge=1)
    vocab_size: int = Field(260, ge=1)
    rope_theta: float = Field(10_000.0, gt=1)
    #: "standard" turns pair k at position t by t theta^(-2k/E). "paper" multiplies that by 2 pi, as the paper's code
    #: does: the first pair then turns by whole circles and knows no position.
    rope: Literal["standard", "paper"] = "standard"
    norm_eps: float = Field(1e-5, gt=0)

    @model_validator(mode="after")
    def _heads_fit(self):
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"model.d_model = {self.d_model} with n_heads = {self.n_heads}: give a multiple of {2 * self.n_heads}"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(f"model.n_kv_heads = {self.kv_heads}: give a divisor of n_heads = {self.n_heads}")
        return self

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def n_params(self) -> int:
        """Parameters in closed form; 32 d^2 + 525 d at 2 layers, 2 heads and 260 tokens."""
        d, kv = self.d_model, self.kv_heads * self.head_dim
        block = 2 * d * d + 2 * d * kv + 3 * d * 4 * d + 2 * d
        return 2 * self.vocab_size * d + self.n_layers * block + d

    def forward_flops(self, seq_len: int, n_logits: int | None = None) -> int:
        """Return a forward pass's FLOPs (2 per multiply-add) over `seq_len` tokens, `n_logits` of which have logits."""
        d, kv = self.d_model, self.kv_heads * self.head_dim
        matrices = self.n_layers * (2 * d * d + 2 * d * kv + 12 * d * d) * seq_len
        attention = self.n_layers * d * seq_len * (seq_len + 1)  # scores and values over the causal triangle
        output = self.vocab_size * d * (seq_len if n_logits is None else n_logits)
        return 2 * (matrices + attention + output)


class OptimConfig(Config):
    """Optimizer and learning-rate schedule."""

    #: "muon" is Muon for the hidden matrices and AdamW for embedding, output and norms; "adamw" is AdamW for all.
    name: Literal["adamw", "muon"] = "muon"
    #: Peak learning rate of AdamW.
    lr: float = Field(1e-2, gt=0)
    #: Peak learning rate of Muon.
    muon_lr: float = Field(2e-2, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    #: Whether weight decay applies to the gains of norms, too.
    decay_norms: bool = False
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    #: The gradient is scaled down to at most this norm; None leaves it as it is.
    clip_norm: float | None = Field(1.0, gt=0)


class TrainingConfig(Config):
    """Length of training, its batches and its loss."""

    #: The schedule's length; a run may stop earlier (see `EvaluationConfig.stop_at_recall`). None: 150 passes over the
    #: data, and at least 600 steps.
    steps: int | None = Field(None, ge=1)
    #: Dialogs per step, never more than the dataset holds.
    batch_size: int = Field(64, ge=1)
    #: How many batches are sorted by length together, for less padding; 1: batches are random.
    length_pool: int = Field(8, ge=1)
    #: Share of the training dialogs that are biographies: all facts about a person in one turn, without a question.
    biographies: float = Field(0.0, ge=0, lt=1)
    #: Files of dialogs (`lib.dialogs.files`), and the share of the training dialogs that comes from each.
    files: dict[str, Annotated[float, Field(gt=0, lt=1)]] = {}
    #: "cross-entropy", or "focal": each trained token's cross-entropy weighted by (1 - p)^focal_gamma, p the model's
    #: probability of it, with weights that add up to one over a batch (Lin et al., 2017).
    loss: Literal["cross-entropy", "focal"] = "cross-entropy"
    focal_gamma: float = Field(2.0, gt=0, le=5)
    #: Whether the loss counts the value that an in-tool answer repeats after the database said it.
    repeats: bool = True
    #: Parts (micro-batches) that a step's batch is cut into.
    grad_accumulation: int = Field(1, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    checkpoint_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _something_is_left_for_questions(self) -> Self:
        others = self.biographies + sum(self.files.values())
        if others >= 1:
            raise ValueError(f"training.files and training.biographies add up to {others:g}: give less than 1")
        return self

    @property
    def gamma(self) -> float:
        """The exponent of the focal loss, 0 for cross-entropy."""
        return self.focal_gamma if self.loss == "focal" else 0.0

    @property
    def questions(self) -> float:
        """Share of the training dialogs that are questions about the people."""
        return 1 - self.biographies - sum(self.files.values())

    def total_steps(self, n_dialogs: int) -> int:
        """Return the number of steps of the schedule on a dataset of `n_dialogs`."""
        return self.steps or max(600, math.ceil(150 * n_dialogs / self.batch_size))


class EvaluationConfig(Config):
    """Measurement of recall during training, and early stopping."""

    #: Steps between two measurements; None measures at the end only.
    every: int | None = Field(100, ge=1)
    #: Questions asked during training, the first ones of the dataset; the last measurement asks all.
    questions: int = Field(1024, ge=1)
    #: Training ends when the last two measurements reached this recall; None trains to the last step.
    stop_at_recall: float | None = Field(1.0, gt=0, le=1)
    #: Training ends when a measurement in the second half of the schedule is below this recall; None never gives up.
    give_up_below: float | None = Field(None, gt=0, le=1)
    #: Unseen people of each kind (`lib.evaluation.generalization`) asked about after the last step.
    unseen_people: int = Field(0, ge=0, le=10_000)


class RunConfig(Identified):
    """One run: facts + model + optimizer + training + evaluation."""

    mode: QuestionMode = "in-weight"
    #: Seeds the initialization and the order of the data; `facts.seed` draws the people.
    seed: int = Field(0, ge=0, lt=2**63)
    #: "bytes", or a vocabulary file (`lib.dialogs.tokenizers`), whose size must equal `model.vocab_size`.
    tokenizer: str = "bytes"
    facts: FactsConfig = FactsConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _tokens_and_people_suffice(self) -> Self:
        size, unseen, least = self.model.vocab_size, self.evaluation.unseen_people, ByteTokenizer().vocab_size
        if self.tokenizer == "bytes" and size < least:
            raise ValueError(f"model.vocab_size = {size} for bytes and special tokens: give at least {least}")
        if unseen and self.facts.csv is not None:
            raise ValueError("evaluation.unseen_people must be 0 where facts.csv gives the people")
        if not self.training.repeats and (self.tokenizer != "bytes" or self.training.files):
            raise ValueError("training.repeats = False needs tokenizer = bytes, and no training.files")
        if (n := self.facts.n_people + unseen) > MAX_PEOPLE:
            raise ValueError(f"facts.n_people + evaluation.unseen_people = {n:,}: there are {MAX_PEOPLE:,} names")
        return self

    @property
    def title(self) -> str:
        """The run in a few words."""
        correlation = f", alpha {self.facts.alpha:g}" if self.facts.alpha else ""
        law = ", released law" if self.facts.law == RELEASED else ""
        facts = Path(self.facts.csv).name if self.facts.csv else f"{self.facts.n_facts} facts{correlation}{law}"
        shape = {"layer": self.model.n_layers, "head": self.model.n_heads}
        told = " of ".join(f"{n} {part}{'s' * (n > 1)}" for part, n in shape.items())
        layers = "" if {*shape.values()} == {2} else f", {told}"
        return f"{self.mode}, {facts}, d = {self.model.d_model}{layers}, seed {self.seed}"

    def flops(self, n_facts: int | None = None) -> float:
        """Return about how many floating-point operations the whole training takes: three forward passes per step.

        n_facts: of the people, if they are from a CSV.
        """
        n_dialogs = n_facts or self.facts.n_facts
        share = self.training.biographies
        # Mean tokens per dialog, if they are bytes; dialogs of files count as questions.
        length = round((1 - share) * (66 if self.mode == "in-weight" else 184) + share * 140)
        batch = min(self.training.batch_size, n_dialogs)
        return 3.0 * self.training.total_steps(n_dialogs) * batch * self.model.forward_flops(length, length // 2)


def read_config(path: Path) -> RunConfig:
    """Return the configuration in a JSON file; an `InputError` names the file."""
    with reading(f"the configuration {path}, a file of JSON"):
        values = json.loads(read_bytes(path, LARGEST_TEXT), object_pairs_hook=unique_fields)
    return RunConfig.parse(values)


def override(config: RunConfig, assignments: dict[str, object]) -> RunConfig:
    """Return `config` with fields replaced by dotted name: `{"model.d_model": 64}`. Raises `InputError`."""
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


class Observers(Config):
    """Extra logging of a run. It is no part of `RunConfig` because it does not change what is learned."""

    tensorboard: bool = Field(False, description="also log for TensorBoard, into tensorboard/")
    wandb: str | None = Field(None, min_length=1, description="also log to this project of Weights & Biases")
    profile_steps: int = Field(0, ge=0, description="profile this many steps near the start, into profile/")
    probe_every: int | None = Field(
        None, ge=1, description="moments of activations and gradients at this interval of steps, into probes.jsonl"
    )


#: No extra logging.
UNOBSERVED = Observers()


# Rows -----------------------------------------------------------------------------------------------------------------

#: Columns that every finished run must have, because code reads them.
FINISHED = "mode n_facts recall n_questions steps steps_budget train_seconds stopped finished_at device config".split()
TEXT = """run_id profile mode optimizer dtype stopped people_digest tokenizer finished_at device python torch commit
measured_commit base task adaptation weights capability_task capability_source experiment method asked who""".split()
_Integer = Annotated[int, Field(ge=0, lt=2**63)]
#: Pattern of column names, description and type of values; the first match counts.
_COLUMNS = [
    ("|".join(TEXT), "text", TypeAdapter(str)),
    ("n_(facts|params|questions)|batch_size|steps_budget", "above 0", TypeAdapter(Annotated[_Integer, Field(gt=0)])),
    ("seed|steps?|next_smaller|n_recall|n_people|d_model", "a count", TypeAdapter(_Integer)),
    ("final|repeats|every_seed", "True or False", TypeAdapter(bool)),
    ("config", "an object as JSON", TypeAdapter(Json[dict])),
    ("sizes", "sizes of files", TypeAdapter(dict[str, int])),
    ("hops|by_frequency", "anything", TypeAdapter(Any)),
    ("nll_bits.*", "a finite number", TypeAdapter(FiniteFloat)),  # an attribute may be called recall
    (".*recall.*", "from 0 to 1", TypeAdapter(Annotated[float, Field(ge=0, le=1)])),
    ("(?s).*", "a finite number", TypeAdapter(FiniteFloat | bool)),
]


def check_row(row: Mapping[str, Any], fields: Iterable[str] = (), strict: bool = True) -> None:
    """Raise `ValueError` unless a row has all `fields`, and each value is of its column's type.

    If not `strict`, text that can be read as this type is accepted, too.
    """
    if lacking := [name for name in fields if row.get(name) is None]:
        raise ValueError(f"it lacks {lacking[0]}")
    for name, value in row.items():
        kind, accepted = next(column for pattern, *column in _COLUMNS if re.fullmatch(pattern, name))
        try:
            value is None or accepted.validate_python(value, strict=strict)
        except ValidationError:
            raise ValueError(f"{name} is {brief(value)}, not {kind}") from None
    if row.get("config") and "base" not in row:  # no fine-tuning row
        config_of(row)


def config_of(row: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of the run behind a row."""
    return RunConfig.parse(json.loads(row["config"]))


def read_row(path: Path, kind: type = dict, fields: Iterable[str] = FINISHED) -> Any:
    """Return the row of a finished run or, if `kind` is list, its rows.

    Raises `DamagedFile` where `check_row` refuses one.
    """
    return read_json(path, kind, fields, partial(check_row, fields=fields))
