"""The base models of Section 6: their names, learning rates and identity. Needs no model libraries."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple


class Base(NamedTuple):
    """A chat model: its name on the hub, and the learning rates of full fine-tuning, in weights and in tool."""

    hub: str
    in_weight: float = 5e-5
    in_tool: float = 5e-5
    #: The published model with these rates: this one, or one of its size. None: there is none.
    rates_of: str | None = None


BASES = {
    # The paper's six models, with its rates; its batch of 128 and its schedule are `FinetuneConfig`'s defaults.
    "SmolLM-135M": Base("HuggingFaceTB/SmolLM-135M-Instruct", 1e-3, 1e-4, "SmolLM-135M"),
    "SmolLM-360M": Base("HuggingFaceTB/SmolLM-360M-Instruct", 1e-3, 1e-4, "SmolLM-360M"),
    "SmolLM-1.7B": Base("HuggingFaceTB/SmolLM-1.7B-Instruct", 3e-4, 5e-5, "SmolLM-1.7B"),
    "Llama-3.2-1B": Base("meta-llama/Llama-3.2-1B-Instruct", 5e-5, 5e-5, "Llama-3.2-1B"),
    "Llama-3.2-3B": Base("meta-llama/Llama-3.2-3B-Instruct", 4e-5, 4e-5, "Llama-3.2-3B"),
    "Llama-3.1-8B": Base("meta-llama/Llama-3.1-8B-Instruct", 2e-5, 2e-5, "Llama-3.1-8B"),
    "SmolLM2-135M": Base("HuggingFaceTB/SmolLM2-135M-Instruct", 1e-3, 1e-4, "SmolLM-135M"),
    "SmolLM2-360M": Base("HuggingFaceTB/SmolLM2-360M-Instruct", 1e-3, 1e-4, "SmolLM-360M"),
    "SmolLM2-1.7B": Base("HuggingFaceTB/SmolLM2-1.7B-Instruct", 3e-4, 5e-5, "SmolLM-1.7B"),
    "SmolLM3-3B": Base("HuggingFaceTB/SmolLM3-3B"),
    "Qwen3-0.6B": Base("Qwen/Qwen3-0.6B"),
    "Gemma-3-270M": Base("google/gemma-3-270m-it"),
    "Gemma-3-1B": Base("google/gemma-3-1b-it"),
    # Random weights (`lib.finetune.models`), to try everything but the quality of replies.
    "random": Base(""),
}
#: Adapters start at zero and take a higher rate.
LORA_FACTOR = 10
#: The files that determine a model's replies.
_MODEL_FILES = ("*.safetensors", "*.bin", "*config.json", "tokenizer*", "*.jinja")


def learning_rate(base: str, mode: str, adapters: bool = False) -> float:
    """Return the default learning rate of a base, a name in `BASES` or any other model, in a mode."""
    known = BASES.get(base, Base(base))
    return (known.in_weight if mode == "in-weight" else known.in_tool) * (LORA_FACTOR if adapters else 1)


def fingerprint(source: str | Path) -> str:
    """Return what identifies a model: a digest of the files in its folder, or its name on the hub."""
    folder = Path(source)
    if not os.path.isdir(folder):  # unlike `Path.is_dir`, accepts long names
        return str(source)
    content = hashlib.sha256()
    for path in sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern)}):
        if path.is_file() and not path.name.startswith("."):  # macOS puts hidden files beside them
            with path.open("rb") as file:
                content.update(hashlib.file_digest(file, "sha256").digest() + path.name.encode())
    return content.hexdigest()[:16]
