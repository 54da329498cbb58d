"""Talking to models side by side, and changing what one of them looks up."""

import asyncio
import io
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import paths
from lib.agent.tools import EditableTool, Outcome
from lib.base import InputError
from lib.cli import terminal
from lib.cli.options import Terminal
from lib.dialogs.templates import Role, Turn, question, tool_call
from lib.facts.database import add_people, change_fact, write_database
from lib.facts.people import FactsConfig, People
from lib.facts.sampling import load_people, sample_people, unseen_people
from lib.notebook import chat
from lib.training.saved import open_conversation

IN_WEIGHT, IN_TOOL = paths.CHECKPOINTS / "in-weight", paths.CHECKPOINTS / "in-tool"
DATABASE = IN_TOOL / "people.sqlite"
#: Neither model was trained on these people, nor on their first and last names.
UNSEEN = unseen_people(FactsConfig(), 2)["new_both"]

line = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20).filter(str.strip)
names = line | st.sampled_from(["Ann'; DROP TABLE people; --", 'Bob" OR ""="', "?", "%", "Ann", "ann"])


def table(path: Path) -> dict[str, tuple]:
    with sqlite3.connect(path) as connection:
        return {name: values for name, *values in connection.execute("SELECT * FROM people")}


@pytest.fixture
def database(tmp_path) -> Path:
    write_database(sample_people(4), tmp_path / "people.sqlite")
    return tmp_path / "people.sqlite"


# ---- Changing facts


@settings(max_examples=40)
@given(st.data(), st.lists(names, min_size=1, max_size=4, unique=True), st.sets(st.sampled_from("abcd"), min_size=1))
def test_a_change_changes_one_fact_whatever_the_words(tmp_path_factory, data, who, what):
    path = tmp_path_factory.mktemp("facts") / "x.sqlite"
    attributes = [f'{letter}"; --' for letter in sorted(what)]
    people = People(who, {attribute: [data.draw(line) for _ in who] for attribute in attributes})
    write_database_with_odd_columns(people, path)
    person, attribute = data.draw(st.sampled_from(who)), data.draw(st.sampled_from(attributes))
    value = data.draw(line.filter(lambda text: "```" not in text and "\x7f" not in text))

    assert change_fact(path, person, attribute, value) == people.value(who.index(person), attribute)
    people.columns[attribute][who.index(person)] = value
    assert table(path) == {name: [people.value(i, a) for a in attributes] for i, name in enumerate(who)}


def write_database_with_odd_columns(people: People, path: Path) -> None:
    """As `write_database`, which takes the column names of a CSV file, but with any."""
    quoted = ['"{}"'.format(attribute.replace('"', '""')) for attribute in people.attributes]
    with sqlite3.connect(path) as connection:
        connection.execute(f"CREATE TABLE people (name TEXT PRIMARY KEY, {', '.join(quoted)})")
        rows = list(zip(people.names, *people.columns.values(), strict=True))
        connection.executemany(f"INSERT INTO people VALUES ({', '.join('?' * len(rows[0]))})", rows)


KNOWN = sample_people(4).names[0]


@pytest.mark.parametrize(
    "name, attribute, value, message",
    [
        ("Nobody Atall", "birth_place", "Kenya", "nobody is called 'Nobody Atall' in the database"),
        (KNOWN, "shoe_size", "43", "unknown attribute 'shoe_size': there are birth_date, birth_place, "),
        (KNOWN, "name", "Ann", "unknown attribute 'name'"),
        (KNOWN, 'birth_place" = "x" --', "Kenya", "unknown attribute"),
        (KNOWN, "birth_place", " ", "' ' cannot be a value"),
        (KNOWN, "birth_place", "a\nb", "one line of text without ``` is expected"),
        (KNOWN, "birth_place", "a```b", "one line of text without ``` is expected"),
        (KNOWN, "birth_place", "\ud800", "cannot change the database"),
        ("\ud800", "birth_place", "Kenya", "cannot change the database"),
    ],
)
def test_what_cannot_be_changed_is_told_in_one_sentence(database, name, attribute, value, message):
    before = database.read_bytes()
    with pytest.raises(InputError) as caught:
        change_fact(database, name, attribute, value)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert database.read_bytes() == before


def test_a_database_that_is_not_there_is_not_made(tmp_path):
    for change in (lambda p: change_fact(p, "a", "b", "c"), lambda p: add_people(UNSEEN, p)):
        with pytest.raises(InputError, match="there is no database .*none.sqlite"):
            change(tmp_path / "none.sqlite")
    assert list(tmp_path.iterdir()) == []


def test_people_are_added_all_or_none(database):
    before = table(database)
    moved = People([KNOWN, "Ann Lee"], {a: ["here", "there"] for a in sample_people(1).attributes})
    add_people(moved, database)
    assert table(database) == {**before, KNOWN: ["here"] * 4, "Ann Lee": ["there"] * 4}

    before = database.read_bytes()
    with pytest.raises(InputError, match="cannot change the database"):
        add_people(People(["Cy"], {"birth_place": ["Kenya"]}), database)
    assert database.read_bytes() == before


def test_an_editable_tool_leaves_the_database_alone_and_nothing_behind(database):
    before = database.read_bytes()
    with EditableTool(database) as tool:
        tool.add(UNSEEN)
        assert tool.change(KNOWN, "birth_place", "Kenya") == table(database)[KNOWN][1]
        assert tool(tool_call(KNOWN, "birth_place")).text == "Kenya"
        assert tool.facts(UNSEEN.names[1]) == {a: UNSEEN.value(1, a) for a in UNSEEN.attributes}
        assert tool.facts("Nobody Atall") == {}
        assert tool("hello").outcome is Outcome.MALFORMED
        folder = tool.path.parent
        assert folder.is_dir() and folder != database.parent
    assert not folder.exists() and database.read_bytes() == before


@pytest.mark.parametrize("stored", ["Zoe\u0301 Ek", "Zo\u00e9\xa0Ek", "Zo\u00e9 Ek", "Zo\u00e9  Ek"])
def test_a_name_is_found_whatever_its_blanks_and_accents_are_made_of(tmp_path, stored):
    write_database(People([stored, "Bo"], {"pet": ["cat", "dog"]}), tmp_path / "x.sqlite")
    with EditableTool(tmp_path / "x.sqlite") as tool:
        for typed in ("Zo\u00e9 Ek", "Zoe\u0301 Ek", "Zo\u00e9\xa0 Ek", stored):
            assert tool.facts(typed) == {"pet": "cat"}
        assert tool.change("Zo\u00e9 Ek", "pet", "eel") == "cat"
        assert tool(tool_call(stored, "pet")).text == "eel" and tool.facts("Zoe Ek") == {}


# ---- How it looks


@pytest.mark.parametrize(
    "turn, expected",
    [
        (Turn(Role.USER, "Who?"), "question"),
        (Turn(Role.ASSISTANT, tool_call("Ann Lee", "birth_place")), "tool call"),
        (Turn(Role.DATABASE, "Japan"), "database"),
        (Turn(Role.ASSISTANT, "Ann Lee was born in Japan."), "reply"),
    ],
)
def test_a_turn_is_called_what_it_is(turn, expected):
    assert chat.label(turn) == expected


@given(st.lists(st.tuples(st.sampled_from(list(Role)), line).map(lambda pair: Turn(*pair)), max_size=4))
def test_a_transcript_holds_every_word_and_its_label_and_no_markup_of_its_own(turns):
    page = BeautifulSoup(chat.transcript(turns), "html.parser")
    assert [span.text for span in page("span")] == [turn.text for turn in turns]
    assert [label.text for label in page("b")] == [chat.label(turn) for turn in turns]
    assert {tag.name for tag in page.find_all(True)} <= {"div", "b", "span"}


def test_labels_can_be_read_on_their_colors_and_told_apart():
    def luminance(color: str) -> float:  # WCAG 2.2
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert all(1.05 / (luminance(color) + 0.05) >= 4.5 for color in chat.COLORS.values())
    assert len(set(chat.COLORS.values())) == len(chat.COLORS)


# ---- What a model is asked


@pytest.mark.parametrize(
    ("text", "message"),
    [("Who is \ud800?", "half a character"), ("x" * 100_000, "the question has 100,002 tokens: at most 8,192")],
)
def test_half_a_character_and_a_question_whose_attention_would_not_fit_into_memory_are_refused(text, message):
    with open_conversation(IN_WEIGHT, device="cpu") as talk, pytest.raises(InputError, match=message):
        talk.turns(text)


# ---- Two models side by side


@pytest.fixture
def talk() -> Iterator[chat.Chat]:
    talk = chat.Chat(IN_WEIGHT, IN_TOOL, UNSEEN)
    yield talk
    talk.close()


def test_about_somebody_unseen_the_in_tool_model_asks_and_the_in_weight_model_invents(talk):
    name, attribute, value = list(UNSEEN.facts())[1]
    told = talk.ask(question(name, attribute))
    turns = [turn.text for turn in told["in-tool"]]
    assert turns == [question(name, attribute), tool_call(name, attribute), value, f"{name} was born in {value}."]
    assert len(told["in-weight"]) == 2 and name not in told["in-weight"][1].text


def test_a_changed_fact_changes_the_answer_of_the_in_tool_model_alone(talk):
    before = DATABASE.read_bytes()
    name = sample_people(1).names[0]  # whom the in-weight model was trained on, and the in-tool model was not
    asked = question(name, "birth_place")
    first = talk.ask(asked)
    assert first["in-weight"][-1] == first["in-tool"][-1] == Turn(Role.ASSISTANT, f"{name} was born in Japan.")
    assert talk.change(name, "birth_place", "Kenya") == "Japan"
    second = talk.ask(asked)
    assert second["in-weight"] == first["in-weight"]
    assert [turn.text for turn in second["in-tool"][2:]] == ["Kenya", f"{name} was born in Kenya."]
    page = BeautifulSoup(talk.html(), "html.parser").text
    assert f"changed: birth_place of {name}, Japan → Kenya" in page and page.count("tool call") == 2
    assert DATABASE.read_bytes() == before


def test_models_of_the_wrong_kind_are_refused():
    with pytest.raises(InputError, match="is in-tool: one that is in-weight is expected"):
        chat.Chat(IN_TOOL, IN_TOOL, UNSEEN)
    with pytest.raises(InputError, match="is in-weight: one that is in-tool is expected"):
        chat.Chat(IN_WEIGHT, IN_WEIGHT, UNSEEN)


def fields(window) -> dict:
    """The widgets of a chat window by what is written on or beside them."""
    return {field.description: field for row in window.children for field in getattr(row, "children", [])}


def test_the_window_asks_changes_and_complains(talk):
    window = talk.widget()
    log, *_, told = window.children
    named = fields(window)
    assert "Nothing was asked yet" in log.value
    assert named["who"].options == (*UNSEEN.names, *sample_people(3).names)

    named["who"].value, named["fact"].value = UNSEEN.names[1], "birth_place"
    old = UNSEEN.columns["birth_place"][1]
    assert named["question"].value == question(UNSEEN.names[1], "birth_place")
    assert named["new value"].placeholder == f"now: {old}" and old in named["new value"].options
    named["Ask both"].click()
    named["new value"].value = " India "
    named["Change the database"].click()
    assert named["new value"].placeholder == "now: India" and named["new value"].value == ""
    named["Ask both"].click()
    labels = [label.text for label in BeautifulSoup(log.value, "html.parser")("b") if label.text in chat.COLORS]
    assert labels.count("question") == 2 and labels.index("database") < len(labels)
    assert f"changed: birth_place of {UNSEEN.names[1]}, {old} → India" in log.value
    assert f"{UNSEEN.names[1]} was born in India." in log.value

    before = talk.html()
    named["Change the database"].click()  # to nothing
    assert "cannot be a value" in told.value and talk.html() == before


def test_the_enter_key_asks_once_whether_or_not_the_text_is_new(talk):
    field = fields(talk.widget())["question"]

    async def press(text: str) -> None:
        field._handle_custom_msg({"event": "submit"}, [])  # as the browser sends it: the key, then the text
        field.value = text
        await asyncio.sleep(2 * chat.ENTER_SECONDS)

    for text in ("Who?", "Who?", "Where?"):
        asyncio.run(press(text))
    field.value = "left without Enter"
    log = BeautifulSoup(talk.html(), "html.parser").select("[role=log] > div")
    asked = [entry.span.text for entry in log if entry.b.text == "question"]
    assert asked == ["Who?", "Who?", "Where?"]


# ---- In a terminal


def converse(*lines: str, runs=(IN_TOOL, IN_WEIGHT), database=None) -> str:
    """What is printed while these lines are typed."""
    said = io.StringIO()
    console, left = Terminal(file=said, markup=False, highlight=False, soft_wrap=True), iter(lines)
    with ExitStack() as stack:
        talks = [stack.enter_context(open_conversation(run, database, "cpu", editable=True)) for run in runs]
        terminal.converse(console, talks, lambda: next(left, ""))
    return said.getvalue()


def test_a_terminal_tells_the_same_story():
    before = DATABASE.read_bytes()
    asked = question(KNOWN, "birth_place")
    said = converse(asked, f"/set {KNOWN} | birth_place | Kenya", asked, f"/who {KNOWN}")
    first, second = said.split(f"birth_place of {KNOWN}: Japan -> Kenya\n")
    reply = f"assistant: {tool_call(KNOWN, 'birth_place')}\ndatabase: {{0}}\nassistant: {KNOWN} was born in {{0}}.\n"
    stale = f"-- in-weight\nassistant: {KNOWN} was born in Japan.\n"
    assert first.endswith(f"-- in-tool\n{reply.format('Japan')}{stale}")
    assert second.startswith(f"-- in-tool\n{reply.format('Kenya')}{stale}")
    assert "birth_place: Kenya\n" in second
    assert DATABASE.read_bytes() == before


def test_people_of_new_names_are_in_the_database_that_a_terminal_asks():
    with open_conversation(IN_TOOL, device="cpu") as talk:
        trained = load_people(talk.config.facts).names
    names = converse("/who").splitlines()[1:]
    assert names[:3] == trained[:3] and len(names) == 6
    assert not {part for name in names[3:] for part in name.split()} & {part for n in trained for part in n.split()}
    unseen = names[-1]
    told = converse(f"/who {unseen}", question(unseen, "birth_place"), runs=[IN_TOOL])
    place = told.split("birth_place: ")[1].splitlines()[0]
    assert told.endswith(f"database: {place}\nassistant: {unseen} was born in {place}.\n")


def test_a_wrong_command_is_told_and_the_conversation_goes_on():
    wrong = ["/sat", "/set a | b", "/set", "/help me", "/set Nobody Atall | birth_place | Kenya", "/who Nobody Atall"]
    said = converse(*wrong, "/help", runs=[IN_TOOL]).splitlines()[1:]
    assert said[:4] == [f"{line!r} is not a command: /help lists them" for line in wrong[:4]]
    assert said[4].startswith("nobody is called 'Nobody Atall'") and said[5] == "nobody of that name"
    assert "\n".join(said[6:]) == terminal.HELP
    assert "asks no database" in converse(f"/set {KNOWN} | birth_place | Kenya", runs=[IN_WEIGHT])


def test_values_may_hold_the_bars_that_a_command_has(tmp_path):
    write_database(People(["Ann"], {"pet": ["cat"], "city": ["Oslo"]}), tmp_path / "bars.db")
    lines = ["/set Ann | pet | x | y", "/who Ann", "/set Ann | age | 3"]
    said = converse(*lines, runs=[IN_TOOL], database=tmp_path / "bars.db").splitlines()[1:]
    assert said[:3] == ["pet of Ann: cat -> x | y", "pet: x | y", "city: Oslo"]
    assert said[3].startswith("unknown attribute 'age'")


def test_what_one_of_two_databases_refuses_is_changed_in_neither():
    """The first model's database has somebody whom the second's lacks."""
    runs = [paths.CHECKPOINTS / "in-tool-memorizes", IN_TOOL]
    first, second = (table(run / "people.sqlite") for run in runs)
    name = next(iter(first.keys() - second.keys()))
    said = converse(f"/set {name} | birth_place | Atlantis", f"/who {name}", runs=runs)
    assert f"nobody is called {name!r}" in said and f"birth_place: {first[name][1]}\n" in said
    both = converse(f"/set {KNOWN} | birth_place | Kenya", question(KNOWN, "birth_place"), runs=runs)
    assert both.count("database: Kenya\n") == 2


@pytest.mark.slow
def test_a_piped_conversation_works_as_a_program_of_its_own():
    command = [sys.executable, "-m", "lib", "chat", str(IN_WEIGHT), "--beside", str(IN_TOOL)]
    said = subprocess.run(command, cwd=paths.ROOT, input="/who\nWho?\n", capture_output=True, text=True, check=True)
    assert said.stderr == "" and "An empty line ends the conversation" in said.stdout
    assert said.stdout.count("-- in-") == 2 and "\x1b" not in said.stdout
