"""Chat models and their tokenizers from a folder or from the Hugging Face hub."""

import hashlib
import os
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stderr, suppress
from io import StringIO
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from lib.base import DamagedFile, InputError
from lib.paths import read_json
from lib.training.devices import resolve_device

# Runs show their own progress; TRANSFORMERS_VERBOSITY brings the library's warnings back.
logging.disable_progress_bar()
if "TRANSFORMERS_VERBOSITY" not in os.environ:
    logging.set_verbosity_error()


def load_model(
    source: str | Path, device: str = "auto", dtype: str | torch.dtype = "auto", **options
) -> PreTrainedModel:
    """Return a causal language model in evaluation mode.

    source: a folder that `save_pretrained` wrote, or a model's name on the hub. A folder with adapters only (LoRA) is
    loaded onto the base that it names. dtype: "auto" is the one that the weights were saved in. options: further ones
    of `from_pretrained`. Raises `InputError` if there is no such model, if it has recurrent layers (Mamba, say), or if
    weights are missing: transformers alone would draw them at random.
    """
    device = resolve_device(device)
    # On a CPU, conversations are too short for fused attention, whose backward pass takes twice the time there.
    options |= {"attn_implementation": "eager"} if device.type == "cpu" else {}
    model, loaded = _load(AutoModelForCausalLM, "model", source, dtype=dtype, output_loading_info=True, **options)
    if missing := sorted(loaded["missing_keys"]):
        raise InputError(
            f"cannot load a model from {source}: it lacks the weights {missing[0]} and {len(missing) - 1} more"
        )
    if model._is_stateful:  # recurrent layers: their state cannot be cut back to what prompts share
        raise InputError(f"cannot use the model in {source}: it has recurrent layers, take one of attention alone")
    return model.to(device).eval()


def load_tokenizer(source: str | Path, **options) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model, from its folder or by its name on the hub. Raises `InputError` without one."""
    return _load(AutoTokenizer, "tokenizer", source, **options)


def read_shared(model: PreTrainedModel, tokens: torch.Tensor, most: int) -> tuple[int, Cache | None]:
    """Run the model once on the prefix that all rows of tokens (B, S) share; return its length and the rows' cache.

    The prefix ends at `most` tokens. The cache is None if nothing is shared or activation checkpointing turned it off.
    """
    shared, cache = int((tokens == tokens[:1]).all(0).long().cumprod(0).sum().clamp(max=most)), None
    if shared and len(tokens) > 1:
        cache = model(input_ids=tokens[:1, :shared], use_cache=True, logits_to_keep=1).past_key_values
    if cache is None:
        return 0, None
    cache.batch_repeat_interleave(len(tokens))
    return shared, cache


def no_bars_in_logs() -> AbstractContextManager:
    """Silence stderr unless it is a terminal: libraries draw progress bars on it."""
    return nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO())


def _load(kind: type, what: str, source: str | Path, **options):
    try:
        with no_bars_in_logs():
            # Otherwise transformers would ask at the terminal whether to run code from the folder.
            return kind.from_pretrained(str(source), trust_remote_code=False, **options)
    except MemoryError:
        raise
    except Exception as error:  # what transformers raises for malformed content is not documented
        missing, onto = str(source), ""
        with suppress(OSError, DamagedFile, KeyError):  # adapters (LoRA), which are loaded onto a base
            base = str(read_json(Path(source) / "adapter_config.json")["base_model_name_or_path"])
            if base in str(error) or "couldn't connect" in str(error):
                missing, onto = base, f" onto {base}"
        raise InputError(f"cannot load a {what} from {source}{onto}: {_advice(missing, error)}") from None


def _advice(source: str, error: Exception) -> str:
    """Return what to do about an error of `from_pretrained`, whose own message seldom says it."""
    said = str(error)
    if "gated repo" in said:
        return "it is gated, so ask for access on its page on the hub and log in (hf auth login)"
    if "trust_remote_code" in said:
        return "it comes with code of its own, which is never run: take one that transformers knows"
    if "couldn't connect" in said:  # also where a folder's adapter names a base
        offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
        cause = "HF_HUB_OFFLINE forbids fetching it" if offline else "the hub cannot be reached"
        return f"there is no such folder, it was never fetched (itl fetch), and {cause}"
    reason = (said.strip().splitlines() or ["no reason given"])[0]
    if isinstance(error, ImportError):
        return f"it needs a package that is not installed ({reason})"
    if os.path.isdir(source):
        return f"it takes a folder that save_pretrained wrote ({reason})"
    return "there is no such folder, nor such a name on the hub (owner/name)"


#: The files that determine a model's replies.
_MODEL_FILES = ("*.safetensors", "*.bin", "*config.json", "tokenizer*", "*.jinja")


def fingerprint(source: str | Path) -> str:
    """Return what identifies a model: a digest of the files in its folder, or its name on the hub."""
    folder = Path(source)
    if not os.path.isdir(folder):  # unlike `Path.is_dir`, accepts long names
        return str(source)
    found = {path for pattern in _MODEL_FILES for path in folder.glob(pattern) if path.is_file()}
    files = sorted(path for path in found if not path.name.startswith("."))  # macOS puts hidden files beside them
    content = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            content.update(hashlib.file_digest(file, "sha256").digest() + path.name.encode())
    return content.hexdigest()[:16]
