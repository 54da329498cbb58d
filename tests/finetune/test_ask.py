"""Recall of chat models behind a server: what counts as right, the kinds of failures, and a real server."""

import asyncio
import copy
import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import chat_models
import pytest
from chat_server import Scripted, calls, says
from mcp import Client

from lib.agent.server import people_server
from lib.agent.tools import SqlTool
from lib.base import InputError, WorkError
from lib.dialogs.templates import question, tool_call
from lib.facts.csv import write_people_csv
from lib.facts.database import change_fact, write_database
from lib.facts.people import ATTRIBUTES, People
from lib.facts.sampling import sample_people
from lib.figures.ask import recall_by_phrasing as recall_figure
from lib.finetune.ask import (
    PAPER,
    PHRASINGS,
    PeopleTask,
    PersonQuestion,
    Verdict,
    ask_people,
    contains,
    recall_by_phrasing,
    sample_questions,
)
from lib.finetune.endpoint import PROTOCOLS, EndpointConfig
from lib.finetune.models import base_source, fetch

PEOPLE = sample_people(3)
ADA = PEOPLE.names[0]
VALUES = {(name, attribute): value for name, attribute, value in PEOPLE.facts()}
BIRTH = PersonQuestion(ADA, "birth_place", VALUES[ADA, "birth_place"], PAPER)


@pytest.fixture
def database(tmp_path) -> Path:
    write_database(PEOPLE, tmp_path / "people.sqlite")
    return tmp_path / "people.sqlite"


@pytest.fixture
def tool(database) -> Iterator[SqlTool]:
    with SqlTool(database) as opened:
        yield opened


def find(attribute: str = "birth_place", name: str = ADA) -> tuple[str, str]:
    return "find", json.dumps({"attribute": attribute, "name": name})


def ask(server: Scripted, tool: SqlTool, out: Path, questions=(BIRTH,), **settings) -> list[dict]:
    url = f"http://127.0.0.1:{server.server_port}/v1"
    endpoint = EndpointConfig(**{"base_url": url, "model": "m", "retries": 0} | settings)
    return asyncio.run(ask_people(questions, endpoint, tool, out))


def in_turns(server, *turns: tuple[int, object]) -> Scripted:
    """A server that gives these answers one after the other, whatever it is asked."""
    started = server(lambda request, n: turns[min(len(started.requests), len(turns)) - 1])
    return started


# ---- What counts


GOOD = says(f"It is {BIRTH.value}.")
OTHER = next(value for (_, attribute), value in VALUES.items() if attribute == "birth_place" and value != BIRTH.value)


@pytest.mark.parametrize(
    "turns, outcome",
    [
        ([calls(find()), GOOD], "right"),
        ([calls(find("birthplace")), calls(find()), GOOD], "right"),
        ([calls(find()), calls(find("occupation")), GOOD], "right"),
        ([GOOD], "no call"),  # it may know, but it did not look
        ([calls(find("occupation")), GOOD], "wrong attribute"),
        ([calls(find("birthplace")), GOOD], "wrong attribute"),
        ([calls(find(name=PEOPLE.names[1])), GOOD], "wrong name"),
        ([calls(find(name=ADA.upper())), GOOD], "wrong name"),
        ([calls(find(name=f" {ADA.replace(' ', '  ')} ")), GOOD], "right"),  # as the tool finds her
        ([calls(find(), find(name="Nobody")), says("I cannot say")], "answer ignored"),
        ([calls(("find", "{")), GOOD], "malformed call"),
        ([calls(("find", json.dumps({"attribute": "birth_place"}))), GOOD], "malformed call"),
        ([calls(find(name="x" * 1_001)), GOOD], "malformed call"),
        ([calls(("search", find()[1])), GOOD], "malformed call"),
        ([says(f'<tool_call>{{"name": "find", "arguments": {find()[1]}}}</tool_call>')], "malformed call"),
        ([calls(find()), says(f"It is {OTHER}.")], "answer ignored"),
        ([calls(find())], "answer ignored"),  # for ever
    ],
    ids=str,
)
def test_each_way_to_fail_has_a_name(server, tool, tmp_path, turns, outcome):
    play = in_turns(server, *turns)
    for _ in range(2):  # when asked, and when read from the file
        (record,) = ask(play, tool, tmp_path / "r.jsonl")
        n_requests = len(play.requests)
        assert (record["outcome"], record["correct"], record["error"]) == (outcome, outcome == "right", None)
    assert n_requests == record["n_turns"]
    assert record == json.loads((tmp_path / "r.jsonl").read_text())
    assert {key: record[key] for key in BIRTH._fields} == BIRTH._asdict() and record["question"] == BIRTH.text


def test_a_failing_server_is_no_failure_of_the_model(server, tool, tmp_path):
    questions = [BIRTH, BIRTH._replace(phrasing="casual"), BIRTH._replace(phrasing="gap")]
    answers = {BIRTH.text: calls(find()), questions[1].text: (500, {}), questions[2].text: GOOD}
    play = server(lambda request, n: answers.get(request["messages"][-1]["content"], GOOD))
    records = ask(play, tool, tmp_path / "r.jsonl", questions)
    assert [record["outcome"] for record in records] == ["right", "server error", "no call"]
    records[0]["answer"] = "half a pair: \ud800"
    table = recall_by_phrasing(records).set_index("phrasing")
    assert table.n_questions.to_dict() == {PAPER: 1, "casual": 0, "gap": 1}
    assert table.recall.isna().to_dict() == {PAPER: False, "casual": True, "gap": False}


def test_a_server_that_fails_at_once_is_asked_no_more(server, tool, tmp_path):
    play = server(lambda request, n: (404, {"error": "no such model"}))
    with pytest.raises(WorkError, match="did not answer the first question: NotFoundError.*no such model"):
        ask(play, tool, tmp_path / "r.jsonl", sample_questions(tool, 9, 0, PHRASINGS))
    assert len(play.requests) == 1


def test_a_first_question_that_is_refused_ends_nothing(server, tool, tmp_path):
    questions = [BIRTH, BIRTH._replace(phrasing="casual")]
    play = server(lambda request, n: (400, {}) if request["messages"][-1]["content"] == BIRTH.text else GOOD)
    records = ask(play, tool, tmp_path / "r.jsonl", questions)
    assert [record["outcome"] for record in records] == ["server error", "no call"]


def test_closed_book_only_the_answer_counts(server, tool, tmp_path):
    questions = [BIRTH, BIRTH._replace(phrasing="casual")]
    play = server(lambda request, n: GOOD if request["messages"][-1]["content"] == BIRTH.text else says(OTHER))
    records = ask(play, tool, tmp_path / "r.jsonl", questions, protocol="closed-book")
    assert [record["outcome"] for record in records] == ["right", "wrong answer"]
    assert not any("tools" in request for request in play.requests)


def test_the_model_is_offered_and_told_what_clients_of_the_people_server_are(server, tool, database, tmp_path):
    strange = [find("birthplace"), find(name="Nobody"), ("find", "{}"), find()]

    async def of_server() -> tuple[object, list[str]]:
        async with Client(people_server(database)) as client:
            said = [await client.call_tool(name, json.loads(arguments)) for name, arguments in strange]
            return (await client.list_tools()).tools[0], [each.content[0].text for each in said]

    offered, told = asyncio.run(of_server())
    play = in_turns(server, calls(*strange), GOOD)
    (record,) = ask(play, tool, tmp_path / "r.jsonl")
    (function,) = (each["function"] for each in play.requests[0]["tools"])
    assert (function["name"], function["description"]) == (offered.name, offered.description)
    assert function["parameters"] == offered.input_schema
    assert [message["content"] for message in play.requests[1]["messages"][-4:]] == told and told[-1] == BIRTH.value
    queries = [arguments and json.loads(arguments) for _, arguments in strange]
    assert record["calls"] == [[query or None, result] for query, result in zip(queries, told, strict=True)]


@pytest.mark.parametrize(
    "said, outcome",
    [
        (f"Let me see.\n```sql\nFIND birth_place FOR {ADA}\n```\nAtlantis! So it is Atlantis.", "right"),
        (f"```sql\nFIND birthplace FOR {ADA}\n```", "wrong attribute"),
        ("```sql\nFIND birth_place FOR Nobody Known\n```", "wrong name"),
        ("```sql\nSELECT birth_place FROM people\n```", "malformed call"),
        (f"```sql\nFIND birth_place FOR {ADA}", "malformed call"),
        (f"FIND birth_place FOR {ADA}", "no call"),
    ],
)
def test_as_text_a_request_is_the_papers(server, tool, tmp_path, said, outcome):
    play = in_turns(server, says(said), GOOD)
    (record,) = ask(play, tool, tmp_path / "r.jsonl", protocol="text")
    assert record["outcome"] == outcome
    if outcome == "right":
        system, user, request, result = play.requests[1]["messages"]
        assert "FIND" in system["content"] and all(attribute in system["content"] for attribute in ATTRIBUTES)
        assert user["content"] == question(ADA, "birth_place")
        assert request == {"role": "assistant", "content": tool_call(ADA, "birth_place")}
        assert result == {"role": "user", "content": BIRTH.value}


@pytest.mark.parametrize(
    "answer, value, holds",
    [
        ("He was born on 1/1/1950.", "1/1/1950", True),
        ("on 11/1/1950", "1/1/1950", False),
        ("on 1/1/19501", "1/1/1950", False),
        ("on 1 January 1950", "1/1/1950", False),
        ("1-1-1950", "1/1/1950", True),
        ("in THE  Congo,\nI think", "Congo", True),
        ("Guinea-Bissau", "Guinea", True),  # as the words go
        ("Niger", "Nigeria", False),
        ("Nigeria", "Niger", False),
        ("York, New", "New York", False),
        ("**New York**", "New York", True),
        ("", "Peru", False),
        ("A", "A", True),
        ("a ", "A", True),
        ("It is a B", "A", False),
        ("", "!", False),
        ("!", "!", True),
    ],
)
def test_an_answer_has_a_value_if_it_has_its_words(answer, value, holds):
    assert contains(answer, value) == holds


# ---- What is asked


def test_every_phrasing_asks_for_every_attribute_in_words_of_its_own():
    name = "Bo {value} Li"
    for attribute in (*ATTRIBUTES, "shoe_size"):
        texts = [PersonQuestion(name, attribute, "", phrasing).text for phrasing in PHRASINGS]
        assert texts[0] == question(name, attribute)
        assert len(set(texts)) == 11 and all(text.count(name) == 1 for text in texts)
        assert attribute != "shoe_size" or all("shoe size" in text for text in texts)
        assert not any("{" in text.replace(name, "") for text in texts)
    assert all(questions.keys() == {*ATTRIBUTES, "other"} for questions in PHRASINGS.values())
    with pytest.raises(InputError, match="unknown phrasing 'rude': there are paper, synonym, "):
        PersonQuestion(name, "birth_date", "", "rude").text  # noqa: B018


def test_facts_are_drawn_evenly_and_the_same_for_a_seed(tool):
    facts = Counter()
    for seed in range(600):
        drawn = [each[:3] for each in sample_questions(tool, 5, seed, [PAPER])]
        assert len(set(drawn)) == 5
        facts.update(drawn)
    assert facts.keys() == set(PEOPLE.facts())
    expected = 600 * 5 / 12
    assert sum((n - expected) ** 2 / expected for n in facts.values()) < 31.3  # chi-squared, 11 degrees: 1 in 1,000
    questions = sample_questions(tool, 5, 3, ["gap", PAPER])
    assert questions == sample_questions(tool, 5, 3, ["gap", PAPER]) and [q.phrasing for q in questions[:2]] == [
        "gap",
        PAPER,
    ]
    assert {each[:3] for each in sample_questions(tool, 100, 0, [PAPER])} == set(PEOPLE.facts())


def test_cells_without_text_are_not_asked_about(tmp_path):
    with closing(sqlite3.connect(tmp_path / "p.sqlite")) as connection, connection:
        connection.execute('CREATE TABLE people (name TEXT, age INTEGER, "eye color" TEXT)')
        connection.executemany(
            "INSERT INTO people VALUES (?, ?, ?)", [("Al", 7, None), ("Bo", b"x", "blue"), (None,) * 3]
        )
    with SqlTool(tmp_path / "p.sqlite") as tool:
        asked = {each[:3] for each in sample_questions(tool, 9, 0, [PAPER])}
        assert asked == {("Al", "age", "7"), ("Bo", "eye color", "blue")}
        assert all(tool.find(attribute, name).text == value for name, attribute, value in asked)
    with closing(sqlite3.connect(tmp_path / "p.sqlite")) as connection, connection:
        connection.execute("DELETE FROM people")
    with SqlTool(tmp_path / "p.sqlite") as tool, pytest.raises(InputError, match="the database has no fact"):
        sample_questions(tool, 9, 0, [PAPER])


@pytest.mark.parametrize("n_right, n", [(0, 1), (0, 40), (13, 40), (40, 40), (99, 100)])
def test_intervals_of_recall_are_wilsons(n_right, n):
    """Its ends are the shares p from which what was seen is 1.96 standard errors of p away."""
    outcomes = [Verdict.RIGHT] * n_right + [Verdict.NO_CALL] * (n - n_right) + [Verdict.SERVER_ERROR] * 3
    (row,) = recall_by_phrasing(
        [{"protocol": "tools", "phrasing": PAPER, "outcome": each.value} for each in outcomes]
    ).to_dict("records")
    assert row["recall"] == n_right / n and (row["n_questions"], row["right"], row["server error"]) == (n, n_right, 3)
    for end in (row["low"], row["high"]):
        assert (row["recall"] - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / n, abs=1e-12)
    assert row["low"] <= row["recall"] + 1e-12 and row["recall"] <= row["high"] + 1e-12


# ---- The command


@pytest.fixture
def itl_ask(itl) -> Callable[..., tuple[int, str, str]]:
    """A function that runs `itl ask`; gives exit code, output and errors."""
    return lambda *arguments: itl("ask", "--model", "m", *arguments)


def looks_up(request: dict, n: int = 0) -> tuple[int, dict]:
    """An ideal model: it looks up what the text of the question names."""
    last = request["messages"][-1]
    if last["role"] == "tool":
        return says(f"The database says {last['content']}.")
    asked = {PersonQuestion(*key, "", each).text: key for key in VALUES for each in PHRASINGS}
    name, attribute = asked[last["content"]]
    return calls(find(attribute, name)) if "tools" in request else says("I do not know")


def test_the_command_measures_every_phrasing_and_resumes(server, database, tmp_path, itl_ask):
    play, out = server(looks_up), tmp_path / "new" / "r.jsonl"
    given = ["--people", database, "--base-url", f"http://127.0.0.1:{play.server_port}/v1", "--out", out]
    given += ["--questions", 2, "--protocol", "tools", "--protocol", "closed-book"]
    before = database.read_bytes()
    code, said, _ = itl_ask(*given)
    assert code == 0 and len(out.read_text().splitlines()) == 2 * 2 * 11 and len(play.requests) == 2 * 3 * 11
    rows = [line.split() for line in said.splitlines()]
    assert [row for row in rows if PAPER in row] == [
        ["tools", PAPER, "1.000", "0.342", "1.000", "0"],
        ["closed-book", PAPER, "0.000", "0.000", "0.658", "2"],  # two wrong answers
    ]
    assert all((out.parent / f"r.jsonl.{kind}").stat().st_size > 1_000 for kind in ("pdf", "png"))
    play.requests.clear()
    assert itl_ask(*given)[:2] == (0, said) and not play.requests
    gap = itl_ask(*given, "--phrasing", "gap")
    assert gap[0] == 0 and not play.requests
    assert itl_ask(*given, "--phrasing", "gap", "--phrasing", "gap", "--protocol", "tools") == gap
    assert database.read_bytes() == before
    fact = json.loads(out.read_text().splitlines()[0])
    change_fact(database, fact["name"], fact["attribute"], "Elsewhere")
    assert itl_ask(*given[:-4])[0] == 0
    assert len(play.requests) == 2 * 11  # those about the changed fact


def test_people_may_be_in_a_csv_file(server, tmp_path, itl_ask):
    people = People(["Ada Stone", "Bo Li"], {"hobby": ["chess", "go"]})
    write_people_csv(people, tmp_path / "people.csv")
    play = server(lambda request, n: says("go") if len(request["messages"]) > 2 else calls(find("hobby", "Bo Li")))
    given = ["--people", tmp_path / "people.csv", "--base-url", f"http://127.0.0.1:{play.server_port}/v1"]
    code, said, _ = itl_ask(*given, "--out", tmp_path / "r.jsonl", "--phrasing", PAPER, "--concurrency", 1)
    assert code == 0 and {request["messages"][1]["content"] for request in play.requests} == {
        "What is the hobby of Ada Stone?",
        "What is the hobby of Bo Li?",
    }
    assert play.requests[0]["tools"][0]["function"]["parameters"]["properties"]["attribute"]["enum"] == ["hobby"]
    assert said.splitlines()[1].split()[-3:] == ["high", "wrong", "name"] and "0.500" in said


def test_some_failures_are_reported_and_asked_again(server, database, tmp_path, itl_ask):
    broken = [True]

    def script(request, n):
        return (400, {}) if broken and request["messages"][-1]["content"].startswith("hey") else looks_up(request)

    play = server(script)
    given = ["--people", database, "--base-url", f"http://127.0.0.1:{play.server_port}/v1", "--out", tmp_path / "r"]
    code, said, _ = itl_ask(*given, "--questions", 3)
    assert code == 1 and "server error" in said and "3 questions failed, the same command asks them again" in said
    broken.clear()
    play.requests.clear()
    code, said, _ = itl_ask(*given, "--questions", 3)
    assert code == 0 and "server" not in said and len(play.requests) == 2 * 3


def test_a_server_that_is_not_there_ends_in_one_sentence(database, tmp_path, itl_ask):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    code, _, said = itl_ask("--people", database, "--base-url", url, "--out", tmp_path / "r", "--retries", 0)
    assert code == 1 and said.startswith(f"itl: the server {url} did not answer the first question: APIConnectionError")


def test_the_name_of_a_model_is_no_formula(server, database, tmp_path, itl_ask):
    play = server(looks_up)
    given = ["--people", database, "--base-url", f"http://127.0.0.1:{play.server_port}/v1", "--out", tmp_path / "r"]
    assert itl_ask(*given, "--questions", 1, "--phrasing", PAPER, "--model", r"a$\b$")[0] == 0
    table = recall_by_phrasing([json.loads(line) for line in (tmp_path / "r").read_text().splitlines()])
    drawn = recall_figure(table, r"a$\b$")
    drawn.canvas.draw()
    assert drawn.axes[0].title.get_text().replace(r"\$", "$") == r"a$\b$"


@pytest.mark.parametrize(
    "damage",
    [
        {"protocol": ...},
        {"answer": ...},
        {"answer": 3},
        *({"calls": c} for c in (None, {}, [[]], [[{"name": ADA}, "x"]])),
    ],
    ids=str,
)
def test_a_damaged_record_is_one_sentence_and_stays(server, tool, tmp_path, damage):
    out, play = tmp_path / "r.jsonl", server(looks_up)
    (record,) = ask(play, tool, out)
    out.write_text(json.dumps({name: value for name, value in (record | damage).items() if value is not ...}) + "\n")
    before = out.read_bytes()
    with pytest.raises(InputError, match="r.jsonl as records, name a new file: "):
        ask(play, tool, out)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["--people", "none.sqlite"], "there is no database none.sqlite"),
        (["--people", "none.csv"], "cannot read people from none.csv"),
        (["--people", "notes.sqlite"], "cannot read people from the database notes.sqlite"),
        (["--phrasing", "rude"], "unknown phrasing 'rude'"),
        (["--questions", "0"], "questions"),
        (["--out", "people.sqlite"], "--people and --out name the same file"),
        (["--base-url", "http://localhost/" + "x" * 100_000], "endpoint.base_url: "),
        (["--api-key", "sec\nret"], "endpoint.api_key: string should match pattern '^[!-~]([ -~]*[!-~])?$'\n"),
        (["--out", "notes.sqlite"], "notes.sqlite as records, name a new file: "),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(wrong, words, server, database, tmp_path, monkeypatch, itl_ask):
    monkeypatch.chdir(tmp_path)
    Path("notes.sqlite").write_text("notes\n")
    play = server(looks_up)
    given = {"--people": "people.sqlite", "--base-url": f"http://127.0.0.1:{play.server_port}/v1", "--out": "r.jsonl"}
    code, _, said = itl_ask(*(part for pair in (given | dict([wrong])).items() for part in pair))
    assert code == 2 and words in said and said.count("\n") == 1 and not play.requests


# ---- A real server


#: Function calls as `transformers serve` finds them in what a model says, and as it gives them back to the template.
TEMPLATE = chat_models.TEMPLATE.replace(
    "(call.function | tojson)",
    """'{"name": "' + call.function.name + '", "arguments": ' +
        (call.function.arguments if call.function.arguments is string else call.function.arguments | tojson) + '}'""",
)
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<call>",
            "close": "</call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<|end|>", "content": "text"},
    },
}


@contextmanager
def serving(model: Path, log: Path) -> Iterator[str]:
    """Start `transformers serve` with the model of a folder; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", model]
    command += ["--host", "127.0.0.1", "--port", port, "--device", "cpu"]
    with (
        log.open("w") as file,
        subprocess.Popen(
            list(map(str, command)), stdout=file, stderr=file, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        ) as process,
    ):
        try:
            deadline = time.monotonic() + 600
            while process.poll() is None and time.monotonic() < deadline:
                with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
                time.sleep(0.5)
            else:
                pytest.fail(f"transformers serve does not start: {log.read_text()[-2000:]}")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def transformers_serve(tmp_path_factory) -> Iterator[tuple[str, str]]:
    """`transformers serve` with a small model that has learnt to look one person up, in the paper's words alone."""
    folder = tmp_path_factory.mktemp("served")
    write_database(sample_people(1), folder / "people.sqlite")
    tokenizer = copy.deepcopy(chat_models.tokenizer())
    tokenizer.chat_template, tokenizer.response_template = TEMPLATE, RESPONSE
    system = [{"role": "system", "content": EndpointConfig.model_fields["system"].default}]
    with SqlTool(folder / "people.sqlite") as tool:
        opening = PeopleTask(tool).opening
    rows = [
        row | {"tools": opening("", "in-tool")["tools"], "messages": system + row["messages"]}
        for row in chat_models.chats(sample_people(1), "in-tool")
    ]
    model = chat_models.learn(rows, tokenizer, steps=200)
    model.generation_config.eos_token_id = tokenizer.eos_token_id  # where the server ends a turn
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with serving(folder / "model", folder / "log.txt") as url:
        yield url, str(folder / "model")


@pytest.mark.slow
@pytest.mark.timeout(1_200)  # on a busy machine the server alone takes minutes to start
def test_a_real_server_calls_the_tool_and_recall_is_of_what_its_model_learnt(transformers_serve, tmp_path, itl_ask):
    url, model = transformers_serve
    write_people_csv(sample_people(1), tmp_path / "people.csv")
    given = ["--people", tmp_path / "people.csv", "--base-url", url, "--out", tmp_path / "r.jsonl", "--model", model]
    code, said, errors = itl_ask(*given, "--phrasing", PAPER, "--phrasing", "keywords", "--retries", 0)
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    papers = [record for record in records if record["phrasing"] == PAPER]
    assert [record["outcome"] for record in papers] == ["right"] * 4, papers
    # In other words it may ask for something else, or write a call that is no JSON: the server answers that with 500.
    failed = [record["error"] for record in records if record["error"]]
    assert len(records) == 8 and code == bool(failed), (records, said, errors)
    assert failed == [record["error"] for record in records if record["outcome"] == Verdict.SERVER_ERROR]
    assert all(record["outcome"] != "right" or record["value"] in record["answer"] for record in records)


@pytest.mark.slow
@pytest.mark.timeout(1_800)  # a download, and 135 million weights on a CPU that may be busy
def test_a_chat_model_that_people_know_is_asked_by_every_protocol(tmp_path, monkeypatch, itl_ask):
    monkeypatch.setenv("ITL_RUNS", str(tmp_path / "runs"))
    fetch("SmolLM2-135M")
    model = base_source("SmolLM2-135M")
    write_people_csv(sample_people(1), tmp_path / "people.csv")
    protocols = [option for name in PROTOCOLS for option in ("--protocol", name)]
    with serving(model, tmp_path / "log.txt") as url:
        given = [
            "--people",
            tmp_path / "people.csv",
            "--base-url",
            url,
            "--out",
            tmp_path / "r.jsonl",
            "--model",
            model,
        ]
        options = ["--questions", 1, "--phrasing", PAPER, "--max-tokens", 48, "--timeout", 400]
        code, _, errors = itl_ask(*given, *options, *protocols)
    assert code == 0, errors
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [record["protocol"] for record in records] == list(PROTOCOLS)
    # It was never taught these people: it may say anything, but it says something, and cannot know the value.
    assert all(record["error"] is None and record["answer"] for record in records if not record.get("calls"))
    assert records[0]["outcome"] == "wrong answer"
