"""Attention maps against the kernel, and of the circuit whose heads are known."""

import numpy as np
import pytest
import torch

from lib.config import ModelConfig
from lib.evaluation import attention_maps
from lib.facts.people import ATTRIBUTES
from lib.facts.sampling import sample_people
from lib.figures import attention as figures
from lib.model.circuit import Circuit
from lib.model.transformer import Transformer


@pytest.fixture(scope="module")
def circuit():
    return Circuit()


@pytest.fixture(scope="module")
def model(circuit):
    return circuit.model()


@pytest.fixture(scope="module")
def facts():
    return [*sample_people(4).facts(), ("李 小龍", "occupation", "spy"), ("Bo Bo", "current_address", "Rome")]


def test_attention_weights_are_those_that_the_model_uses():
    config = ModelConfig(d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, rope="paper")
    model = Transformer(config, torch.Generator().manual_seed(0)).eval()
    tokens = torch.randint(260, (3, 17), generator=torch.Generator().manual_seed(1))
    weights = attention_maps.attention_weights(model, tokens)
    assert weights.shape == (2, 3, 4, 17, 17)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 4, 17))
    assert not weights.triu(1).any()
    x = model.embedding(tokens)
    rotary = tuple(table[:17] for table in model.rotary(17, x.dtype))
    with torch.no_grad():
        for block, mine in zip(model.blocks, weights, strict=True):
            values = block.attention.v_proj(block.attention_norm(x)).view(3, 17, 2, 6).transpose(1, 2)
            seen = mine @ values.repeat_interleave(2, dim=1)
            expected = block.attention(block.attention_norm(x), rotary)  # by PyTorch's kernel
            torch.testing.assert_close(block.attention.o_proj(seen.transpose(1, 2).flatten(2)), expected)
            x = block(x, rotary)


@pytest.mark.parametrize("attribute", [*ATTRIBUTES, "shoe_size"])
def test_spans_cut_a_dialog_where_its_parts_are(attribute):
    fact = ("Zoë 李", attribute, "Düsseldorf")
    tokens = attention_maps.dialog_tokens(fact)[0].tolist()
    spans = attention_maps.spans(fact)
    assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])] and spans[-1].stop == len(tokens)
    texts = {span.part: bytes(t for t in tokens[span.start : span.stop] if t < 256).decode() for span in spans}
    assert texts["name"] == texts["name asked"] == texts["name told"] == "Zoë 李"
    assert texts["value"] == texts["value told"] == "Düsseldorf"
    assert texts["attribute"] == f"{attribute} FOR " and texts["preamble"].endswith("FIND ")
    assert texts["close"] == "\n```" and tokens[spans[7].stop - 1] == 258
    assert texts["words"] == "." and texts["assistant"] == ""


def test_the_heads_that_copy_attend_to_the_byte_that_is_next_and_the_others_do_not(circuit, model, facts):
    table = attention_maps.copying(model, facts)
    mass = table.groupby(["copy", "block", "head"]).mass.mean()
    for copy, head in {"name asked": "name into the request", "name told": "name into the answer"}.items():
        assert mass[(copy, *circuit.heads[head])] == pytest.approx(1)
    assert mass["value told", 2, 2] == pytest.approx(1)
    assert table.right.all() and (mass > 0.5).sum() == 3


def test_a_head_that_attends_to_all_alike_gives_what_is_called_uniform(facts):
    model = Transformer(ModelConfig(d_model=8), torch.Generator().manual_seed(0)).eval()
    for block in model.blocks:
        torch.nn.init.zeros_(block.attention.q_proj.weight)
    table = attention_maps.copying(model, facts)
    assert table.mass.to_numpy() == pytest.approx(table.uniform.to_numpy())
    names = table[(table["copy"] == "name asked") & (table.block == 0) & (table["head"] == 0)]
    assert len(names) == sum(len(name.encode()) for name, *_ in facts)
    first = names.head(len(facts[0][0]))
    words = [len(word) for word in facts[0][0].split()]
    assert first.letter.tolist() == [i for length in (words[0] + 1, words[1]) for i in range(length)]


def test_figures_show_what_the_tables_and_the_weights_say(circuit, model, facts):
    shown = figures.copying_maps({"by hand": (model, *circuit.heads["name into the request"])}, facts[0])
    image = shown.axes[0].get_images()[0].get_array()
    np.testing.assert_allclose(image, np.eye(len(facts[0][0])), atol=1e-6)
    maps = figures.attention_maps(model, facts[0], circuit.heads)
    assert len([axes for axes in maps.axes if axes.get_images()]) == 8
    table = attention_maps.copying(model, facts).query("copy == 'name asked' and block == 2 and head == 0")
    letters = figures.copying_by_letter({"by hand": table})
    assert all(np.allclose(line.get_ydata(), 1) for axes in letters.axes for line in axes.get_lines())
