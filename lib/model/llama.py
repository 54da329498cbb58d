"""The transformer as Hugging Face's Llama, and back."""

from lib.base import InputError
from lib.config import ModelConfig
from lib.model.transformer import Transformer

_LLAMA_NAMES = {
    "embedding.": "model.embed_tokens.",
    "blocks.": "model.layers.",
    ".attention_norm.": ".input_layernorm.",
    ".attention.": ".self_attn.",
    ".ffn_norm.": ".post_attention_layernorm.",
    ".ffn.": ".mlp.",
    "output.": "lm_head.",
}


def _llama_name(name: str) -> str:
    for ours, theirs in _LLAMA_NAMES.items():
        name = name.replace(ours, theirs)
    return f"model.{name}" if name.startswith("norm.") else name


def to_llama(model: Transformer):
    """Return the same model as Hugging Face's `LlamaForCausalLM` (extra `[scale]`); logits agree.

    Only `rope="standard"` exists there: any other is an `InputError`.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    if c.rope != "standard":
        raise InputError(f"Llama has no model.rope = {c.rope!r}: only 'standard' can be exported")
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            intermediate_size=4 * c.d_model,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.kv_heads,
            rms_norm_eps=c.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=c.vocab_size - 1,
            pad_token_id=None,
        )
    )
    llama.load_state_dict({_llama_name(name): tensor for name, tensor in model.state_dict().items()})
    return llama.eval()


def from_llama(llama) -> Transformer:
    """Return a `LlamaForCausalLM` as our model; logits agree.

    A Llama of another architecture is an `InputError`: another width of the feed-forward, biases, tied embeddings,
    scaled rotary positions.
    """
    c = llama.config
    needed = {
        "intermediate_size": 4 * c.hidden_size,
        "hidden_act": "silu",
        "head_dim": c.hidden_size // c.num_attention_heads,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "rope_type": "default",
    }
    theirs = c.to_dict() | c.rope_parameters
    for name, value in needed.items():
        if theirs[name] != value:
            raise InputError(f"a Llama with {name} = {theirs[name]!r} is no model of this kind: it must be {value!r}")
    config = ModelConfig(
        d_model=c.hidden_size,
        n_layers=c.num_hidden_layers,
        n_heads=c.num_attention_heads,
        n_kv_heads=None if c.num_key_value_heads == c.num_attention_heads else c.num_key_value_heads,
        vocab_size=c.vocab_size,
        rope_theta=float(theirs["rope_theta"]),
        norm_eps=c.rms_norm_eps,
    )
    model, weights = Transformer(config), llama.state_dict()
    model.load_state_dict({name: weights[_llama_name(name)] for name in model.state_dict()})
    return model
