"""The transformer set by hand: it looks up any fact of anybody, and each head does what its name says."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lib.agent.generation import generate
from lib.agent.tools import Outcome, Response, SqlTool
from lib.base import InputError
from lib.config import RunConfig
from lib.dialogs.request import parse_request
from lib.dialogs.templates import TEMPLATES, Template, in_tool_dialog
from lib.dialogs.tokenizers import ByteTokenizer
from lib.dialogs.tokens import encode_dialog
from lib.evaluation import attention_maps
from lib.evaluation.recall import measure_recall
from lib.facts.database import write_database
from lib.facts.people import ATTRIBUTES, People
from lib.facts.sampling import sample_people
from lib.model.circuit import Circuit, made_up_attributes, telling_places
from lib.model.llama import to_llama
from lib.model.transformer import Transformer
from lib.training.saved import load_model, save_model

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def circuit():
    return Circuit()


@pytest.fixture(scope="module")
def model(circuit):
    return circuit.model()


def people_called(names: list[str], attributes=ATTRIBUTES, values=("Oslo", "x", "1/1/1950", "é 李. ")) -> People:
    columns = {a: [f"{values[(i + k) % len(values)]}{i}" for i in range(len(names))] for k, a in enumerate(attributes)}
    return People(names, columns)


def recall(model: Transformer, people: People, path, method="verify") -> float:
    write_database(people, path)
    with SqlTool(path) as tool:
        asked = measure_recall(model, list(people.facts()), TOKENIZER, tool, method=method)
        assert tool.n_queries == people.n_facts
    return asked.overall


ODD_NAMES = [
    "A", " ", "the", "Anna Anna", "Anna Annanna", "a" * 60, "Zoë Müller", "李 小龍", "é" * 60, "😀" * 30, "x\u2028y",
    "X's occupation?", "When was A born?", "y was born on 1/1/1950.", "z live?", "FIND occupation FOR x", "```",
    "FOR FOR", " works as an ", "0'; DROP TABLE people; --",
]  # fmt: skip


@pytest.mark.parametrize("method", ["verify", "decode"])
def test_it_recalls_everything_about_people_of_any_name(model, tmp_path, method):
    names = ODD_NAMES if method == "verify" else ODD_NAMES[::3]
    assert recall(model, people_called(names), tmp_path / "people.sqlite", method) == 1.0


one_line = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=60)


@settings(max_examples=25)
@given(names=st.lists(one_line, min_size=1, max_size=3, unique=True), values=st.lists(one_line, min_size=1, max_size=3))
def test_it_recalls_any_value_of_any_name(model, tmp_path_factory, names, values):
    people = people_called(names, values=values)
    assert recall(model, people, tmp_path_factory.mktemp("any") / "people.sqlite") == 1.0


@pytest.mark.slow
def test_it_recalls_questions_about_a_million_facts(model, tmp_path):
    people = sample_people(250_000)
    write_database(people, tmp_path / "people.sqlite")
    drawn = np.random.default_rng(1).choice(people.n_facts, 500, replace=False)
    facts = [(people.names[i], a, people.value(i, a)) for i, a in ((i // 4, ATTRIBUTES[i % 4]) for i in drawn.tolist())]
    with SqlTool(tmp_path / "people.sqlite") as tool:
        assert measure_recall(model, facts, TOKENIZER, tool).overall == 1.0
        assert tool.n_queries == 500


def test_it_says_what_the_tool_says_and_nothing_that_is_in_its_weights(model):
    prompt = [256, *b"What is Nobody Atall's occupation?", 257]
    (generation,) = generate(
        model, [prompt], TOKENIZER, lambda turn: Response(Outcome.ANSWER, f"what {parse_request(turn).name} is")
    )
    assert generation.tokens[-1] == ByteTokenizer().end
    assert generation.turns(TOKENIZER)[-1].text == "Nobody Atall works as an what Nobody Atall is."


@settings(max_examples=8)
@given(st.lists(st.from_regex(r"[a-z][a-z0-9_]{0,9}", fullmatch=True), min_size=1, max_size=6, unique=True))
def test_any_attributes_whose_questions_can_be_told_apart_will_do(tmp_path_factory, attributes):
    try:
        circuit = Circuit(attributes)
    except InputError:
        assume(False)
    people = people_called(["Ann", "The Of"], attributes)
    assert recall(circuit.model(), people, tmp_path_factory.mktemp("any") / "people.sqlite") == 1.0


def test_more_heads_read_the_question_where_one_letter_does_not_tell(tmp_path):
    attributes = ["ax", "ay", "bx", "by", "city", "height"]
    circuit = Circuit(attributes)
    assert len(circuit.places) > 1
    assert recall(circuit.model(), people_called(ODD_NAMES[:6], attributes), tmp_path / "people.sqlite") == 1.0


def test_the_probabilities_of_what_it_says_are_as_good_as_1(model, tmp_path):
    facts = list(sample_people(3).facts())
    data = [encode_dialog(in_tool_dialog(*fact), TOKENIZER) for fact in facts]
    for tokens, trained in data:
        probabilities = model(torch.tensor([tokens]))[0].softmax(-1)
        said = probabilities[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])][torch.tensor(trained[1:])]
        assert said.min() > 0.9999


def test_it_is_an_ordinary_model_that_is_saved_and_loaded(circuit, model, tmp_path):
    assert circuit.n_params == sum(parameter.numel() for parameter in model.parameters()) == 66_016
    assert circuit.config.n_layers == 3 and circuit.config.d_model == 32
    save_model(model, tmp_path / "model", RunConfig(mode="in-tool", model=circuit.config))
    loaded, config = load_model(tmp_path / "model", "cpu")
    assert config.model == circuit.config
    assert recall(loaded, people_called(["Ann Lee"]), tmp_path / "people.sqlite") == 1.0


def test_hugging_face_computes_the_same_with_these_weights(model):
    tokens = attention_maps.dialog_tokens(("Zoë Müller", "occupation", "actor"))
    with torch.no_grad():
        torch.testing.assert_close(to_llama(model)(tokens).logits, model(tokens))


def test_its_width_grows_with_the_attributes_and_its_parameters_with_their_square():
    counts = [64, 128, 256, 512]
    configs = [Circuit(made_up_attributes(n)).config for n in counts]
    width, n_params = (
        np.polyfit(np.log(counts), np.log(y), 1)[0]
        for y in ([c.d_model for c in configs], [c.n_params for c in configs])
    )
    assert 0.9 < width < 1.05
    assert 1.8 < n_params < 2.05
    assert {config.n_layers for config in configs} == {3}


def test_made_up_attributes_are_distinct_and_nested():
    assert len(set(made_up_attributes(300))) == 300
    assert made_up_attributes(300)[:7] == made_up_attributes(7)


@given(st.lists(st.binary(min_size=1, max_size=6), min_size=1, max_size=8, unique=True))
def test_telling_places_tell_any_two_texts_apart_unless_one_begins_with_the_other(texts):
    texts = [text.hex().encode() for text in texts]
    if any(a != b and b.startswith(a) for a in texts for b in texts):
        with pytest.raises(InputError, match="begins like"):
            telling_places(texts)
    else:
        places = telling_places(texts)
        for i, a in enumerate(texts):
            for b in texts[:i]:
                assert any(place < min(len(a), len(b)) and a[place] != b[place] for place in places)


def test_attributes_that_it_cannot_serve_are_refused(monkeypatch):
    with pytest.raises(InputError, match=r"'What is the hobby of '\.\.\. begins like 'What is '\.\.\."):
        Circuit(["occupation", "hobby"])
    with pytest.raises(InputError, match="^there are no attributes: give at least one$"):
        Circuit([])
    monkeypatch.setitem(TEMPLATES, "twin", Template("Are {name} and {name} twins?", "{name}: {value}."))
    with pytest.raises(InputError, match="the templates of 'twin' must hold the name once"):
        Circuit(["twin"])


ANSWER = {"name told", "words", "value told"}


#: Of what is said, what breaks without a head.
BREAKS = {
    "count": set(attention_maps.SAID),
    "letter 7 of the question": set(attention_maps.SAID) - {"preamble"},
    "first assistant token": set(attention_maps.SAID),
    "last assistant token": ANSWER,
    "database token": ANSWER,
    "name into the request": {"name asked"},
    "name into the answer": {"name told"},
    "value into the answer": {"value told"},
}


@pytest.fixture(scope="module")
def facts():
    return [*sample_people(4).facts(), ("李 小龍", "occupation", "spy"), ("Bo Bo", "current_address", "Rome")]


def test_every_head_is_accounted_for(circuit):
    assert list(circuit.heads) == list(BREAKS)


@pytest.mark.parametrize("head", BREAKS)
def test_without_a_head_just_what_it_is_for_breaks(circuit, model, facts, head):
    share = attention_maps.accuracy_by_part(attention_maps.without_head(model, *circuit.heads[head]), facts)
    assert {part for part in attention_maps.SAID if share[part] < 0.1} == BREAKS[head]
    assert all(share[part] == 1 for part in set(attention_maps.SAID) - BREAKS[head] - {"preamble"})


def test_nothing_is_broken_and_a_head_that_writes_nothing_is_not_missed(circuit, model, facts):
    spare = circuit.config.n_layers - 1, circuit.config.n_heads - 1
    assert spare not in circuit.heads.values()
    for each in (model, attention_maps.without_head(model, *spare)):
        assert set(attention_maps.accuracy_by_part(each, facts).values()) == {1.0}
