"""The transformer as Hugging Face's Llama."""

from lib.base import InputError
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
            bos_token_id=None,
            eos_token_id=c.vocab_size - 1,
        )
    )
    llama.load_state_dict({_llama_name(name): tensor for name, tensor in model.state_dict().items()})
    return llama.eval()
