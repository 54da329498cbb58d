"""Facts as turns."""

import pytest

from lib.base import InputError
from lib.dialogs.request import Request, parse_request
from lib.dialogs.templates import answer, biography, dialogs, in_tool_dialog, in_weight_dialog, question, tool_call
from lib.facts.people import ATTRIBUTES, People
from lib.facts.sampling import sample_people

TEXTS = {
    "birth_date": ("1/2/1953", "When was Ann Lee born?", "Ann Lee was born on 1/2/1953."),
    "birth_place": ("Peru", "Where was Ann Lee born?", "Ann Lee was born in Peru."),
    "occupation": ("actor", "What is Ann Lee's occupation?", "Ann Lee works as an actor."),
    "current_address": ("Rome", "Where does Ann Lee live?", "Ann Lee lives at Rome."),
}


def test_there_is_a_text_for_every_attribute():
    assert set(TEXTS) == set(ATTRIBUTES)


@pytest.mark.parametrize("attribute", TEXTS)
def test_an_in_weight_dialog_is_question_and_answer(attribute):
    value, asked, told = TEXTS[attribute]
    assert in_weight_dialog("Ann Lee", attribute, value) == [("user", asked), ("assistant", told)]


@pytest.mark.parametrize("attribute", TEXTS)
def test_an_in_tool_dialog_asks_the_database_and_repeats_what_it_says(attribute):
    value, asked, told = TEXTS[attribute]
    request = (
        f"To answer this question I will make a request to the database:\n```sql\nFIND {attribute} FOR Ann Lee\n```"
    )
    assert in_tool_dialog("Ann Lee", attribute, value) == [
        ("user", asked),
        ("assistant", request),
        ("database", value),
        ("assistant", told),
    ]


def test_the_attributes_of_a_csv_have_words_of_their_own():
    assert question("Ann Lee", "favorite_color") == "What is the favorite color of Ann Lee?"
    assert answer("Ann Lee", "favorite_color", "blue") == "The favorite color of Ann Lee is blue."
    assert parse_request(tool_call("Ann Lee", "favorite_color")) == Request("favorite_color", "Ann Lee")


def test_a_biography_tells_everything_in_one_turn():
    values = {attribute: value for attribute, (value, _, _) in TEXTS.items()}
    assert biography("Ann Lee", values) == [
        (
            "assistant",
            "Ann Lee was born on 1/2/1953. Ann Lee was born in Peru. Ann Lee works as an actor. Ann Lee lives at Rome.",
        )
    ]


@pytest.mark.parametrize("name", ["{value}", "{0} {name!r}", "Zoë {{x}}", 'O\'Neil "Bo"', "100% {", "\\n"])
def test_braces_and_quotes_in_names_and_values_stay_what_they_are(name):
    assert question(name, "birth_place") == "Where was " + name + " born?"
    assert answer(name, "birth_place", "{name}" + name) == name + " was born in {name}" + name + "."
    assert answer("Ann", name, name) == "The " + name.replace("_", " ") + " of Ann is " + name + "."
    assert tool_call(name, "birth_place").endswith("\nFIND birth_place FOR " + name + "\n```")


def test_people_become_dialogs_person_by_person():
    people = People(["A", "B"], {"birth_place": ["Peru", "Chad"], "height": ["1 m", "2 m"]})
    facts = [("A", "birth_place", "Peru"), ("A", "height", "1 m"), ("B", "birth_place", "Chad"), ("B", "height", "2 m")]
    assert list(dialogs(people, "in-weight")) == [in_weight_dialog(*fact) for fact in facts]
    assert list(dialogs(people, "in-tool")) == [in_tool_dialog(*fact) for fact in facts]
    assert list(dialogs(people, "biography")) == [
        [("assistant", "A was born in Peru. The height of A is 1 m.")],
        [("assistant", "B was born in Chad. The height of B is 2 m.")],
    ]


def test_an_unknown_mode_is_refused():
    with pytest.raises(InputError, match="unknown mode 'in_weight' .* in-weight, in-tool, biography"):
        list(dialogs(sample_people(1), "in_weight"))
