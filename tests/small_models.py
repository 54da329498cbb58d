"""Small transformers and tokens for tests of the model."""

import torch

from lib.config import ModelConfig
from lib.model.transformer import Transformer

CONFIGS = [
    ModelConfig(d_model=32),
    ModelConfig(d_model=4, n_layers=1, vocab_size=7),
    ModelConfig(d_model=48, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=100, rope_theta=500_000.0),
    ModelConfig(d_model=32, n_heads=4, n_kv_heads=1, norm_eps=1e-2),
]


def build(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model in which every parameter matters: norms are not all ones."""
    model = Transformer(config, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return model


def some_tokens(config: ModelConfig, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
