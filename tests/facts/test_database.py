"""The SQLite database of people."""

import sqlite3
from time import process_time

import pytest
from full_disk import full_after

from lib.agent.tools import SqlTool
from lib.base import InputError, WorkError
from lib.facts.database import write_database
from lib.facts.people import ATTRIBUTES, People
from lib.facts.sampling import sample_people


def rows(path, query="SELECT * FROM people"):
    connection = sqlite3.connect(path)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


@pytest.mark.parametrize("n", [1, 20, 47])
def test_the_database_holds_everyone_by_name(tmp_path, n):
    people, path = sample_people(n, seed=1), tmp_path / "people.db"
    write_database(people, path)
    assert sorted(rows(path)) == sorted(zip(people.names, *people.columns.values(), strict=True))
    columns = [(name, kind, key) for _, name, kind, _, _, key in rows(path, "PRAGMA table_info(people)")]
    assert columns == [("name", "TEXT", 1), *((attribute, "TEXT", 0) for attribute in ATTRIBUTES)]
    plan = rows(path, "EXPLAIN QUERY PLAN SELECT occupation FROM people WHERE name = 'Ann Lee'")
    assert "PRIMARY KEY" in plan[0][3]
    assert [file.name for file in tmp_path.iterdir()] == ["people.db"]


def test_a_database_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "people.db"
    write_database(sample_people(5), path)
    before = path.read_bytes()
    twins = People(["Ann", "Ann"], {"pet": ["cat", "dog"]})
    with pytest.raises(InputError, match="cannot write the database"):
        write_database(twins, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["people.db"]


def test_a_database_takes_a_file_name_in_an_existing_folder(tmp_path):
    (tmp_path / "file").touch()
    for path in [tmp_path, tmp_path / "missing" / "people.db", tmp_path / "file" / "people.db"]:
        with pytest.raises(InputError, match="existing folder"):
            write_database(sample_people(1), path)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("n_bytes", [100, 5_000, 30_000])
def test_a_database_that_finds_no_room_is_failed_work_and_blames_no_other_program(tmp_path, n_bytes):
    """As over quota: SQLite calls a disk full only where the system does."""
    told = r"^cannot write the database \S+: (disk I/O error|database or disk is full|File too large)$"
    with full_after(n_bytes), pytest.raises(WorkError, match=told):
        write_database(sample_people(2_000), tmp_path / "people.db")
    assert list(tmp_path.iterdir()) == []


def test_as_many_attributes_as_can_be_written_can_be_read(tmp_path):
    people = People(["Ann Lee"], {f"a{i}": [str(i)] for i in range(1_999)})
    write_database(people, tmp_path / "people.db")
    with SqlTool(tmp_path / "people.db") as tool:
        assert tool.attributes == people.attributes and tool.find("a1998", "Ann Lee").text == "1998"


def test_a_million_people_take_at_most_ten_seconds_at_the_rate_of_a_tenth(tmp_path):
    start = process_time()
    write_database(sample_people(100_000), tmp_path / "people.db")
    assert process_time() - start < 1.0
