"""People for MCP clients: the real command, asked by the protocol's own client, and whatever else may reach it."""

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from time import monotonic

import pytest
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client

from lib.agent.server import LONGEST_NAME, people_server, stdio
from lib.base import InputError
from lib.facts.csv import write_people_csv
from lib.facts.database import change_fact, write_database
from lib.facts.people import People
from lib.facts.sampling import sample_people
from lib.paths import ROOT

BOBBY = "Robert'); DROP TABLE people;--"
SAMPLE = sample_people(40, seed=1)
PEOPLE = People([*SAMPLE.names, BOBBY], {a: [*column, f"his {a}"] for a, column in SAMPLE.columns.items()})
FACTS = list(PEOPLE.facts())
NAME, ATTRIBUTE, VALUE = FACTS[0]
GOOD = {"attribute": ATTRIBUTE, "name": NAME}
COMMAND = ["-m", "lib", "serve"]


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Iterator[Path]:
    """People in a file that is, whatever was asked, in the end as it was, and alone in its folder."""
    path = tmp_path_factory.mktemp("people") / "people.sqlite"
    write_database(PEOPLE, path)
    before = path.read_bytes(), path.stat().st_mtime_ns
    yield path
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert list(path.parent.iterdir()) == [path]


@contextmanager
def serving(folder: Path, *arguments: object) -> Iterator[tuple[subprocess.Popen, str]]:
    """Run the command, with temporary files in `folder`; gives the process and where it says that it serves."""
    with subprocess.Popen(
        [sys.executable, *COMMAND, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            said = process.stderr.readline().decode()
            assert said.startswith("serving "), said + process.stderr.read().decode()
            yield process, said.split(" at ")[1].split(";")[0]
        finally:
            process.kill()


@pytest.fixture(scope="module")
def url(database, tmp_path_factory) -> Iterator[str]:
    """A server over HTTP. Whatever it was sent, it ends as it should and has said nothing meanwhile."""
    with serving(tmp_path_factory.mktemp("http"), database, "--http", "--port", 0) as (process, url):
        yield url
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=20) == (b"", b"") and process.returncode == 0


def ask(server, *requests: dict, mode: str = "auto") -> list[tuple[bool, str]]:
    """The answers of one client's calls of `find`, in their order: whether it is an error, and the text."""

    async def talk() -> list:
        async with Client(server, mode=mode) as client:
            return [await client.call_tool("find", request) for request in requests]

    return [(result.is_error, *(block.text for block in result.content)) for result in asyncio.run(talk())]


@pytest.mark.parametrize(("transport", "mode"), [("stdio", "auto"), ("http", "auto"), ("http", "legacy")])
def test_the_tool_lists_the_attributes_and_answers_with_values(transport, mode, database, url, tmp_path):
    command = StdioServerParameters(
        command=sys.executable, args=[*COMMAND, str(database)], env={"PYTHONPATH": str(ROOT)}, cwd=tmp_path
    )

    async def talk(server) -> None:
        async with Client(server, mode=mode) as client:
            (tool,) = (await client.list_tools()).tools
            assert tool.name == "find" and sorted(tool.input_schema["required"]) == ["attribute", "name"]
            assert tool.input_schema["properties"]["attribute"]["enum"] == list(PEOPLE.attributes)
            for name, attribute, value in (FACTS[0], FACTS[17], FACTS[-1]):
                result = await client.call_tool("find", {"attribute": attribute, "name": name})
                assert not result.is_error and [block.text for block in result.content] == [value]
            assert (await client.call_tool("drop", GOOD)).is_error

    with open(tmp_path / "errors", "w+") as errors:
        asyncio.run(talk(url if transport == "http" else stdio_client(command, errors)))
    assert "Traceback" not in (tmp_path / "errors").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["errors"]


UNKNOWN = f"no such attribute: .*{', '.join(PEOPLE.attributes)}"
NO_REQUEST = f"takes two strings: .*{', '.join(PEOPLE.attributes)}; name, at most 1,000"
REFUSED = {
    "an unknown person": ({"name": "Nobody"}, "Nobody of exactly this name"),
    "SQL as a name": ({"name": "' OR 1=1 --"}, "Nobody of exactly this name"),
    "control characters": ({"name": "\x00\x1b[2J\n```"}, "Nobody of exactly this name"),
    "the longest name": ({"name": "x" * LONGEST_NAME}, "Nobody of exactly this name"),
    "100,000 characters": ({"name": "x" * 100_000}, NO_REQUEST),
    "an unknown attribute": ({"attribute": "height"}, UNKNOWN),
    "the key": ({"attribute": "name"}, UNKNOWN),
    "no name": ({"name": ...}, NO_REQUEST),
    "nothing": ({"name": ..., "attribute": ...}, NO_REQUEST),
    "a number": ({"name": 3}, NO_REQUEST),
    "an object": ({"attribute": {"a": ATTRIBUTE}}, NO_REQUEST),
}


@pytest.mark.parametrize("mode", ["auto", "legacy"])  # the protocol of 2026, and the one before
def test_what_is_no_good_request_is_an_error_of_one_sentence(url, mode):
    requests = [{k: v for k, v in (GOOD | change).items() if v is not ...} for change, _ in REFUSED.values()]
    *refused, good = ask(url, *requests, GOOD, mode=mode)
    assert good == (False, VALUE)
    for (cause, (_, words)), (is_error, text) in zip(REFUSED.items(), refused, strict=True):
        assert is_error and len(text) < 250 and text.count("\n") == 0 and text.endswith("."), cause
        assert re.search(words, text), (cause, text)


def address(url: str) -> tuple[str, int]:
    host, port = url.split("/")[2].split(":")
    return host, int(port)


def post(url: str, body: bytes, path: str = "/mcp", **headers: str) -> tuple[int, bytes]:
    accepted = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
    with closing(http.client.HTTPConnection(*address(url), timeout=20)) as connection:
        try:
            connection.request("POST", path, body, accepted | headers)
        except OSError:  # refused before the whole body was sent
            pass
        response = connection.getresponse()
        return response.status, response.read()


@pytest.mark.parametrize("body", [b"", b"[]", b"\xff", b"[" * 100_000, b'{"jsonrpc":"2.0","id":1,"method":"\\ud800"}'])
def test_bytes_that_are_no_request_are_refused_and_the_next_is_answered(url, body):
    status, reply = post(url, body)
    assert 400 <= status < 500 and len(reply) < 2_000 and b"Traceback" not in reply
    assert ask(url, GOOD) == [(False, VALUE)]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "people.example:80"}, 421),  # a page whose name was bound anew to this machine
        ({"Host": "a\x1b[2Jb"}, 421),
        ({"Origin": "https://people.example"}, 403),
        ({"Content-Type": "text/plain"}, 400),  # what a page's form can send
        ({"Content-Length": str(1 << 30)}, 413),
        ({"path": "/people.sqlite"}, 404),
    ],
)
def test_other_hosts_other_sites_and_endless_requests_are_refused(url, headers, status):
    assert post(url, b"{}", **headers)[0] == status


def test_the_server_listens_on_this_machine_alone(url):
    assert url.startswith("http://127.0.0.1:")
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", address(url)[1]), 5):
        pass


def test_ten_clients_at_once_get_answers_of_their_own(url):
    async def talk(mine: list) -> list:
        async with Client(url) as client:
            requests = [client.call_tool("find", {"attribute": a, "name": name}) for name, a, _ in mine]
            return [(result.is_error, result.content[0].text) for result in await asyncio.gather(*requests)]

    async def together() -> list:
        return await asyncio.gather(*(talk(FACTS[i:40:10]) for i in range(10)))

    for i, answers in enumerate(asyncio.run(together())):
        assert answers == [(False, value) for _, _, value in FACTS[i:40:10]]


def test_a_client_that_leaves_in_the_middle_takes_nobody_along(url):
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "find", "arguments": GOOD}}
    body = json.dumps(call).encode()
    head = f"POST /mcp HTTP/1.1\r\nHost: 127.0.0.1:1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    head = f"{head}\r\nAccept: application/json, text/event-stream\r\n\r\n".encode()
    for sent in (head[:40], head, head + body[:20], head + body):
        for abruptly in (True, False):
            with socket.create_connection(address(url), 5) as client:
                client.sendall(sent)
                if abruptly:  # a reset instead of an end
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert ask(url, GOOD) == [(False, VALUE)]


def test_stdio_carries_the_protocol_alone_and_ends_with_its_client(tmp_path):
    write_people_csv(PEOPLE, tmp_path / "People.CSV")
    client = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    messages = [
        b"hello",
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": client}).encode(),
        json.dumps({"jsonrpc": "2.0", "method": "notifications/initialized"}).encode(),
        json.dumps({"jsonrpc": "2.0", "id": 2, "method": "no/such"}).encode(),
        json.dumps({"jsonrpc": "2.0", "id": 3, "method": "tools/call", "params": {"name": 3}}).encode(),
        json.dumps(
            {"jsonrpc": "2.0", "id": 4, "method": "tools/call", "params": {"name": "find", "arguments": GOOD}}
        ).encode(),
    ]
    with serving(tmp_path, tmp_path / "People.CSV") as (process, _):
        process.stdin.write(b"\n".join(messages) + b"\n")
        process.stdin.flush()
        answers = {}
        while 4 not in answers or 3 not in answers:
            answer = json.loads(process.stdout.readline())
            assert answer["jsonrpc"] == "2.0"
            answers[answer.get("id")] = answer
        assert answers[4]["result"]["content"][0]["text"] == VALUE and not answers[4]["result"].get("isError")
        assert "error" in answers[2] and "error" in answers[3] and "Traceback" not in json.dumps(answers)
        process.stdout.close()
        process.stdin.write(messages[-1] + b"\n" + messages[-1][:30])  # an answer that nobody reads, half a request
        process.stdin.close()
        assert process.wait(timeout=20) == 0
        assert process.stderr.read() == b""
    assert [path.name for path in tmp_path.iterdir()] == ["People.CSV"]


@pytest.mark.parametrize(
    ("number", "transport"),
    [(signal.SIGINT, []), (signal.SIGTERM, []), (signal.SIGINT, ["--http", "--port", 0])],  # the fixture has the fourth
)
def test_signals_end_the_server_and_nothing_of_it_stays(number, transport, tmp_path):
    write_people_csv(PEOPLE, tmp_path / "people.csv")
    folder = tmp_path / "temporary"
    folder.mkdir()
    with serving(folder, tmp_path / "people.csv", *transport) as (process, where):
        assert len(list(folder.iterdir())) == 1
        if transport:
            assert ask(where, GOOD) == [(False, VALUE)]
            listener = socket.create_connection(address(where), 5)
            listener.sendall(b"GET /mcp HTTP/1.1\r\nHost: 127.0.0.1:1\r\nAccept: text/event-stream\r\n\r\n")
            assert listener.recv(12) == b"HTTP/1.1 200"  # a client that goes on listening
        process.send_signal(number)
        assert process.wait(timeout=20) == 0
        assert process.stdout.read() + process.stderr.read() == b""
        if transport:
            listener.close()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "words", "transport"),
    [
        ("people.sqlite", b"no database, but long enough to be read as one" * 100, "cannot read people", []),
        ("people.sqlite", None, "there is no database", ["--http", "--port", "0"]),
        ("people.csv", None, "cannot read people", []),
        ("people.csv", b"city\nLyon\n", "no column 'name'", ["--http", "--port", "0"]),
        ("people.csv", b"SQLite format 3\x00\xff", "cannot read people", []),
    ],
)
def test_a_file_without_people_is_one_sentence(name, content, words, transport, tmp_path, refused):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(words, str(tmp_path / name), *transport)


def test_a_port_in_use_is_one_sentence(database, monkeypatch, refused):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        refused(f"port {port} .*in use.*--port", str(database), "--http", "--port", port)


def test_without_the_package_one_sentence_names_the_extra(database, monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "mcp", None)
    refused(r"the package mcp: pip install -e '\.\[serve\]'", str(database))


@pytest.fixture
def refused(itl) -> Callable[..., None]:
    """Run the command in this process: it ends with one line and exit code 2, and leaves the signals as they were."""

    def run(words: str, *arguments: str) -> None:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        answer = itl("serve", *arguments)
        assert answer[:2] == (2, "") and answer.err.count("\n") == 1 and re.match(f"itl: .*{words}", answer.err), answer
        assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    return run


def test_a_standard_input_that_is_closed_is_one_sentence(database, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="no standard input"):
        asyncio.run(stdio(people_server(database)))


def test_a_change_is_seen_at_once_and_a_file_that_is_gone_is_an_error(tmp_path):
    path = tmp_path / "people.sqlite"
    write_database(PEOPLE, path)
    server = people_server(path)
    assert ask(server, GOOD) == [(False, VALUE)]
    change_fact(path, NAME, ATTRIBUTE, "something new")
    assert ask(server, GOOD) == [(False, "something new")]
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        ((is_error, text),) = ask(server, GOOD)
        assert is_error and "locked" in text
    content = path.read_bytes()
    path.unlink()
    ((is_error, text),) = ask(server, GOOD)
    assert is_error and "there is no database" in text and "\n" not in text
    path.write_bytes(content)
    assert ask(server, GOOD) == [(False, "something new")]
    write_database(People([NAME], {"hobby": ["chess"]}), path)
    asked = ask(server, GOOD, {"attribute": "hobby", "name": NAME})
    assert asked == [(True, "There is no such attribute: attribute is one of hobby."), (False, "chess")]


def test_a_query_without_end_is_an_error_and_holds_up_nobody(tmp_path):
    path = tmp_path / "endless.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(
            "CREATE VIEW people AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
            "SELECT i AS name, i AS age FROM n"
        )

    async def talk() -> tuple:
        async with Client(people_server(path)) as client:
            slow = asyncio.create_task(client.call_tool("find", {"attribute": "age", "name": "Ann"}))
            start = monotonic()
            await asyncio.sleep(0.1)
            await client.list_tools()
            return monotonic() - start, slow.done(), await slow

    waited, done, result = asyncio.run(talk())
    assert waited < 0.9 and not done
    assert result.is_error and result.content[0].text == "The database took too long to answer."
