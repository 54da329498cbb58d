"""Whatever a file, a model or a server says ends in a result or in one sentence: every door is given damaged input.

`make fuzz` tries many more examples of the same.
"""

import asyncio
import base64
import json
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import forging
import pytest
import tokenizers
from chat_server import says
from finished import FINISHED
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mcp import Client

from lib import paths
from lib.agent.server import people_server
from lib.agent.tools import EditableTool, Outcome, SqlTool
from lib.base import InputError, WorkError
from lib.cli.options import assigned
from lib.config import RunConfig, override, read_config, read_row
from lib.dialogs.files import read_dialogs
from lib.dialogs.request import format_request, parse_request
from lib.dialogs.tokenizers import ByteTokenizer, load_tokenizer
from lib.experiments.plan import searches
from lib.facts.csv import read_people_csv, write_people_csv
from lib.facts.database import write_database
from lib.facts.people import FactsConfig, People
from lib.facts.sampling import sample_people
from lib.finetune.endpoint import EndpointConfig, ask_all
from lib.finetune.triviaqa import load_questions
from lib.notebook import catalog
from lib.slurm import submissions
from lib.training.checkpoint import MARKER
from lib.training.saved import open_conversation, read_claim

PEOPLE = sample_people(4)
#: What a door may raise; the message is one sentence.
SENTENCES = (InputError, WorkError)
#: Bytes that have broken readers before.
NASTY = [
    b"",
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",  # half a surrogate pair
    b"\\ud800",
    b"null",
    b"NaN",
    b"1e999",
    b"-1",
    b"9" * 5_000,
    b"[" * 1_200,  # deeper than Python recurses
    b'{"a":' * 1_200,
    b'"',
    b"\n",
    b"\r",
    b"\x1b[2J",
    b"../" * 100,
]


def damaged(*whole: bytes) -> st.SearchStrategy[bytes]:
    """Bytes of one of `whole`, of which some are overwritten, cut out, repeated, or have others between them."""

    @st.composite
    def edit(draw: Callable) -> bytes:
        content = bytearray(draw(st.sampled_from(whole)))
        for _ in range(draw(st.integers(0, 4))):
            start = draw(st.integers(0, len(content)))
            end = min(len(content), start + draw(st.integers(0, 40)))
            new = draw(st.sampled_from(NASTY) | st.binary(max_size=8) | st.just(bytes(content[start:end]) * 2))
            content[start:end] = new
        return bytes(content)

    return edit() | st.binary(max_size=200)


#: A door is opened once an example, and fixtures serve all examples.
door = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
#: Where opening takes long.
heavy_door = settings(door, max_examples=settings.default.max_examples // 2)


@pytest.fixture
def database(tmp_path) -> Path:
    write_database(PEOPLE, tmp_path / "people.sqlite")
    return tmp_path / "people.sqlite"


@pytest.fixture(autouse=True)
def seconds():
    """A door that does not answer within a minute hangs."""

    def late(*_) -> None:
        raise AssertionError("a door hangs")

    before = signal.signal(signal.SIGALRM, late)
    yield lambda: signal.alarm(60)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def written(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


# ---- What a model says


turns = st.lists(
    st.sampled_from(
        ["```", "```sql", "\n", "\r", "FIND", " FOR ", "birth_place", PEOPLE.names[0], " ", "\x00", "\ud800"]
    )
    | st.text(st.characters(exclude_categories=()), max_size=6),
    max_size=12,
).map("".join)


@door
@given(turn=turns)
@example(turn="```sql\n" * 200_000)
@example(turn="FIND " * 200_000 + "\n```")
def test_a_turn_of_a_model_is_answered_by_an_outcome(turn, database, seconds):
    seconds()
    request = parse_request(turn)
    if request:
        assert turn.endswith(format_request(*request))
    with SqlTool(database) as tool:
        assert tool(turn).outcome in Outcome


words = turns.map(lambda text: text.encode(errors="ignore").decode())  # the client can send no half of a pair
json_values = (
    st.none() | st.booleans() | st.floats(allow_nan=False) | words | st.lists(words) | st.dictionaries(words, words)
)


@heavy_door
@given(
    arguments=st.none()
    | st.dictionaries(words, json_values, max_size=2)
    | st.fixed_dictionaries({"attribute": json_values, "name": json_values})
)
@example(arguments={"attribute": PEOPLE.attributes[0], "name": PEOPLE.names[0]})
def test_a_call_of_a_client_is_a_value_or_a_sentence(arguments, database, seconds):
    seconds()

    async def talk():
        async with Client(people_server(database)) as client:
            return await client.call_tool("find", arguments)

    result = asyncio.run(talk())
    (text,) = (block.text for block in result.content)
    asked = arguments and (arguments.get("name"), arguments.get("attribute"), text) in [*PEOPLE.facts()]
    assert result.is_error is not bool(asked) and text.count("\n") == 0 and len(text) < 250


# ---- Files of people


COMMA = b'name,city,hobby\nAda Stone,Lyon,chess\n"Lee, Bo","Bern",go\n'


@door
@given(content=damaged(COMMA, COMMA.replace(b",", b";"), COMMA.replace(b",", b"\t"), COMMA.decode().encode("utf-16")))
def test_a_csv_file_is_people_that_come_back_or_a_sentence(content, tmp_path, seconds):
    seconds()
    path = written(tmp_path, "people.csv", content)
    with suppress(InputError):
        people = read_people_csv(path)
        assert len(people) and len({*people.names}) == len(people)
        write_people_csv(people, path)
        assert read_people_csv(path) == people
        write_database(people, tmp_path / "people.sqlite")
        with SqlTool(tmp_path / "people.sqlite", people.attributes) as tool:
            for name, attribute, value in people.facts():
                assert tool(format_request(attribute, name)).text == value


@door
@given(edits=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=20))
def test_a_database_with_any_bytes_changed_answers_by_outcomes_or_is_refused(edits, database, seconds):
    seconds()
    content = bytearray(database.read_bytes())
    for place, byte in edits:
        content[place % len(content)] = byte
    path = written(database.parent, "changed.sqlite", bytes(content))
    for kind in (SqlTool, EditableTool):
        with suppress(*SENTENCES), kind(path) as tool:
            for name, attribute, _ in PEOPLE.facts():
                assert tool(format_request(attribute, name)).outcome in Outcome
            if kind is EditableTool:
                tool.add(People(["Ann Lee"], {a: ["x"] for a in tool.attributes}))
                tool.change("Ann Lee", tool.attributes[0], "y")


# ---- Files of dialogs, tokens, questions


DIALOGS = b'[["user", "Where?"], ["assistant", "Here."]]\n[["user", "\\u00e9"], ["assistant", "So"]]\n'


@door
@given(content=damaged(DIALOGS))
def test_a_file_of_dialogs_is_tokens_or_a_sentence(content, tmp_path, seconds):
    seconds()
    with suppress(InputError):
        data, _ = read_dialogs(written(tmp_path, "dialogs.jsonl", content), ByteTokenizer())
        assert len(data) and int(data.n_trained.min()) > 0


QUESTION = json.dumps({"question": "Which city?", "answer": {"value": "Rome", "aliases": ["Roma"]}}).encode()


@door
@given(content=damaged(QUESTION + b"\n" + QUESTION))
def test_a_file_of_questions_is_read_or_a_sentence(content, tmp_path, seconds):
    seconds()
    with suppress(InputError):
        assert load_questions(written(tmp_path, "questions.jsonl", content))


def vocabulary() -> bytes:
    return b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))


def hugging_face() -> bytes:
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer.to_str().encode()


@pytest.mark.parametrize(("suffix", "whole"), [(".tiktoken", vocabulary()), (".json", hugging_face())])
def test_a_vocabulary_is_a_tokenizer_or_a_sentence(suffix, whole, tmp_path, seconds):
    assert load_tokenizer(str(written(tmp_path, f"whole{suffix}", whole))).vocab_size >= 260

    @door
    @given(damaged(whole))
    def read(content):
        seconds()
        with suppress(InputError):
            tokenizer = load_tokenizer(str(written(tmp_path, f"vocabulary{suffix}", content)))
            assert tokenizer.decode(tokenizer.encode("Ann Lee")) == "Ann Lee"

    read()


# ---- Configurations and plans


CONFIG = RunConfig(mode="in-tool", facts=FactsConfig(n_people=8, alpha=0.5)).model_dump_json().encode()
PLAN = b"recipe: fast\nbase: {training: {steps: 20}}\naxes: [{n_facts: [64, 256]}, {seed: [0, 1]}]\nsizes: [8, 16]\n"


@door
@given(content=damaged(CONFIG, json.dumps(json.loads(CONFIG), indent=1).encode()))
def test_a_configuration_is_read_or_a_sentence(content, tmp_path, seconds):
    seconds()
    with suppress(InputError):
        assert RunConfig.parse(json.loads(read_config(written(tmp_path, "run.json", content)).canonical_json()))


ASSIGNMENTS = b"training.steps=500", b"model.d_model=8", b"facts={}", b"mode=in-tool", b"training.files={}"


@door
@given(assignments=st.lists(damaged(*ASSIGNMENTS), max_size=3))
def test_an_assignment_is_read_or_a_sentence(assignments, seconds):
    seconds()
    with suppress(InputError):
        override(RunConfig(), assigned({"set": [text.decode(errors="surrogateescape") for text in assignments]}))


@door
@given(content=damaged(PLAN))
@example(
    content=b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in b"bcdefghij")
)
@example(content=b"&a [*a]")
@example(content=b"1: 2")
@example(content=b"base: {1: 2, training: {files: {3: 0.5}}}\nsizes: [8]")
@example(content=b"sizes: &a [*a]")
def test_a_plan_is_searches_or_a_sentence(content, tmp_path, seconds):
    seconds()
    with suppress(InputError):
        assert [search.base.run_id for search in searches(str(written(tmp_path, "grid.yaml", content)), "quick")]


# ---- Folders that runs wrote


RECORDS = {"config.json": read_claim, "row.json": lambda folder: read_row(folder / "row.json")}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_of_a_run_is_read_or_a_sentence(name, tmp_path, seconds):
    whole = {
        "config.json": json.dumps({"config": json.loads(CONFIG), "people_digest": "0" * 16, "threads": 1}).encode(),
        "row.json": json.dumps(FINISHED | {"seed": 0}).encode(),
    }[name]

    @door
    @given(damaged(whole))
    def read(content):
        seconds()
        written(tmp_path, name, content)
        with suppress(*SENTENCES):
            RECORDS[name](tmp_path)

    read()


def test_a_record_of_a_submission_that_is_damaged_hides_no_other(seconds):
    folder = submissions.submissions_dir() / "damaged"
    folder.mkdir(parents=True)
    record = {"kind": "train", "current": "/", "copies": {}, "tasks": [], "submitted_at": "now"}

    @door
    @given(damaged(json.dumps(record).encode()))
    def read(content):
        seconds()
        written(folder, submissions.RECORD, content)
        submissions.everything()

    read()
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", MARKER])
def test_a_checkpoint_with_right_checksums_and_other_bytes_talks_or_is_a_sentence(name, tmp_path, seconds):
    whole = paths.CHECKPOINTS / "in-weight"
    content = (whole / "model" / name).read_bytes()
    shutil.copytree(whole, tmp_path / "run")
    header = int.from_bytes(content[:8], "little") + 8 if name.endswith("tensors") else len(content)

    @heavy_door
    @given(damaged(content[:header]).map(lambda head: head + content[header:]))
    @example(b"{}")
    @example((10**9).to_bytes(8, "little") + content[8:])
    @example(content.replace(b'"F32"', b'"BOOL"', 1))
    @example(content.replace(b'"F32"', b'"I32"', 1))
    def read(content):
        seconds()
        written(tmp_path / "run" / "model", name, content)
        if name != MARKER:
            forging.seal(tmp_path / "run" / "model")
        with suppress(*SENTENCES), open_conversation(tmp_path / "run", device="cpu") as talk:
            assert talk.turns("Where was Ann Lee born?", max_new_tokens=4)

    read()


# ---- Servers and notebooks


CALL = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"query": "Rome"}'}}


@pytest.mark.parametrize("protocol", ["closed-book", "text", "tools"])
def test_every_reply_of_a_server_is_recorded(protocol, server, tmp_path, seconds):
    questions, replies = load_questions(limit=1), []
    play = server(lambda request, n: (200, iter(replies)))
    url = f"http://127.0.0.1:{play.server_port}/v1"
    endpoint = EndpointConfig(base_url=url, model="m", protocol=protocol, retries=0, max_turns=2, timeout=20.0)
    whole = [json.dumps(says("Rome", **more)[1]).encode() for more in ({}, {"tool_calls": [CALL]})]

    @heavy_door
    @given(damaged(*whole))
    def read(reply):
        seconds()
        replies[:] = [reply]
        (tmp_path / "records.jsonl").unlink(missing_ok=True)
        (record,) = asyncio.run(ask_all(questions, endpoint, lambda query: "nothing", tmp_path / "records.jsonl"))
        assert (record["answer"] is None) or isinstance(record["answer"], str)
        assert json.loads((tmp_path / "records.jsonl").read_text(encoding="utf-8")) == record

    read()


@pytest.fixture(scope="module")
def notebook() -> bytes:
    cell = {"cell_type": "code", "id": "a", "execution_count": None, "outputs": []}
    cell |= {"metadata": {"tags": ["parameters"]}, "source": "seeds: int = 3\nname: str = 'a'"}
    metadata = {"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}}
    return json.dumps({"cells": [cell], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}).encode()


def test_the_parameters_of_a_notebook_are_read_or_a_sentence(notebook, tmp_path, seconds):
    assert catalog.parameters(written(tmp_path, "01_x.ipynb", notebook))["seeds"] == "int"

    @door
    @given(damaged(notebook))
    def read(content):
        seconds()
        with suppress(InputError):
            catalog.checked(written(tmp_path, "01_x.ipynb", content), "quick", {})

    read()
