"""The transformer set by hand that looks up as often as a question asks for."""

import numpy as np
import pytest
import torch

from lib.agent.tools import SqlTool
from lib.base import InputError
from lib.config import RunConfig
from lib.dialogs.chains import chains
from lib.dialogs.tokenizers import ByteTokenizer
from lib.evaluation import attention_maps
from lib.evaluation.recall import measure_recall
from lib.facts.database import write_database
from lib.facts.people import ATTRIBUTES, People
from lib.facts.sampling import sample_people, with_bosses
from lib.model.chain_circuit import ChainCircuit
from lib.model.circuit import Circuit, made_up_attributes
from lib.training.saved import load_model, save_model


@pytest.fixture(scope="module")
def circuit():
    return ChainCircuit()


@pytest.fixture(scope="module")
def model(circuit):
    return circuit.model()


def recall(model, people: People, hops: int, folder, method="verify", n: int | None = None) -> float:
    """Ask `n` questions, drawn from all; every hop must have been a query that ran."""
    write_database(people, folder / "people.sqlite")
    asked = list(chains(people, hops))
    if n is not None:
        asked = [asked[i] for i in np.random.default_rng(1).choice(len(asked), n, replace=False)]
    with SqlTool(folder / "people.sqlite") as tool:
        measured = measure_recall(model, asked, ByteTokenizer(), tool, method=method)
        assert measured.overall < 1 or tool.n_queries == hops * len(asked)
    return measured.overall


def in_a_circle(names: list[str]) -> People:
    """People of whom each is the boss of the one before, the last one's boss being the first."""
    columns = {a: [f"{a[:2]} é {i}. " for i in range(len(names))] for a in ATTRIBUTES}
    return People(names, {"boss": [*names[1:], names[0]], **columns})


@pytest.mark.parametrize("hops", [1, 2, 3, 4])
def test_it_makes_as_many_look_ups_as_the_question_has_hops(model, tmp_path, hops):
    assert recall(model, with_bosses(sample_people(100)), hops, tmp_path, n=24) == 1.0


def test_it_decodes_three_hops_token_by_token(model, tmp_path):
    assert recall(model, with_bosses(sample_people(100)), 3, tmp_path, "decode", n=4) == 1.0


@pytest.mark.slow
@pytest.mark.timeout(3600)  # minutes on an idle core
def test_it_answers_10_000_of_10_000_questions_of_three_hops_about_a_million_facts(model, tmp_path):
    assert recall(model, with_bosses(sample_people(250_000)), 3, tmp_path, n=10_000) == 1.0


ODD_NAMES = [
    "A", " ", "the boss", "the boss o", "e boss of Ann", "the boss  of X", "THE BOSS OF X", "a" * 60, "李 小龍",
    "😀" * 15, "Anna Anna", "y was born on 1/1/1950.", "FIND boss FOR x", "``", " works as an ", "0'; DROP TABLE p; --",
]  # fmt: skip


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_it_copies_any_name_even_parts_of_the_phrase(model, tmp_path, hops):
    assert recall(model, in_a_circle(ODD_NAMES), hops, tmp_path) == 1.0


def test_a_name_that_holds_the_whole_phrase_is_read_as_a_hop_the_one_limit(model, tmp_path):
    assert recall(model, in_a_circle(["Ann", "Bob the boss of it"]), 1, tmp_path) == 0.5


def test_its_size_depends_neither_on_hops_nor_on_facts_and_the_model_of_one_hop_stays(circuit, model, tmp_path):
    assert circuit.n_params == sum(parameter.numel() for parameter in model.parameters()) == 319_860
    assert (circuit.config.n_layers, circuit.config.d_model) == (5, 60)
    # Questions of eight hops have more than 1,000 tokens, about as many as float32 carries.
    assert recall(model, with_bosses(sample_people(100)), 8, tmp_path, n=3) == 1.0
    one_hop = torch.cat([parameter.flatten() for parameter in Circuit().model().parameters()])
    assert (one_hop.numel(), int((one_hop != 0).sum())) == (66_016, 7_270)


def test_other_attributes_will_do_unless_they_are_the_link(tmp_path):
    attributes = ["ax", "ay", "bx", "by", "height"]
    people = with_bosses(People(["Ann", "Bo", "Cy"], {a: [f"{a}{i}" for i in range(3)] for a in attributes}))
    assert recall(ChainCircuit(attributes).model(), people, 3, tmp_path) == 1.0
    with pytest.raises(InputError, match="^a chain cannot end with 'boss': it would read like a longer one$"):
        ChainCircuit(["birth_place", "boss"])


def test_its_width_grows_with_the_attributes():
    counts = [64, 128, 256]
    widths = [ChainCircuit(made_up_attributes(n)).config.d_model for n in counts]
    assert 0.9 < np.polyfit(np.log(counts), np.log(widths), 1)[0] < 1.05


def test_without_the_heads_that_find_the_phrase_only_one_hop_is_left(circuit, model, tmp_path):
    for name in ("2 letters back", "9 letters back", "last match"):
        broken = attention_maps.without_head(model, *circuit.heads[name])
        assert [recall(broken, with_bosses(sample_people(3)), hops, tmp_path, n=1) for hops in (1, 2)] == [1, 0]


def test_without_the_count_of_turns_it_never_comes_to_the_answer(circuit, model, tmp_path):
    broken = attention_maps.without_head(model, *circuit.heads["turns"])
    assert [recall(broken, with_bosses(sample_people(3)), hops, tmp_path, n=1) for hops in (1, 2)] == [0, 0]


def test_it_is_an_ordinary_model_that_is_saved_and_loaded(circuit, model, tmp_path):
    save_model(model, tmp_path / "model", RunConfig(mode="in-tool", model=circuit.config))
    loaded, _ = load_model(tmp_path / "model", "cpu")
    assert recall(loaded, in_a_circle(["Ann Lee", "Bob"]), 2, tmp_path) == 1.0
