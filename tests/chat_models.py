"""Chat models for tests, made here: random, scripted, and one that has learnt its facts by heart."""

from collections.abc import Callable, Iterable
from functools import cache
from types import SimpleNamespace

import torch
from torch.nn.functional import one_hot
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    SmolLM3Config,
)
from vocabularies import train_bpe

from lib.facts.sampling import sample_people
from lib.finetune.config import ChatMode
from lib.finetune.conversations import chats
from lib.finetune.tokens import tokenize_chats
from lib.training.loss import IGNORED

#: Short, to be learnt soon: tools by name alone, calls as JSON between marks.
TEMPLATE = """
{%- for tool in tools or [] %}{{ '<|start|>system\n' + tool.function.name + '<|end|>\n' }}{% endfor %}
{%- for message in messages %}{{ '<|start|>' + message.role + '\n' + message.content }}
  {%- for call in message.tool_calls or [] %}{{ '<call>' + (call.function | tojson) + '</call>' }}{% endfor %}
  {{- '<|end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"""


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(), eos_token="<|end|>", bos_token="<|start|>", chat_template=TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def random_model(seed: int = 0, spread: float = 0.2, vocab_size: int | None = None) -> LlamaForCausalLM:
    """With weights large enough for its words to depend on what it reads."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size or len(tokenizer()), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, initializer_range=spread, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


#: The families of the bases, each with what sets it apart: layers without positions, or that look back a little.
FAMILIES = {
    "Llama": (LlamaConfig, {}),
    "Qwen3": (Qwen3Config, {"head_dim": 16}),
    "SmolLM3": (SmolLM3Config, {"no_rope_layers": [1, 0]}),
    "Gemma3": (
        Gemma3TextConfig,
        {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}


def tiny(family: str, vocab_size: int, **options) -> PreTrainedModel:
    """A random model of one of `FAMILIES`."""
    kind, own = FAMILIES[family]
    torch.manual_seed(0)
    config = kind(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=None, **own, **options,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@cache
def teach(n_people: int, mode: ChatMode, steps: int) -> LlamaForCausalLM:
    """All facts of the first people by heart, in so many steps over all of them."""
    return learn(chats(sample_people(n_people), mode), tokenizer(), steps)


def learn(conversations: Iterable[dict], read_by: PreTrainedTokenizerFast, steps: int) -> LlamaForCausalLM:
    """Some conversations by heart."""
    rows = tokenize_chats(conversations, read_by, max_length=1000)
    width = max(map(len, rows["input_ids"]))
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids in rows["input_ids"]])
    labels = torch.tensor([ids + [IGNORED] * (width - len(ids)) for ids in rows["labels"]])
    model = random_model(spread=0.02).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


class _Rows:
    """Stands in for a cache of keys and values: what each row has read, and what it will say."""

    def __init__(self, n: int):
        self.read, self.replies = [[] for _ in range(n)], None

    def batch_repeat_interleave(self, n: int) -> None:
        self.read = [list(tokens) for tokens in self.read for _ in range(n)]

    def batch_select_indices(self, kept: torch.Tensor) -> None:
        self.read, self.replies = [self.read[i] for i in kept], [self.replies[i] for i in kept]


class ScriptedModel:
    """Stands in for a Hugging Face model: `reply` maps the text of a prompt to what is said; notes the batch sizes."""

    device = torch.device("cpu")

    def __init__(self, reply: Callable[[str], str]):
        self.reply, self.batches, self.config = reply, [], LlamaConfig()
        self.generation_config = SimpleNamespace(eos_token_id=None)

    def __call__(self, input_ids, attention_mask=None, past_key_values=None, logits_to_keep=1, **_):
        """Read what prompts begin with (no mask), then the rest of them with drafts, then a token at a time."""
        cache, start = past_key_values or _Rows(len(input_ids)), input_ids.shape[1] - logits_to_keep + 1
        if attention_mask is None:
            cache.read = input_ids.tolist()
            return SimpleNamespace(past_key_values=cache)
        places = attention_mask.sum(1, keepdim=True) - torch.tensor([[len(tokens)] for tokens in cache.read])
        if cache.replies is None:
            self.batches.append(len(input_ids))
            own = attention_mask[:, -input_ids.shape[1] :].bool()[:, :start]
            rows = zip(cache.read, input_ids[:, :start], own, strict=True)
            cache.read = [seen + tokens[mask].tolist() for seen, tokens, mask in rows]
            said = (self.reply(tokenizer().decode(tokens)) for tokens in cache.read)
            cache.replies = [tokenizer().encode(f"{text}<|end|>") for text in said]
            places = torch.arange(logits_to_keep).expand(len(input_ids), -1)
        end = [tokenizer().eos_token_id] * logits_to_keep
        chosen = torch.stack(
            [torch.tensor(r + end)[p.clamp(max=len(r))] for r, p in zip(cache.replies, places, strict=True)]
        )
        return SimpleNamespace(logits=one_hot(chosen, len(tokenizer())), past_key_values=cache)
