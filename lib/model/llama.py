"""The transformer as Hugging Face's Llama."""

from lib.base import InputError
from lib.model.transformer import Transformer


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
    inner = llama.model
    pairs = [(model.embedding, inner.embed_tokens), (model.norm, inner.norm), (model.output, llama.lm_head)]
    for block, layer in zip(model.blocks, inner.layers, strict=True):
        pairs += [(block.attention_norm, layer.input_layernorm), (block.attention, layer.self_attn)]
        pairs += [(block.ffn_norm, layer.post_attention_layernorm), (block.ffn, layer.mlp)]
    for ours, theirs in pairs:
        theirs.load_state_dict(ours.state_dict())
    return llama.eval()
