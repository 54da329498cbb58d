"""The request language."""

from time import process_time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.dialogs.request import Request, format_request, parse_request

PROSE = "To answer this question I will make a request to the database:\n"


attributes = st.text(min_size=1).filter(lambda text: len(text.split()) == 1 and text == text.strip())
names = st.text(st.characters(exclude_characters="\n"), min_size=1) | st.sampled_from(
    ["FOR", " FOR ", "FIND a FOR b", "```", "O'Neil; DROP TABLE people", '"', "Zoë Ø", "a\rb", "a\u2028b", "\ud800"]
)
prose = st.text() | st.just(PROSE.rstrip("\n"))


@given(attributes, names, prose)
def test_a_request_is_read_back_from_behind_any_prose(attribute, name, prose):
    block = format_request(attribute, name)
    assert parse_request(block) == Request(attribute, name)
    assert parse_request(f"{prose}\n{block}") == Request(attribute, name)


@given(attributes, names, st.text(min_size=1))
def test_nothing_may_follow_a_request(attribute, name, more):
    assert parse_request(format_request(attribute, name) + more) is None


def test_a_request_looks_like_this():
    assert format_request("occupation", "Ann Lee") == "```sql\nFIND occupation FOR Ann Lee\n```"


@pytest.mark.parametrize("piece", ["x", "\n", "FIND a FOR ", "```sql\n", "1/"])
@pytest.mark.parametrize(
    "frame", ["{}", "```sql\nFIND {} FOR Ann\n```", "```sql\nFIND a FOR {}\n```", "```sql\n{}\n```"]
)
def test_a_turn_of_a_million_characters_takes_no_second(frame, piece):
    """If time grew with the square of the length, it would take hours."""
    turn = frame.format(piece * (1_000_000 // len(piece)))
    start = process_time()
    parse_request(turn)
    assert process_time() - start < 1.0
