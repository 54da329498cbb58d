"""Questions of several hops: which facts they take, and how they are put."""

import pytest

from lib.base import InputError
from lib.dialogs.chains import chain_dialog, chain_question, chains
from lib.dialogs.request import Request, parse_request
from lib.dialogs.templates import Role, in_tool_dialog
from lib.facts.people import ATTRIBUTES, People
from lib.facts.sampling import sample_people, with_bosses

PEOPLE = People(["Ann Lee", "Bob Ray", "Cy Ode"], {"boss": ["Cy Ode", "Ann Lee", "Bob Ray"], "height": ["1", "2", "3"]})


def test_a_dialog_of_three_hops_asks_three_times_and_names_the_last_person():
    chain = [("Ann Lee", "boss", "Cy Ode"), ("Cy Ode", "boss", "Bob Ray"), ("Bob Ray", "birth_place", "Peru")]
    asked, *turns, told = chain_dialog(chain)
    assert asked == (Role.USER, "Where was the boss of the boss of Ann Lee born?")
    assert [parse_request(text) for role, text in turns if role == Role.ASSISTANT] == [
        Request("boss", "Ann Lee"),
        Request("boss", "Cy Ode"),
        Request("birth_place", "Bob Ray"),
    ]
    assert [text for role, text in turns if role == Role.DATABASE] == ["Cy Ode", "Bob Ray", "Peru"]
    assert told == (Role.ASSISTANT, "Bob Ray was born in Peru.")


def test_one_hop_is_the_dialog_that_there_was():
    for fact in sample_people(5).facts():
        assert chain_dialog([fact]) == in_tool_dialog(*fact)


def test_attributes_without_a_template_make_chains_too():
    (chain, *_) = chains(PEOPLE, 2)
    assert chain_question(chain) == "What is the height of the boss of Ann Lee?"


@pytest.mark.parametrize("hops", [1, 2, 3, 6])
def test_chains_follow_the_bosses_and_end_with_every_other_attribute(hops):
    people = with_bosses(sample_people(7), seed=3)
    told = {(name, attribute): value for name, attribute, value in people.facts()}
    found = list(chains(people, hops))
    assert [(chain[0][0], chain[-1][1]) for chain in found] == [(name, a) for name in people.names for a in ATTRIBUTES]
    for chain in found:
        assert len(chain) == hops
        assert all(told[name, attribute] == value for name, attribute, value in chain)
        assert all(one[1:] == ("boss", other[0]) for one, other in zip(chain, chain[1:], strict=False))


def test_chains_that_lead_nowhere_are_refused():
    with pytest.raises(InputError, match="^hops = 0: a question takes one look-up or more$"):
        list(chains(PEOPLE, 0))
    for people in (sample_people(3), PEOPLE[:2]):
        with pytest.raises(
            InputError, match="^for a question of 2 hops, the boss of everybody must be among these people$"
        ):
            list(chains(people, 2))
    assert len(list(chains(PEOPLE[:2], 1))) == 2
