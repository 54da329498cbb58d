"""The embedded base model of Section 6: a small chat model that is made on the spot, for no hub is asked.

It is an ordinary folder of Hugging Face: a `LlamaForCausalLM`, a tokenizer with a chat template that knows tools, and
what tells servers where in a reply the calls of functions stand.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock
from pydantic import Field
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lib.base import Config
from lib.finetune import protocol, questions, skills, tool_use
from lib.gradients import summed_loss
from lib.model import ModelConfig, Transformer, to_llama
from lib.monitor import progress
from lib.optim import OptimConfig, build_optimizers, clip_gradients, schedule_factor, set_learning_rate, step_all
from lib.paths import runs


class EmbeddedConfig(Config):
    """Sizes of an embedded model and of its training."""

    vocab_size: int = Field(768, ge=300)
    d_model: int = Field(128, ge=2)
    n_layers: int = Field(3, ge=1)
    n_heads: int = Field(4, ge=1)
    #: Steps of copying alone, then of all skills: copying is learnt in short conversations, and the tools build on it.
    copying_steps: int = Field(800, ge=0)
    steps: int = Field(950, ge=1)
    batch_size: int = Field(32, ge=1)


def embedded_model(config: EmbeddedConfig) -> Path:
    """The folder of an embedded model, for `from_pretrained`; trained if it is not there, by one process at a time."""
    folder = runs() / "embedded" / _digest(config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            unfinished = folder.with_name(f".{folder.name}.tmp")
            shutil.rmtree(unfinished, ignore_errors=True)
            _save(unfinished, *pretrain(config, "embedded model"))
            os.replace(unfinished, folder)
    return folder


def _digest(config: EmbeddedConfig) -> str:
    """16 hexadecimal digits of what decides a model: its sizes, and what it is taught and how."""
    content = hashlib.sha256(config.model_dump_json().encode())
    for source in (__file__, skills.__file__, questions.__file__, tool_use.__file__, protocol.__file__):
        content.update(Path(source).read_bytes())
    return content.hexdigest()[:16]


def _save(folder: Path, model: Transformer, tokenizer: PreTrainedTokenizerFast) -> None:
    llama = to_llama(model)
    for config in (llama.config, llama.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    llama.generation_config.do_sample = False
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- Training


def pretrain(config: EmbeddedConfig, description: str | None = None) -> tuple[Transformer, PreTrainedTokenizerFast]:
    """A model of `config` that has learnt the skills, and its tokenizer; deterministic for a number of threads."""
    tokenizer = make_tokenizer(config.vocab_size)
    shape = {name: getattr(config, name) for name in ("d_model", "n_layers", "n_heads")}
    model = Transformer(ModelConfig(vocab_size=len(tokenizer), **shape), torch.Generator().manual_seed(0))
    optim = OptimConfig()
    optimizers = build_optimizers(model, optim)
    with progress(config.copying_steps + config.steps, description) as bar:
        for step, (tokens, trained) in enumerate(_batches(config, tokenizer)):
            logits = model(tokens[:, :-1], select=trained[:, 1:])
            loss = summed_loss(logits, tokens[:, 1:][trained[:, 1:]]).weighted / len(logits)
            loss.backward()
            clip_gradients(model.parameters(), optim.clip_norm)
            # The rate falls only once there is everything to learn.
            set_learning_rate(optimizers, schedule_factor(optim, max(0, step - config.copying_steps), config.steps))
            step_all(optimizers)
            if step % 20 == 0:
                bar.set_postfix_str(f"loss={loss.item():.3f}", refresh=False)
            bar.update(1)
    return model, tokenizer


#: Batches whose conversations are sorted by length together, to pad little.
_SORTED = 16


def _batches(config: EmbeddedConfig, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens (B, S) and which of them are trained (B, S), batch by batch."""
    n = config.batch_size
    for steps, only in ((config.copying_steps, "copying"), (config.steps, None)):
        rows = skills.conversations(steps * n, seed=1, only=only)
        while encoded := sorted((_encode(row, tokenizer) for row in islice(rows, _SORTED * n)), key=len):
            batches = [encoded[i : i + n] for i in range(0, len(encoded), n)]
            Random(steps).shuffle(batches)
            yield from (_collate(batch, tokenizer) for batch in batches)


def _encode(row: dict, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), return_dict=False)


def _collate(encoded: list[list[int]], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, S), padded on the right, and which are trained: what the assistant says and the end of its turn."""
    tokens = np.full((len(encoded), max(map(len, encoded))), tokenizer.pad_token_id)
    for row, ids in zip(tokens, encoded, strict=True):
        row[: len(ids)] = ids
    roles = tokenizer.convert_tokens_to_ids([f"<|{role}|>" for role in ROLES])
    turns = np.maximum.accumulate(np.where(np.isin(tokens, roles), np.arange(tokens.shape[1]), 0), axis=1)
    speaker = np.take_along_axis(tokens, turns, axis=1)
    spoken = (speaker == roles[ROLES.index("assistant")]) & (tokens != speaker) & (tokens != tokenizer.pad_token_id)
    return torch.from_numpy(tokens), torch.from_numpy(spoken)


# ---- Tokenizer

PAD, END, CALL, CALL_END = "<|pad|>", "<|end|>", "<tool_call>", "</tool_call>"
ROLES = ("system", "user", "assistant", "tool")
#: One token each. A turn is its role's token, what is said, and END.
SPECIAL = (PAD, END, *(f"<|{role}|>" for role in ROLES), CALL, CALL_END)

#: Functions are offered by name and parameters. What the assistant generates is marked, for transformers to find it.
CHAT_TEMPLATE = """
{%- macro call(function) -%}
  {{ '{"name": "' + function.name + '", "arguments": ' + (function.arguments | tojson) + '}' }}
{%- endmacro %}
{%- macro offer(function) -%}
  {{ function.name }}(
  {%- for name, schema in function.parameters.properties.items() -%}
    {{ name }}{{ ': ' + schema.enum | join('|') if schema.enum }}{{ ', ' if not loop.last }}
  {%- endfor -%})
{%- endmacro %}
{%- set instructed = messages and messages[0].role == 'system' %}
{%- if tools or instructed -%}
  <|system|>{{ messages[0].content if instructed }}
  {%- for tool in tools or [] %}{{ '\n' if instructed or not loop.first }}{{ offer(tool.function) }}{% endfor -%}
  <|end|>
{%- endif %}
{%- for message in messages[1 if instructed else 0:] %}
  {%- if message.role not in ['user', 'assistant', 'tool'] -%}
    {{ raise_exception('there is no role ' + message.role + ' after the first message') }}
  {%- endif -%}
  <|{{ message.role }}|>
  {%- if message.role == 'assistant' %}{% generation %}{{ message.content or '' }}
    {%- for called in message.tool_calls or [] -%}<tool_call>{{ call(called.function) }}</tool_call>{%- endfor -%}
    <|end|>{% endgeneration %}
  {%- else %}{{ message.content }}<|end|>{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""

#: How `tokenizer.parse_response` and `transformers serve` read a reply. Arguments that are no JSON stay text.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open_pattern": r'<tool_call>\{"name": "(?P<name>[^"]*)", "arguments": ',
            "close": ["}" + CALL_END, END],
            "repeats": True,
            "content": "json",
            "content_args": {"allow_non_json": True},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close": END, "content": "text"},
    },
}

#: What is merged into tokens: letters within a word and the marks between two strings of JSON. A blank is a token of
#: its own and so is a digit, so that a name has the same tokens wherever it stands, which makes it easy to copy.
PIECES = r'\{"|": \{"|": "|", "|"\}+|\p{L}+|[^\p{L}]'
#: Conversations that decide the merges.
_N_READ = 2_000


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` tokens, learnt from the skills, with the chat template."""
    bpe = Tokenizer(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECES), "isolated"), to_bytes])
    bpe.decoder = decoders.ByteLevel()
    render, special = _with_template(bpe).apply_chat_template, re.compile("|".join(map(re.escape, SPECIAL)))
    texts = (
        text
        for row in skills.conversations(_N_READ, seed=0)
        for text in special.split(render(row["messages"], tools=row.get("tools"), tokenize=False))
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return _with_template(bpe)


def _with_template(bpe: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(SPECIAL[2:]),
        chat_template=CHAT_TEMPLATE,
        response_template=RESPONSE_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


# ---- Multiple choice


def multiple_choice_task(tokenizer: PreTrainedTokenizerFast, n: int = 300, seed: int = 0) -> dict:
    """`skills.multiple_choice(n, seed)` as a task of lm-eval with the metrics `acc` and `acc_norm`, for any chat model.

    A question stands in the chat template of `tokenizer`, and an ending is what the assistant says to it. Takes no hub:
    `lm_eval.simple_evaluate(model=..., tasks=[task], task_manager=TaskManager(include_defaults=False))`.
    """
    rows = [
        row | {"ctx": tokenizer.apply_chat_template([_user(row["ctx"])], add_generation_prompt=True, tokenize=False)}
        for row in skills.multiple_choice(n, seed)
    ]
    return {
        "task": "skills",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "ctx",
        "doc_to_choice": "endings",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
    }


def _user(content: str) -> dict:
    return {"role": "user", "content": content}
