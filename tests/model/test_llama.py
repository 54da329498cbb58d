"""The transformer as Hugging Face's Llama, and back."""

import pytest
import torch
from small_models import build, some_tokens
from transformers import LlamaConfig, LlamaForCausalLM

from lib.base import InputError
from lib.config import ModelConfig
from lib.model.llama import from_llama, to_llama
from lib.model.transformer import Transformer

CONFIGS = [
    ModelConfig(d_model=32),
    ModelConfig(d_model=4, n_layers=1, vocab_size=7),
    ModelConfig(d_model=48, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=100, rope_theta=500_000.0),
    ModelConfig(d_model=32, n_heads=4, n_kv_heads=1, norm_eps=1e-2),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_logits_agree_with_llamas_on_the_same_weights(config):
    model, tokens = build(config), some_tokens(config, 3, 70)
    with torch.no_grad():
        assert torch.allclose(model(tokens), to_llama(model)(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_llama_that_was_saved_and_loaded_becomes_the_same_model_again(config, tmp_path):
    model = build(config)
    to_llama(model).save_pretrained(tmp_path)
    again = from_llama(LlamaForCausalLM.from_pretrained(tmp_path))
    assert again.config == (config if config.n_kv_heads else config.model_copy(update={"n_kv_heads": None}))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    with torch.no_grad():
        tokens = some_tokens(config, 2, 20)
        assert torch.equal(again(tokens), model(tokens))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("intermediate_size", 40),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("tie_word_embeddings", True),
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
    ],
)
def test_a_llama_that_our_model_cannot_be_is_refused(name, value):
    fields = {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(**fields | {"intermediate_size": 32, name: value}))
    with pytest.raises(InputError, match="is no model of this kind"):
        from_llama(llama)


def test_llama_generates_what_the_model_finds_likeliest():
    config = ModelConfig(d_model=16, vocab_size=30)
    model, tokens = build(config), some_tokens(config, 1, 5)
    generated = to_llama(model).generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=None)
    for _ in range(8):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, tokens)


def test_the_papers_rotary_variant_does_not_exist_in_llama():
    with pytest.raises(InputError, match="rope = 'paper'"):
        to_llama(Transformer(ModelConfig(d_model=8, rope="paper")))
