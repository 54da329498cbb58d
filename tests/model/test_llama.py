"""The transformer as Hugging Face's Llama."""

import pytest
import torch
from small_models import CONFIGS, build, some_tokens

from lib.base import InputError
from lib.config import ModelConfig
from lib.model.llama import to_llama
from lib.model.transformer import Transformer


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_logits_agree_with_llamas_on_the_same_weights(config):
    model, tokens = build(config), some_tokens(config, 3, 70)
    with torch.no_grad():
        assert torch.allclose(model(tokens), to_llama(model)(tokens).logits, atol=1e-4, rtol=0)


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
