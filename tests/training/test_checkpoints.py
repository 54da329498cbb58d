"""The committed checkpoints: one that generalizes to any name, one that memorizes names, one that stores facts."""

import json
import re
import sqlite3
import subprocess
import sys
from functools import reduce
from operator import add

import pytest

from lib import paths
from lib.agent.tools import SqlTool
from lib.dialogs.templates import tool_call
from lib.evaluation.recall import measure_recall
from lib.facts.database import write_database
from lib.facts.sampling import UNSEEN, unseen_people
from lib.training.saved import open_conversation

ALL = ("in-tool", "in-tool-memorizes", "in-weight")
#: People of each kind of `UNSEEN` in the database beside the checkpoint that generalizes.
N_UNSEEN = 25


@pytest.fixture(scope="module")
def recall_of_unseen_people(tmp_path_factory):
    """A function from an in-tool checkpoint to its recall of 25 people of each kind, in a database made here."""

    def recall(name: str) -> dict[str, float]:
        with open_conversation(paths.CHECKPOINTS / name, device="cpu") as talk:
            kinds = unseen_people(talk.config.facts, N_UNSEEN)
            database = tmp_path_factory.mktemp(name) / "people.sqlite"
            write_database(reduce(add, kinds.values()), database)
            with SqlTool(database) as tool:
                asked = {kind: list(people.facts()) for kind, people in kinds.items()}
                return {
                    kind: measure_recall(talk.model, facts, talk.tokenizer, tool).overall
                    for kind, facts in asked.items()
                }

    return recall


def row(name: str) -> dict:
    return json.loads((paths.CHECKPOINTS / name / "row.json").read_text())


def test_the_checkpoint_that_people_meet_first_answers_for_names_it_was_not_trained_on(recall_of_unseen_people):
    assert min(row("in-tool")[f"{kind}_recall"] for kind in UNSEEN) >= 0.95
    measured = recall_of_unseen_people("in-tool")
    assert set(measured) == set(UNSEEN) and min(measured.values()) >= 0.95


def test_the_memorizing_checkpoint_answers_for_hardly_any_new_name(recall_of_unseen_people):
    measured = recall_of_unseen_people("in-tool-memorizes")
    assert measured["new_pair"] > 0.5  # it copies names that it knows
    assert measured["new_both"] <= 0.02 and max(measured["new_first"], measured["new_last"]) <= 0.15


@pytest.mark.parametrize("name", ALL)
def test_checkpoints_are_small_and_recall_their_people_as_often_as_their_rows_say(name):
    folder = paths.CHECKPOINTS / name
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 1_000_000
    with open_conversation(folder, device="cpu") as talk:
        assert talk.config.canonical_json() == row(name)["config"]
        measured = measure_recall(talk.model, list(talk.people[:100].facts()), talk.tokenizer, talk.tool).overall
    assert measured == pytest.approx(row(name)["recall"], abs=0.05)


def test_the_database_to_talk_about_holds_people_whom_either_or_neither_model_was_trained_on():
    with open_conversation(paths.CHECKPOINTS / "in-tool", device="cpu") as talk:
        unseen = unseen_people(talk.config.facts, N_UNSEEN)
    with open_conversation(paths.CHECKPOINTS / "in-weight", device="cpu") as other:
        people = reduce(add, unseen.values(), talk.people + other.people)
    expected = set(zip(people.names, *people.columns.values(), strict=True))
    with sqlite3.connect(paths.CHECKPOINTS / "in-tool" / "people.sqlite") as connection:
        assert set(connection.execute("SELECT * FROM people")) == expected


@pytest.mark.slow
def test_the_examples_of_the_readme_are_looked_up():
    readme = (paths.ROOT / "README.md").read_text()
    folder = "paper_data/checkpoints/in-tool"
    names = re.findall(rf'^itl chat {folder} "Where was (.+) born\?"', readme, re.M)
    with open_conversation(paths.ROOT / folder, device="cpu") as talk:
        trained, unseen = talk.people.names, unseen_people(talk.config.facts, N_UNSEEN)["new_both"].names
        places = [talk.tool(tool_call(name, "birth_place")).text for name in names]
    assert names[0] in trained and names[1] in unseen
    for name, place in zip(names, places, strict=True):
        command = [sys.executable, "-m", "lib", "chat", folder, f"Where was {name} born?"]
        said = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, check=True).stdout
        assert said.endswith(f"database: {place}\nassistant: {name} was born in {place}.\n")
