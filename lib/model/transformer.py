"""The transformer that all experiments of Section 5 train.

Decoder-only, pre-norm with RMSNorm, rotary positions, grouped-query attention, SwiGLU of width 4 d_model, untied
output, no biases: Llama's architecture, so that `lib.model.llama` can export it.
Shapes: B rows, S positions, D = d_model, H query heads, K key-value heads, E = head_dim, V vocabulary.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.config import ModelConfig

#: cos and sin (..., S, n E) for `rotate`.
Rotary = tuple[Tensor, Tensor]


def rotary_angles(config: ModelConfig, n_positions: int, device=None) -> Tensor:
    """Return by how much each pair turns at each position: (n_positions, E / 2) float64, in radians."""
    pair = torch.arange(config.head_dim // 2, dtype=torch.float64, device=device)
    frequency = config.rope_theta ** (-2 * pair / config.head_dim)
    if config.rope == "paper":
        frequency = 2 * math.pi * frequency
    return torch.arange(n_positions, dtype=torch.float64, device=device)[:, None] * frequency


def rotate(x: Tensor, rotary: Rotary, head_dim: int) -> Tensor:
    """Turn the pairs (k, k + E/2) of every head in x (B, S, n E).

    The tables repeat for every head and may hold more heads than x; sin is negated in the first half of each. Heads lie
    side by side because products over long rows are several times as fast as over rows of one head.
    """
    cos, sin = (table[..., : x.shape[-1]] for table in rotary)  # keys may have fewer heads
    partner = x.unflatten(-1, (-1, head_dim)).roll(head_dim // 2, -1).flatten(-2)
    return x * cos + partner * sin


_linear = partial(nn.Linear, bias=False)


@dataclass
class KVCache:
    """Keys and values of the positions that each row has seen: `lengths` (B,) of `capacity` positions."""

    keys: Tensor  # (L, B, K, capacity, E)
    values: Tensor  # (L, B, K, capacity, E)
    lengths: Tensor  # (B,) int64

    def select(self, rows: Tensor) -> "KVCache":
        """Return the cache of some rows only, for a batch from which finished rows have left."""
        return KVCache(self.keys[:, rows], self.values[:, rows], self.lengths[rows])


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        kv = config.kv_heads * config.head_dim
        self.q_proj = _linear(config.d_model, config.d_model)
        self.k_proj = _linear(config.d_model, kv)
        self.v_proj = _linear(config.d_model, kv)
        self.o_proj = _linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, rotary: Rotary, cached: tuple[Tensor, ...] | None = None, first: int = 0) -> Tensor:
        """Map x (B, S, D) to what the positions from `first` on see: (B, S - first, D).

        `cached`: the layer's keys and values (B, K, T, E), the positions (B, S) where the new ones are written, and
        which of the T are visible (B, 1, S, T).
        """
        B, S, _ = x.shape
        E = self.config.head_dim
        q = rotate(self.q_proj(x[:, first:]), tuple(table[..., first:, :] for table in rotary), E)
        q = q.view(B, S - first, -1, E).transpose(1, 2)  # (B, H, S - first, E)
        k = rotate(self.k_proj(x), rotary, E).view(B, S, -1, E).transpose(1, 2)  # (B, K, S, E)
        v = self.v_proj(x).view(B, S, -1, E).transpose(1, 2)
        visible = torch.ones(S - first, S, dtype=torch.bool, device=x.device).tril(first) if first else None
        if cached is not None:
            keys, values, positions, visible = cached
            row = torch.arange(B, device=x.device)[:, None]
            keys[row, :, positions] = k.transpose(1, 2)
            values[row, :, positions] = v.transpose(1, 2)
            k, v = keys, values
        grouped = self.config.kv_heads != self.config.n_heads
        y = F.scaled_dot_product_attention(q, k, v, visible, is_causal=visible is None, enable_gqa=grouped)
        return self.o_proj(y.transpose(1, 2).reshape(B, S - first, -1))


class SwiGLU(nn.Module):
    """Gated feed-forward block of width 4 D."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = _linear(config.d_model, 4 * config.d_model)
        self.up_proj = _linear(config.d_model, 4 * config.d_model)
        self.down_proj = _linear(4 * config.d_model, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, S, D) to (B, S, D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and feed-forward, each with its norm and residual."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.ffn = SwiGLU(config)

    def forward(self, x: Tensor, rotary: Rotary, cached: tuple[Tensor, ...] | None = None, first: int = 0) -> Tensor:
        """Map x (B, S, D) to (B, S - first, D), see `Attention`."""
        x = x[:, first:] + self.attention(self.attention_norm(x), rotary, cached, first)
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nn.Module):
    """The language model: tokens (B, S) -> logits (B, S, V)."""

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None):
        """Draw the weights from `generator`, except on the meta device.

        Matrices are normal with variance 1 / inputs, or 1 / (2 L inputs) if they write to the residual stream;
        embeddings are standard normal.
        """
        super().__init__()
        self.config = config
        # `nn.Embedding` draws normal weights, and on the meta device that imports torch's compiler: three seconds.
        self.embedding = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.d_model), freeze=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.output = _linear(config.d_model, config.vocab_size)
        self._rotary_table: Rotary | None = None
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and not parameter.is_meta:
                std = 1.0 if name == "embedding.weight" else parameter.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= math.sqrt(2 * config.n_layers)
                nn.init.normal_(parameter, std=std, generator=generator)

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def forward(self, tokens: Tensor, first: int = 0, select: Tensor | None = None) -> Tensor:
        """Return logits (B, S - first, V) of the next token at the positions from `first` on of tokens (B, S).

        The last block computes queries and feed-forward at those positions only. With a mask `select` (B, S - first),
        it returns the logits of its N true positions only: (N, V) in row-major order.
        """
        x = self.embedding(tokens)
        rotary = tuple(table[: tokens.shape[1]] for table in self.rotary(tokens.shape[1], x.dtype))
        for block in self.blocks[:-1]:
            x = block(x, rotary)
        x = self.blocks[-1](x, rotary, first=first)
        return self.output(self.norm(x if select is None else x[select]))

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """Return an empty cache for `batch_size` rows of at most `capacity` tokens."""
        c = self.config
        shape = (c.n_layers, batch_size, c.kv_heads, capacity, c.head_dim)
        keys, values = self.embedding.weight.new_zeros((2, *shape))
        return KVCache(keys, values, torch.zeros(batch_size, dtype=torch.int64, device=self.device))

    @torch.inference_mode()
    def decode(self, tokens: Tensor, cache: KVCache, lengths: Tensor | None = None) -> Tensor:
        """Append tokens (B, S) to the cache and return the logits (B, V) after each row's last one.

        Row b appends its first `lengths[b]` tokens (at least one; all S if None). The rest is padding, for which the
        cache needs room, too; a later call overwrites it. For inference only: no gradients.
        """
        B, S = tokens.shape
        positions = cache.lengths[:, None] + torch.arange(S, device=tokens.device)  # (B, S)
        seen = int(positions.max()) + 1
        visible = (torch.arange(seen, device=tokens.device) <= positions[:, :, None])[:, None]  # (B, 1, S, seen)
        x = self.embedding(tokens)
        rotary = tuple(table[positions] for table in self.rotary(seen, x.dtype))  # (B, S, D)
        for block, keys, values in zip(self.blocks, cache.keys, cache.values, strict=True):
            x = block(x, rotary, (keys[:, :, :seen], values[:, :, :seen], positions, visible))
        last = S - 1 if lengths is None else lengths - 1
        cache.lengths += last + 1
        return self.output(self.norm(x[torch.arange(B, device=x.device), last]))

    def rotary(self, n_positions: int, dtype: torch.dtype) -> Rotary:
        """Return cos and sin (n_positions or more, D) for `rotate`, from a table that grows by doubling."""
        table = self._rotary_table
        if table is None or len(table[0]) < n_positions or (table[0].dtype, table[0].device) != (dtype, self.device):
            with torch.inference_mode(False):  # training cannot use a table made in inference mode
                angles = rotary_angles(self.config, max(256, 2 ** (n_positions - 1).bit_length()), self.device)
                cos, sin = angles.cos(), angles.sin()
                table = tuple(
                    torch.cat(halves, -1).tile(self.config.n_heads).to(dtype) for halves in ((cos, cos), (-sin, sin))
                )
            self._rotary_table = table
        return table
