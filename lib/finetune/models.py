"""Chat models and their tokenizers from a folder or from the Hugging Face hub."""

import os
import re
from pathlib import Path

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from lib.base import InputError
from lib.paths import reading
from lib.training.devices import resolve_device

# Runs show their own progress; TRANSFORMERS_VERBOSITY brings the library's warnings back.
logging.disable_progress_bar()
datasets.disable_progress_bars()
if "TRANSFORMERS_VERBOSITY" not in os.environ:
    logging.set_verbosity_error()

#: What is replaced in chat templates, and by what: a conversation must read the same on any day, when a run is resumed
#: or a cached answer used, and in training as in generation. So Llama-3.2 and SmolLM3 write Llama's default for today,
#: and Qwen3 an empty thought before every reply, not only before the last. A saved model keeps these changes.
_FIXED = {
    r"strftime_now\([^)]*\)": "'26 Jul 2024'",
    r"loop\.index0 > ns\.last_query_index|loop\.last or \(not loop\.last and reasoning_content\)"
    "|enable_thinking is defined and enable_thinking is false": "true",
}


def load_model(
    source: str | Path, device: str = "auto", dtype: str | torch.dtype = "auto", **options
) -> PreTrainedModel:
    """Return a causal language model in evaluation mode.

    source: a folder that `save_pretrained` wrote, or a model's name on the hub; adapters (LoRA) are loaded onto the
    base that their folder names. dtype: "auto" is that of the saved weights. options: of `from_pretrained`. Raises
    `InputError` if there is no such model, or if it has recurrent layers or lacks weights.
    """
    device = resolve_device(device)
    # On a CPU, conversations are too short for fused attention, whose backward pass takes twice the time there.
    options |= {"attn_implementation": "eager"} if device.type == "cpu" else {}
    model, loaded = _load(AutoModelForCausalLM, "model", source, dtype=dtype, output_loading_info=True, **options)
    if missing := sorted(loaded["missing_keys"]):  # which transformers would draw at random
        raise InputError(f"cannot load {source}: it lacks the weights {missing[0]} and {len(missing) - 1} more")
    if model._is_stateful:  # recurrent layers: their state cannot be cut back to what prompts share
        raise InputError(f"cannot use the model in {source}: it has recurrent layers, use one with attention only")
    return model.to(device).eval()


def load_tokenizer(source: str | Path, **options) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model, from its folder or by its name on the hub. Raises `InputError` without one."""
    tokenizer = _load(AutoTokenizer, "tokenizer", source, **options)
    for pattern, fixed in _FIXED.items() if isinstance(tokenizer.chat_template, str) else ():
        tokenizer.chat_template = re.sub(pattern, fixed, tokenizer.chat_template)
    return tokenizer


def read_shared(model: PreTrainedModel, tokens: torch.Tensor, most: int) -> tuple[int, Cache | None]:
    """Run the model once on the prefix that all rows of tokens (B, S) share; return its length and the rows' cache.

    The prefix has at most `most` tokens. Without one, for a single row, or with activation checkpointing: (0, None).
    """
    shared, cache = int((tokens == tokens[:1]).all(0).long().cumprod(0).sum().clamp(max=most)), None
    if shared and len(tokens) > 1:
        cache = model(input_ids=tokens[:1, :shared], use_cache=True, logits_to_keep=1).past_key_values
    if cache is None:
        return 0, None
    cache.batch_repeat_interleave(len(tokens))
    return shared, cache


def _load(kind: type, what: str, source: str | Path, **options):
    takes = "give a folder from save_pretrained, or a name on the hub (itl fetch; if it is gated: hf auth login)"
    with reading(f"a {what} from {source}: {takes}; code that comes with a model is never run", Exception):
        # By default, transformers would ask at the terminal whether to run code from the folder.
        return kind.from_pretrained(str(source), trust_remote_code=False, **options)
