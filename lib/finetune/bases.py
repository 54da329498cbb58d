"""The base models of Section 6, by name, with the learning rate that each was fine-tuned with."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.finetune.config import FinetuneConfig
from lib.finetune.embedded import EmbeddedConfig, embedded_model
from lib.finetune.models import load_model, load_tokenizer


@dataclass(frozen=True)
class Base:
    """Where a model comes from, and its recipe for full fine-tuning in weights."""

    hub: str
    lr: float
    calls: bool = True  # whether its chat template knows tools; if not, it writes its requests as text


#: The published ones, with their published rates; the batch of 128 and the schedule are `FinetuneConfig`'s defaults.
PUBLISHED = {
    "SmolLM-135M": Base("HuggingFaceTB/SmolLM-135M-Instruct", 1e-3, calls=False),
    "SmolLM-360M": Base("HuggingFaceTB/SmolLM-360M-Instruct", 1e-3, calls=False),
    "SmolLM-1.7B": Base("HuggingFaceTB/SmolLM-1.7B-Instruct", 3e-4, calls=False),
    "Llama-3.2-1B": Base("meta-llama/Llama-3.2-1B-Instruct", 5e-5),
    "Llama-3.2-3B": Base("meta-llama/Llama-3.2-3B-Instruct", 4e-5),
    "Llama-3.1-8B": Base("meta-llama/Llama-3.1-8B-Instruct", 2e-5),
}
#: Made here, in seconds, two minutes, or a quarter of an hour of a core.
EMBEDDED = {
    "embedded-smoke": EmbeddedConfig(d_model=32, n_layers=2, n_heads=2, copying_steps=1, steps=2, batch_size=4),
    "embedded-quick": EmbeddedConfig(),
    "embedded": EmbeddedConfig(n_layers=4, copying_steps=1200, steps=2200),
}
#: Of the embedded model, and of models that nobody published a rate of.
EMBEDDED_LR, OTHER_LR = 2e-3, 5e-5
#: Adapters start at nothing and take a higher rate.
LORA_FACTOR = 10


def learning_rate(config: FinetuneConfig) -> float:
    """The rate of a run: its own, or that of its base."""
    if config.lr is not None:
        return config.lr
    published = {name: base.lr for name, base in PUBLISHED.items()} | dict.fromkeys(EMBEDDED, EMBEDDED_LR)
    return published.get(config.base, OTHER_LR) * (LORA_FACTOR if config.lora_rank else 1)


def base_source(name: str) -> str | Path:
    """The folder, or the name on the hub, of a base model; the embedded one is made if it is not there."""
    if name in EMBEDDED:
        return embedded_model(EMBEDDED[name])
    return PUBLISHED[name].hub if name in PUBLISHED else name


def load_base(
    name: str, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base model, as `load_model` loads it, and its tokenizer.

    Raises `InputError` if there is none of this name, here or on the hub.
    """
    source = base_source(name)
    return load_model(source, device, dtype), load_tokenizer(source)
