"""What a model is to learn (`FinetuneConfig.task`): its conversations, and how much of it a checkpoint knows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.finetune.config import FinetuneConfig


@dataclass(frozen=True)
class Lesson:
    """Conversations to train on, and the columns that say how much of them a model knows, `recall` among them."""

    conversations: list[dict]
    measure: Callable[[PreTrainedModel, PreTrainedTokenizerBase], dict[str, float]]


@contextmanager
def lesson(config: FinetuneConfig, directory: Path | None) -> Iterator[Lesson]:
    """What a run learns. directory: where its database goes, which is open meanwhile; None: nobody will measure."""
    ...
