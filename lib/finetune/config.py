"""`FinetuneConfig`: everything that decides the outcome of one fine-tuning. Like bases and plans, it needs no torch."""

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from lib.base import Identified
from lib.experiments.scale_tables import rate
from lib.finetune.bases import learning_rate

ChatMode = Literal["in-weight", "in-tool", "in-tool-text"]


class FinetuneConfig(Identified):
    """One fine-tuning: base model, task, training, and the evaluation of checkpoints (Section 6)."""

    #: A name in `lib.finetune.bases`, a folder that `save_pretrained` wrote, or a name on the hub.
    base: str
    #: facts: of people, in one of the modes. hybrid: frequent facts in weights, the others by tool.
    #: trivia: the questions of `lib.finetune.triviaqa`.
    task: Literal["facts", "hybrid", "trivia"] = "facts"
    mode: ChatMode = "in-weight"
    #: Four a person; for trivia, the maximum number of questions.
    n_facts: int = Field(500, ge=1)
    #: Source of trivia, see `lib.finetune.triviaqa.load_questions`.
    source: str = "trivia"
    #: Draws the people and the order of the data.
    seed: int = Field(0, ge=0, lt=2**31)
    #: Rank of adapters (LoRA); None trains all weights.
    lora_rank: int | None = Field(None, ge=1, le=2**16)
    #: AdamW's learning rate; by default that of the base in this mode (`lib.finetune.bases`). It is part of a run's id.
    lr: float = Field(gt=0, default_factory=lambda it: learning_rate(it["base"], it["mode"], bool(it["lora_rank"])))
    #: Constant or falling to zero, after a warm-up over this share of the steps.
    schedule: Literal["constant_with_warmup", "cosine"] = "constant_with_warmup"
    warmup: float = Field(0.05, ge=0, lt=1)
    #: Conversations per step, over all processes.
    batch_size: int = Field(128, ge=1)
    #: Micro-batches of a step; their gradients add up.
    grad_accumulation: int = Field(1, ge=1)
    #: Maximum; None: 100 passes over the conversations, but at least 60 steps.
    steps: int | None = Field(None, ge=1)
    #: Steps between two checkpoints, each of which is evaluated; None makes about ten.
    checkpoint_every: int | None = Field(None, ge=1)
    #: Training ends when a checkpoint recalls this share of what was trained; None trains to the last step.
    stop_at_recall: float | None = Field(0.99, gt=0, le=1)
    #: Trained facts that a checkpoint is asked about, and unseen people of four kinds (Section 6: 300 and 100).
    questions: int = Field(300, ge=1)
    unseen_people: int = Field(100, ge=4)
    #: Prompts on which the distance to the base is measured.
    prompts: int = Field(100, ge=1, le=100)
    #: The capability test: HellaSwag, this repository's questions as multiple choice, or whichever is available.
    capability: Literal["hellaswag", "trivia", "any", "none"] = "hellaswag"
    #: How many of the test's items are asked, from the first; None asks all.
    items: int | None = Field(None, ge=1)
    #: Run the capability test on the base and the last checkpoint only.
    capability_at_end: bool = False
    #: Dtype of matrix products and of evaluation; "auto" is bfloat16 if the device supports it.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    #: Maximum tokens of a conversation; a longer one is an error.
    max_length: int = Field(512, ge=8)

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.batch_size % self.grad_accumulation:
            raise ValueError(f"grad_accumulation = {self.grad_accumulation} must divide batch_size {self.batch_size}")
        if self.task == "hybrid" and self.mode == "in-weight":
            raise ValueError("task = hybrid needs mode = in-tool or in-tool-text: rare facts are looked up")
        return self

    @property
    def title(self) -> str:
        """The run in a few words."""
        what = self.task if self.task != "facts" else self.mode
        adapters = f", LoRA of rank {self.lora_rank}" if self.lora_rank else ""
        return f"{self.base}, {what}{adapters}, {self.n_facts:,} facts, rate {rate(self.lr)}, seed {self.seed}"

    def total_steps(self, n_conversations: int) -> int:
        """Return the steps of the schedule for `n_conversations`."""
        return self.steps or max(60, math.ceil(100 * n_conversations / self.batch_size))

    def interval(self, n_conversations: int) -> int:
        """Return the steps between two checkpoints for `n_conversations`."""
        return self.checkpoint_every or max(1, self.total_steps(n_conversations) // 10)
