"""The transformer against other implementations of the same formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import CONFIGS, build, some_tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lib.config import ModelConfig
from lib.model.transformer import Transformer, rotary_angles, rotate


@st.composite
def configs(draw):
    n_kv_heads = draw(st.integers(1, 3))
    n_heads = n_kv_heads * draw(st.integers(1, 3))
    return ModelConfig(
        d_model=n_heads * 2 * draw(st.integers(1, 4)),
        n_layers=draw(st.integers(1, 3)),
        n_heads=n_heads,
        n_kv_heads=draw(st.sampled_from([n_kv_heads, None])),
        vocab_size=draw(st.integers(2, 50)),
        rope=draw(st.sampled_from(["standard", "paper"])),
    )


@given(configs())
def test_the_closed_form_counts_the_parameters(config):
    assert config.n_params == sum(parameter.numel() for parameter in Transformer(config).parameters())


def test_the_seed_alone_decides_the_initialization():
    def weights(seed):
        model = Transformer(ModelConfig(), torch.Generator().manual_seed(seed))
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    first = weights(1)
    torch.rand(1)
    assert torch.equal(first, weights(1))
    assert not torch.equal(first, weights(2))


def test_the_initialization_has_the_variances_it_promises():
    model = Transformer(ModelConfig(d_model=128, n_layers=3), torch.Generator().manual_seed(0))
    std = {name: float(p.data.std()) for name, p in model.named_parameters() if p.dim() == 2}
    for name, measured in std.items():
        fan_in = {"embedding.weight": 1}.get(name, 512 if "down_proj" in name else 128)
        residual = math.sqrt(2 * 3) if "o_proj" in name or "down_proj" in name else 1
        assert measured == pytest.approx(fan_in**-0.5 / residual, rel=0.03), name


def _loop_logits(model: Transformer, tokens: list[int]) -> torch.Tensor:
    """Logits after the last of `tokens`, one position and one head at a time, pairs turned as complex numbers."""
    config, w = model.config, {name: p.double() for name, p in model.named_parameters()}
    E, group = config.head_dim, config.n_heads // config.kv_heads

    def norm(x, weight):
        return x / torch.sqrt(x.square().mean() + config.norm_eps) * weight

    def turn(vector, t):
        turns = 2 * math.pi if config.rope == "paper" else 1
        angles = torch.tensor([turns * t * config.rope_theta ** (-2 * k / E) for k in range(E // 2)])
        z = torch.complex(vector[: E // 2], vector[E // 2 :]) * torch.exp(1j * angles.double())
        return torch.cat([z.real, z.imag])

    xs = [w["embedding.weight"][token] for token in tokens]
    for i in range(config.n_layers):
        b = {name.removeprefix(f"blocks.{i}."): p for name, p in w.items() if name.startswith(f"blocks.{i}.")}
        hs = [norm(x, b["attention_norm.weight"]) for x in xs]
        q, k, v = ([(b[f"attention.{n}_proj.weight"] @ h).split(E) for h in hs] for n in "qkv")
        for t in range(len(xs)):
            heads = []
            for head in range(config.n_heads):
                query = turn(q[t][head], t)
                scores = torch.stack([query @ turn(k[s][head // group], s) for s in range(t + 1)]) / math.sqrt(E)
                heads.append(sum(p * v[s][head // group] for s, p in enumerate(scores.softmax(0))))
            xs[t] = xs[t] + b["attention.o_proj.weight"] @ torch.cat(heads)
            h = norm(xs[t], b["ffn_norm.weight"])
            gate = F.silu(b["ffn.gate_proj.weight"] @ h)
            xs[t] = xs[t] + b["ffn.down_proj.weight"] @ (gate * (b["ffn.up_proj.weight"] @ h))
    return w["output.weight"] @ norm(xs[-1], w["norm.weight"])


@pytest.mark.parametrize("rope", ["standard", "paper"])
def test_logits_agree_with_loops_over_heads_and_positions(rope):
    config = ModelConfig(d_model=24, n_heads=4, n_kv_heads=2, vocab_size=20, rope=rope)
    model, tokens = build(config), some_tokens(config, 1, 9)
    with torch.no_grad():
        assert torch.allclose(model(tokens)[0, -1].double(), _loop_logits(model, tokens[0].tolist()), atol=1e-5)


def _counted_flops(config: ModelConfig, seq_len: int, select=None) -> int:
    model, counter = Transformer(config), FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(some_tokens(config, 1, seq_len), select=select)
    return counter.get_total_flops()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("seq_len", [1, 17])
def test_the_closed_form_counts_the_flops(config, seq_len):
    # The counter sees two products with full S x S matrices; the closed form counts the causal triangle alone.
    above_diagonal = seq_len * (seq_len - 1) // 2
    hidden = config.n_layers * 2 * (2 * config.d_model * above_diagonal)
    assert config.forward_flops(seq_len) + hidden == _counted_flops(config, seq_len)


def test_logits_that_are_not_asked_for_cost_nothing():
    config, select = ModelConfig(), torch.zeros(1, 17, dtype=torch.bool)
    select[0, [3, 16]] = True
    saved = _counted_flops(config, 17) - _counted_flops(config, 17, select)
    assert config.forward_flops(17) - config.forward_flops(17, n_logits=2) == saved


@settings(max_examples=20)
@given(configs(), st.integers(0, 9))
def test_a_position_depends_on_what_came_before_and_on_nothing_after(config, position):
    model, tokens = build(config), some_tokens(config, 1, 10)
    other = tokens.clone()
    other[0, position] = (other[0, position] + 1) % config.vocab_size
    with torch.no_grad():
        change = (model(tokens) - model(other)).abs().amax(-1)[0]
    assert (change[:position] == 0).all()
    assert (change[position:] > 0).any()


@settings(max_examples=20)
@given(configs(), st.data())
def test_selected_logits_are_those_of_all_positions(config, data):
    model, tokens = build(config), some_tokens(config, 3, 6)
    flags = data.draw(st.lists(st.booleans(), min_size=18, max_size=18))
    select = torch.tensor(flags).view(3, 6)
    with torch.no_grad():
        assert torch.allclose(model(tokens, select=select), model(tokens)[select], atol=1e-6)


def test_standard_rotary_scores_depend_on_the_distance_alone():
    config = ModelConfig(d_model=64, n_heads=2)
    angles = rotary_angles(config, 300)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
    q, k = torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores = rotate(q.expand(300, 32), (cos, sin), 32) @ rotate(k.expand(300, 32), (cos, sin), 32).T
    for distance in (0, 1, 17, 200):
        diagonal = scores.diagonal(-distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-10)
    assert abs(scores[0, 0] - scores[1, 0]) > 1e-3
    assert scores[5, 5] == pytest.approx(float(q @ k))
    assert not torch.allclose(scores, scores.T)  # it knows which comes first


def test_the_papers_rotary_leaves_the_first_pair_without_position():
    turned = {}
    for rope in ("standard", "paper"):
        angles = rotary_angles(ModelConfig(d_model=16, rope=rope), 200)
        pairs = torch.ones(200, 8, dtype=torch.float64)
        table = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
        turned[rope] = rotate(pairs, table, 8)
    assert torch.allclose(turned["paper"][:, [0, 4]], torch.ones(200, 2, dtype=torch.float64), atol=1e-9)
    assert all((turned["paper"][1:, [k, k + 4]] - 1).abs().amax() > 0.5 for k in (1, 2))
    assert (turned["standard"][1:, [0, 4]] - 1).abs().amin(0).max() > 1e-3


def test_a_model_whose_heads_have_one_pair_knows_position_in_standard_rotary_only():
    # Head dimension 2: the paper's variant leaves a bag of words, so swapping earlier tokens changes nothing.
    swapped = {}
    for rope in ("standard", "paper"):
        config = ModelConfig(d_model=4, n_layers=1, rope=rope)
        model, tokens = build(config), torch.tensor([[1, 2, 3, 4, 5]])
        with torch.no_grad():
            swapped[rope] = (model(tokens) - model(tokens[:, [3, 1, 0, 2, 4]]))[0, -1].abs().max()
    assert swapped["paper"] < 1e-5 < 1e-3 < swapped["standard"]


def test_positions_go_on_beyond_any_table():
    config = ModelConfig(d_model=8)
    model, tokens = build(config), some_tokens(config, 1, 700)
    with torch.no_grad():
        short = model(tokens[:, :10])
        assert torch.allclose(model(tokens)[:, :10], short, atol=1e-6)
        assert torch.allclose(build(config)(tokens), model(tokens), atol=1e-6)


def _full(model: Transformer, row: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([row]))[0, -1]


@settings(max_examples=30)
@given(configs(), st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=4), st.data())
def test_cached_decoding_agrees_with_the_full_pass_for_rows_of_any_lengths(config, chunks, data):
    # chunks[b][i]: how many tokens row b appends in call i; a row that has no more leaves the batch.
    model, generator = build(config), torch.Generator().manual_seed(3)
    cache, alive = model.new_cache(len(chunks), 40), list(range(len(chunks)))
    rows = [[] for _ in chunks]
    for call in range(max(map(len, chunks))):
        keep = [i for i, b in enumerate(alive) if len(chunks[b]) > call]
        cache, alive = cache.select(torch.tensor(keep)), [alive[i] for i in keep]
        lengths = torch.tensor([chunks[b][call] for b in alive])
        padding = data.draw(st.integers(0, 2))
        tokens = torch.randint(config.vocab_size, (len(alive), int(lengths.max()) + padding), generator=generator)
        for b, new, length in zip(alive, tokens.tolist(), lengths.tolist(), strict=True):
            rows[b] += new[:length]
        logits = model.decode(tokens, cache, lengths)
        assert cache.lengths.tolist() == [len(rows[b]) for b in alive]
        for b, row_logits in zip(alive, logits, strict=True):
            assert torch.allclose(row_logits, _full(model, rows[b]), atol=1e-4)


def test_selected_rows_keep_a_cache_of_their_own():
    config = ModelConfig(d_model=16)
    model, tokens = build(config), some_tokens(config, 3, 5)
    cache = model.new_cache(3, 6)
    model.decode(tokens, cache)
    part = cache.select(torch.tensor([2, 0]))
    assert part.lengths.tolist() == [5, 5]
    logits = model.decode(torch.tensor([[7], [8]]), part)
    for row_logits, row in zip(logits, ([*tokens[2].tolist(), 7], [*tokens[0].tolist(), 8]), strict=True):
        assert torch.allclose(row_logits, _full(model, row), atol=1e-5)
    assert cache.lengths.tolist() == [5, 5, 5]
    assert cache.keys[..., 5, :].abs().max() == 0


def test_decoding_first_leaves_nothing_that_training_trips_over():
    config = ModelConfig(d_model=16)
    model, tokens = build(config), some_tokens(config, 2, 8)
    cache = model.new_cache(2, 8)
    assert not model.decode(tokens, cache).requires_grad
    model(tokens).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert torch.allclose(model.decode(tokens, model.new_cache(2, 8)), model(tokens)[:, -1], atol=1e-5)


@pytest.mark.parametrize("shape", [{}, {"n_layers": 1}, {"n_layers": 3, "n_heads": 4, "n_kv_heads": 2}])
@pytest.mark.parametrize("first", [0, 1, 7, 19])
def test_logits_from_a_position_on_are_those_of_the_whole_pass(shape, first):
    model = Transformer(ModelConfig(d_model=16, **shape), torch.Generator().manual_seed(0)).double()
    tokens = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(1))
    whole = model(tokens)
    torch.testing.assert_close(model(tokens, first), whole[:, first:], rtol=0, atol=1e-12)
    select = torch.rand(3, 20 - first, generator=torch.Generator().manual_seed(2)) < 0.5
    torch.testing.assert_close(model(tokens, first, select), whole[:, first:][select], rtol=0, atol=1e-12)
