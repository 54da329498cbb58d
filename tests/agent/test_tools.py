"""Tools: typed outcomes, and a database that no request can change."""

import os
import signal
import sqlite3
import sys
import tempfile
import threading
from time import monotonic

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.agent.tools import (
    ERROR_TEXTS,
    EditableTool,
    ForgivingTool,
    Outcome,
    SqlTool,
    connect_read_only,
)
from lib.base import InputError
from lib.dialogs.request import format_request, parse_request
from lib.facts import database as database_module
from lib.facts.database import add_people, as_database, change_fact, write_database
from lib.facts.people import VALUES, People
from lib.facts.sampling import sample_people

PEOPLE = sample_people(100, seed=1)


@pytest.fixture
def database(tmp_path):
    write_database(PEOPLE, tmp_path / "people.db")
    return tmp_path / "people.db"


@pytest.mark.parametrize(
    "turn",
    [
        "",
        "Ann Lee works as an actor.",
        "FIND occupation FOR Ann Lee",
        "```sql\n```",
        "```\nFIND occupation FOR Ann Lee\n```",
        "```SQL\nFIND occupation FOR Ann Lee\n```",
        "x```sql\nFIND occupation FOR Ann Lee\n```",
        "```sql\nFIND occupation FOR Ann Lee",
        "```sql\nFIND occupation FOR Ann Lee```",
        "```sql\nFIND occupation FOR Ann Lee\n````",
        "```sql\nFIND occupation FOR\n```",
        "```sql\nFIND occupation FOR \n```",
        "```sql\nFIND FOR Ann Lee\n```",
        "```sql\nFIND birth date FOR Ann Lee\n```",
        "```sql\nfind occupation for Ann Lee\n```",
        "```sql\nSELECT occupation FROM people\n```",
        "```sql\nFIND occupation FOR Ann Lee\nFIND birth_date FOR Ann Lee\n```",
    ],
)
def test_everything_else_is_malformed(database, turn):
    assert parse_request(turn) is None
    with SqlTool(database) as tool:
        assert tool(turn).outcome is Outcome.MALFORMED
        assert tool.n_queries == 0


def ask(tool, attribute, name):
    return tool("To answer this question I will make a request to the database:\n" + format_request(attribute, name))


def test_every_fact_is_answered_by_its_value_alone(database):
    with SqlTool(database) as tool:
        for name, attribute, value in PEOPLE.facts():
            response = ask(tool, attribute, name)
            assert response.ok and response.text == value
        assert tool.n_queries == PEOPLE.n_facts


def test_what_is_not_an_answer_has_an_outcome_and_a_fixed_text_of_its_own(database):
    name = PEOPLE.names[0]
    with SqlTool(database) as tool:
        outcomes = {
            Outcome.NO_MATCH: [
                ask(tool, "occupation", other)
                for other in ["Nobody", name.lower(), name + " ", "%", "' OR 1=1 --", "\ud800", "a\0b", "x" * 2_000_000]
            ],
            Outcome.UNKNOWN_ATTRIBUTE: [
                ask(tool, other, name)
                for other in ["height", "name", "Occupation", "occupation,", '"height"', "*", "rowid", "1"]
            ],
            Outcome.MALFORMED: [tool("hello")],
        }
        assert tool.n_queries == len(outcomes[Outcome.NO_MATCH])
    for outcome, responses in outcomes.items():
        for response in responses:
            assert (response.outcome, response.text, response.ok) == (outcome, ERROR_TEXTS[outcome], False)


def test_no_error_text_can_be_a_value():
    assert len(set(ERROR_TEXTS.values())) == len(ERROR_TEXTS) == len(Outcome) - 1
    assert not set(ERROR_TEXTS.values()) & {value for values in VALUES.values() for value in values}
    # A value, of a CSV file too, is one line.
    assert all("\n" in text for text in ERROR_TEXTS.values())


def test_a_database_without_an_attribute_that_is_needed_is_refused(database):
    with SqlTool(database, ["occupation", "birth_date"]):
        pass
    for unknown in ["height", "name"]:
        with pytest.raises(InputError, match=f"unknown attribute '{unknown}'.*birth_date, birth_place"):
            SqlTool(database, ["occupation", unknown])


def test_names_and_columns_may_hold_what_means_something_in_sql(tmp_path):
    people = People(["Robert'); DROP TABLE people;--", '"', "FOR FOR", "Ægir Þór"], {"order": ["a", "b'", "c", "d"]})
    write_database(people, tmp_path / "people ?#%20.db")
    with SqlTool(tmp_path / "people ?#%20.db") as tool:
        assert [ask(tool, "order", name).text for name in people.names] == people.columns["order"]


def test_a_foreign_database_may_have_odd_columns_and_empty_cells(tmp_path):
    path = made(
        tmp_path / "foreign.db",
        'CREATE TABLE people (id INTEGER, name TEXT, "a""b" TEXT, age INTEGER)',
        "INSERT INTO people VALUES (1, 'Ann', 'x', NULL), (2, 'Bo', 'y', 30)",
    )
    with SqlTool(path) as tool:
        assert tool.attributes == ("id", 'a"b', "age")
        assert [ask(tool, 'a"b', "Ann").text, ask(tool, "age", "Bo").text] == ["x", "30"]
        assert ask(tool, "age", "Ann").outcome is Outcome.NO_MATCH


@pytest.mark.parametrize("written", ["Ren\u00e9 Lee", "Rene\u0301 Lee", "Ren\u00e9\u00a0Lee"])
def test_people_of_a_csv_file_are_found_however_their_name_is_spelled(tmp_path, written):
    (tmp_path / "people.csv").write_text(f"name,city\n{written},Rome\nRene Lee,Oslo\n", encoding="utf-8")
    with as_database(tmp_path / "people.csv") as path, SqlTool(path) as tool:
        for asked in ("Ren\u00e9 Lee", "Rene\u0301 Lee", "Ren\u00e9  Lee", " Ren\u00e9\u00a0Lee "):
            assert tool.find_spelled("city", asked) == (Outcome.ANSWER, "Rome")
        assert tool.find_spelled("city", "Rene Lee") == (Outcome.ANSWER, "Oslo")


def test_a_name_as_it_is_written_comes_before_another_spelling(tmp_path):
    write_database(People(["Ann  Lee", "Ann Lee"], {"city": ["Rome", "Oslo"]}), tmp_path / "people.sqlite")
    with SqlTool(tmp_path / "people.sqlite") as tool:
        assert [tool.find_spelled("city", name).text for name in ("Ann  Lee", "Ann Lee", "Ann   Lee")] == [
            "Rome",
            "Oslo",
            "Oslo",
        ]


def test_find_takes_what_a_line_of_the_request_language_cannot_hold(tmp_path):
    write_database(People(["Ann\nLee"], {"birth place": ["Oslo"]}), tmp_path / "people.db")
    with SqlTool(tmp_path / "people.db") as tool:
        assert ask(tool, "birth place", "Ann\nLee").outcome is Outcome.MALFORMED
        assert tool.find("birth place", "Ann\nLee") == (Outcome.ANSWER, "Oslo")
        assert tool.find("birth", "Ann\nLee").outcome is Outcome.UNKNOWN_ATTRIBUTE


def made(path, *statements):
    """A database that somebody else made."""
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()
    return path


NUMBERS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
ENDLESS = f"CREATE VIEW people AS {NUMBERS} SELECT 'Ann' AS name, i AS age FROM n WHERE i < 0"
PETS = "CREATE TABLE people (name TEXT PRIMARY KEY, pet TEXT)"


def test_a_query_that_takes_too_long_is_a_timeout(tmp_path):
    with SqlTool(made(tmp_path / "slow.db", ENDLESS), time_budget=0.1) as tool:
        start = monotonic()
        response = ask(tool, "age", "Ann")
        assert 0.1 <= monotonic() - start < 30  # a busy machine is slow; an endless query would take days
        assert (response.outcome, response.text) == (Outcome.TIMEOUT, ERROR_TEXTS[Outcome.TIMEOUT])
        assert tool("hello").outcome is Outcome.MALFORMED


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no database"),
        (lambda path: path.mkdir(), "there is no database"),
        (lambda path: path.write_text("not a database, but long enough to have a header" * 20), "is not a database"),
        (lambda path: path.touch(), "no such table: people"),
        (lambda path: made(path, "CREATE TABLE cities (name TEXT)"), "no such table: people"),
        (lambda path: made(path, "CREATE TABLE people (age TEXT)"), "no such column: people.name"),
    ],
)
def test_a_bad_database_is_one_sentence(tmp_path, make, message):
    path = tmp_path / "x.db"
    make(path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=message) as caught:
        SqlTool(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


SLOW = "printf('%.*c', 400000000, 'x')"  # seconds, in one call of a function


@pytest.mark.parametrize(
    "sql",
    [
        [f"CREATE TABLE people (name TEXT, pet TEXT AS ({SLOW}))"],
        ["CREATE TABLE people (name TEXT, pet TEXT AS (name || 's pet') STORED)"],
        [f"CREATE TABLE t (name TEXT, pet TEXT AS ({SLOW}))", "CREATE VIEW people AS SELECT name, pet FROM t"],
    ],
    ids=["virtual", "stored", "under a view"],
)
def test_computed_columns_are_refused(tmp_path, sql):
    path = made(tmp_path / "x.db", *sql, f"INSERT INTO {'t' if len(sql) > 1 else 'people'} (name) VALUES ('Ann')")
    for use in (SqlTool, EditableTool, lambda path: change_fact(path, "Ann", "pet", "eel")):
        with pytest.raises(InputError, match=f"the database {path} computes a column"):
            use(path)


def test_a_view_runs_no_function(tmp_path):
    path = made(tmp_path / "x.db", f"CREATE VIEW people AS SELECT 'Ann' AS name, {SLOW} AS pet")
    with pytest.raises(InputError, match="not authorized to use function: printf"):
        SqlTool(path)


def test_a_locked_database_is_one_sentence(database):
    writer = sqlite3.connect(database, isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    with pytest.raises(InputError, match=f"{database}: database is locked .another program may be writing"):
        SqlTool(database, time_budget=0.1)
    writer.close()
    with SqlTool(database):
        pass


def test_a_database_damaged_later_is_an_error_and_no_answer(tmp_path):
    people = sample_people(20_000)
    write_database(people, tmp_path / "people.db")
    with SqlTool(tmp_path / "people.db") as tool:
        content = bytearray((tmp_path / "people.db").read_bytes())
        content[4096:] = b"\xff" * (len(content) - 4096)
        (tmp_path / "people.db").write_bytes(content)
        with pytest.raises(InputError, match="cannot read people"):
            ask(tool, "occupation", people.names[0])


@pytest.mark.parametrize(
    "sql",
    [
        "ATTACH '{new}' AS other",
        "VACUUM INTO '{new}'",
        "PRAGMA query_only = OFF",
        "PRAGMA journal_mode = WAL",
        "SELECT * FROM pragma_database_list",
        "CREATE TABLE pets (name)",
        "CREATE TEMP TABLE pets (name)",
        "CREATE VIRTUAL TABLE pets USING fts5(name)",
        "INSERT INTO people (name) VALUES ('Ann')",
        "UPDATE people SET occupation = 'actor'",
        "DELETE FROM people",
        "ALTER TABLE people ADD COLUMN height",
        "ANALYZE",
        "BEGIN EXCLUSIVE",
        "DETACH main",
        "SELECT load_extension('{new}')",
        "SELECT writefile('{new}', 'x')",
        "SELECT randomblob(1000000000)",
    ],
)
def test_only_reading_is_allowed(database, sql):
    before = database.read_bytes()
    connection = connect_read_only(database)
    with pytest.raises(sqlite3.Error, match="not authorized|no such function|within a transaction"):
        connection.execute(sql.format(new=database.parent / "new.db")).fetchall()
    assert connection.execute("SELECT occupation FROM people WHERE name = ?", PEOPLE.names[:1]).fetchall() == [
        (PEOPLE.value(0, "occupation"),)
    ]
    connection.close()
    assert database.read_bytes() == before
    assert list(database.parent.iterdir()) == [database]


def test_a_query_cannot_fill_the_memory_with_one_value(database):
    connection = connect_read_only(database)
    with pytest.raises(sqlite3.DataError, match="too big"):
        connection.execute(
            "WITH RECURSIVE t(s) AS (SELECT name FROM people UNION ALL SELECT s || s FROM t) SELECT s FROM t"
        ).fetchall()
    connection.close()


def test_an_unknown_column_in_quotes_is_not_answered_by_its_own_name(database):
    connection = connect_read_only(database)
    with pytest.raises(sqlite3.OperationalError, match="no such column"):
        connection.execute('SELECT people."height" FROM people')
    connection.close()
    with SqlTool(database) as tool:
        for attribute in ["height", '"height"', "[height]", "'height'"]:
            assert ask(tool, attribute, PEOPLE.names[0]).outcome is Outcome.UNKNOWN_ATTRIBUTE


def test_the_database_stands_still_while_it_is_read(database):
    tool = SqlTool(database)
    writer = sqlite3.connect(database, timeout=0.05)
    with pytest.raises(sqlite3.OperationalError, match="locked"), writer:
        writer.execute("UPDATE people SET occupation = 'actor'")
    writer.close()
    others = []
    thread = threading.Thread(target=lambda: others.append(ask_once(database)))
    thread.start()
    thread.join()
    assert others == [PEOPLE.value(0, "occupation")]
    write_database(PEOPLE[:1], database)
    with tool:
        assert ask(tool, "occupation", PEOPLE.names[1]).text == PEOPLE.value(1, "occupation")


def ask_once(database):
    with SqlTool(database) as tool:
        return ask(tool, "occupation", PEOPLE.names[0]).text


# ---- Databases that others made


def outcome(path, attribute="pet", name="Ann"):
    """What a tool says, or why it says nothing."""
    try:
        with SqlTool(path, time_budget=0.1) as tool:
            return ask(tool, attribute, name)
    except InputError as error:
        return str(error)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("CAST(x'636166e9' AS TEXT)", "Could not decode to UTF-8"),
        ("x'00ff'", Outcome.NO_MATCH),
        ("zeroblob(50000000)", Outcome.NO_MATCH),
        ("hex(zeroblob(1000000))", Outcome.NO_MATCH),
        ("NULL", Outcome.NO_MATCH),
        ("-5", "-5"),
        ("1e400", "inf"),
        ("'a' || char(0) || 'b'", "a\0b"),
    ],
)
def test_any_value_of_a_cell_has_a_typed_outcome(tmp_path, value, expected):
    path = made(tmp_path / "x.db", "CREATE TABLE people (name, pet)", f"INSERT INTO people VALUES ('Ann', {value})")
    said = outcome(path)
    if isinstance(expected, Outcome):
        assert said.outcome is expected
    else:
        assert expected == said.text if not isinstance(said, str) else expected in said


@pytest.mark.parametrize(
    "sql",
    [
        [
            f"CREATE TABLE people (name, pet, {', '.join(f'a{i}' for i in range(1998))})",
            "INSERT INTO people (name, pet) VALUES ('Ann', 'cat')",
        ],
        ["CREATE TABLE people (Name TEXT, pet TEXT)", "INSERT INTO people VALUES ('Ann', 'cat')"],
        ["PRAGMA encoding = 'UTF-16'", PETS, "INSERT INTO people VALUES ('Ann', 'cat')"],
        [
            "CREATE TABLE t (n, p)",
            "INSERT INTO t VALUES ('Ann', 'c')",
            "CREATE VIEW people AS SELECT n name, p pet FROM t",
        ],
        [
            "CREATE TABLE people (name, pet)",
            "INSERT INTO people VALUES ('Ann', 'c'), ('Ann', 'd'), (NULL, 'e'), (5, x'00')",
        ],
        ["CREATE VIRTUAL TABLE people USING fts5(name, pet)", "INSERT INTO people VALUES ('Ann', 'cat')"],
        ["PRAGMA journal_mode = WAL", PETS, "INSERT INTO people VALUES ('Ann', 'cat')"],
    ],
    ids=["2,000 columns", "Name", "UTF-16", "view", "twice, unnamed", "virtual", "WAL"],
)
def test_a_copy_answers_as_the_database_does_and_can_be_changed(tmp_path, sql):
    path = made(tmp_path / "x.db", *sql)
    said = outcome(path)
    try:
        with EditableTool(path) as tool:
            assert ask(tool, "pet", "Ann") == said and said.ok and tool.facts("Ann")["pet"] == said.text
            assert tool.change("Ann", "pet", "eel") == said.text and ask(tool, "pet", "Ann").text == "eel"
            tool.add(People(["Ann", "Bo"], {attribute: ["1", "2"] for attribute in tool.attributes}))
            assert [ask(tool, "pet", name).text for name in ("Ann", "Bo")] == ["1", "2"]
    except InputError as error:
        assert str(error) == said


TRIGGERS = [
    f"CREATE TRIGGER a AFTER INSERT ON people BEGIN SELECT count(*) FROM ({NUMBERS} SELECT i FROM n); END",
    f"CREATE TRIGGER b AFTER UPDATE ON people BEGIN SELECT count(*) FROM ({NUMBERS} SELECT i FROM n); END",
    'CREATE TRIGGER "" BEFORE UPDATE ON people BEGIN DELETE FROM people; END',
    "CREATE TRIGGER d BEFORE INSERT ON people BEGIN DELETE FROM people; END",
]


@pytest.mark.parametrize("trigger", TRIGGERS)
def test_a_trigger_runs_neither_in_a_copy_nor_in_the_database(tmp_path, trigger):
    path = made(tmp_path / "x.db", PETS, "INSERT INTO people VALUES ('Ann', 'cat')", trigger)
    start = monotonic()
    with EditableTool(path) as tool:
        tool.add(People(["Bo"], {"pet": ["dog"]}))
        assert tool.change("Ann", "pet", "eel") == "cat"
        assert [tool.facts(name) for name in ("Ann", "Bo")] == [{"pet": "eel"}, {"pet": "dog"}]
    refused = 0
    for change in (lambda: change_fact(path, "Ann", "pet", "eel"), lambda: add_people(PEOPLE_WITH_PETS, path)):
        before = path.read_bytes()
        try:
            change()
        except InputError as error:
            assert "without triggers" in str(error) and path.read_bytes() == before
            refused += 1
    assert refused == 1 and monotonic() - start < 10


PEOPLE_WITH_PETS = People(["Cy"], {"pet": ["fox"]})


def test_an_endless_view_cannot_be_changed_or_copied_for_long(tmp_path, monkeypatch):
    path = made(tmp_path / "x.db", ENDLESS.replace("age", "pet"))
    for change in (lambda: change_fact(path, "Ann", "pet", "eel"), lambda: add_people(PEOPLE_WITH_PETS, path)):
        with pytest.raises(InputError, match="only a plain table"):
            change()
    monkeypatch.setattr(database_module, "WHOLE_TABLE", 0.1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(InputError, match="cannot copy the database .*it took too long"):
        EditableTool(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("where", ["WHERE i < 0", ""], ids=["no row", "rows without end"])
@pytest.mark.parametrize("use", [EditableTool, lambda path: ask(SqlTool(path, time_budget=30), "pet", "Bo")])
def test_ctrl_c_ends_a_query_and_all_that_asked_for_it(tmp_path, use, where):
    path = made(tmp_path / "x.db", f"CREATE VIEW people AS {NUMBERS} SELECT i || '' AS name, i AS pet FROM n {where}")
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    start = monotonic()
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            use(path)
    finally:
        timer.cancel()
    assert monotonic() - start < 20


def test_a_query_from_another_thread_or_to_a_closed_tool_is_one_sentence(database):
    with SqlTool(database) as tool:
        said = []
        thread = threading.Thread(target=lambda: said.append(outcome_of(tool)))
        thread.start()
        thread.join()
    assert "cannot read people from the database" in said[0] and "thread" in said[0]
    assert "closed database" in outcome_of(tool)


def outcome_of(tool):
    with pytest.raises(InputError) as caught:
        ask(tool, "occupation", PEOPLE.names[0])
    return str(caught.value)


def test_a_file_that_refuses_what_sqlite_needs_beside_it_is_told_with_the_cure(database):
    database.with_name("people.db-journal").mkdir()
    for use in (SqlTool, EditableTool, lambda path: change_fact(path, "Ann", "occupation", "actor")):
        with pytest.raises(InputError, match="refuses locks and new files: copy it to a local folder"):
            use(database)


def test_pipes_and_devices_are_no_databases(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", "a\0b", "\ud800"):
        for use in (SqlTool, EditableTool, lambda path: change_fact(path, "Ann", "pet", "cat")):
            with pytest.raises(InputError, match="there is no database"):
                use(path)


# ---- A tool that forgives wrong letters


def distance(a: str, b: str) -> int:
    """How many letters to insert, delete or replace, by the textbook's table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, before = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(row[j - 1] + 1, before[j] + 1, before[j - 1] + (x != y)))
    return row[-1]


@given(
    names=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=6, unique=True),
    asked=st.text("abc", min_size=1, max_size=4),
    edits=st.integers(0, 3),
)
def test_a_forgiving_tool_answers_for_the_one_nearest_name(names, asked, edits):
    with tempfile.TemporaryDirectory() as folder:
        write_database(People(names, {"city": [f"of {name}" for name in names]}), f"{folder}/people.db")
        with SqlTool(f"{folder}/people.db") as tool:
            response = ForgivingTool(tool, edits)(format_request("city", asked))
    near = sorted((distance(asked, name), name) for name in names)
    best = [name for far, name in near if far == near[0][0]]
    if near[0][0] <= edits and len(best) == 1:
        assert response == (Outcome.ANSWER, f"of {best[0]}")
    else:
        assert response.outcome is Outcome.NO_MATCH


def test_a_forgiving_tool_forgives_nothing_but_names(database):
    with SqlTool(database) as tool:
        forgiving = ForgivingTool(tool, 3)
        assert forgiving("hello").outcome is Outcome.MALFORMED
        assert forgiving(format_request("birthplace", PEOPLE.names[0])).outcome is Outcome.UNKNOWN_ATTRIBUTE
        assert forgiving(format_request("birth_place", PEOPLE.names[0])).ok


@pytest.mark.parametrize("value", ["5", "5.5", "x'416e'"])
def test_a_forgiving_tool_passes_over_names_that_are_no_text(tmp_path, value):
    rows = f"({value}, 'cat'), ('Anna', 'dog')"
    path = made(tmp_path / "x.db", "CREATE TABLE people (name, pet)", f"INSERT INTO people VALUES {rows}")
    with SqlTool(path) as tool:
        assert ForgivingTool(tool, 1)(format_request("pet", "Ann")) == (Outcome.ANSWER, "dog")


def test_what_a_forgiving_tool_cannot_do_is_one_sentence(tmp_path, database, monkeypatch):
    path = made(tmp_path / "x.db", PETS, "INSERT INTO people VALUES (CAST(x'ff' AS TEXT), 'cat')")
    with SqlTool(path) as tool, pytest.raises(InputError, match="cannot read people from the database .*UTF-8"):
        ForgivingTool(tool, 1)
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    with SqlTool(database) as tool, pytest.raises(InputError, match=r"rapidfuzz: pip install -e '\.\[serve\]'"):
        ForgivingTool(tool, 1)
