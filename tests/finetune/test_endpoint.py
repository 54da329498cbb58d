"""Asking a model behind a server, one here that fails as servers do."""

import asyncio
import gzip
import json
import os
import re
import time
from collections import Counter
from pathlib import Path

import pytest
from chat_server import Scripted, calls, says
from full_disk import full_after
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib.base import InputError, WorkError
from lib.finetune import triviaqa
from lib.finetune.endpoint import EndpointConfig, accuracy, ask_all
from lib.finetune.triviaqa import NO_RESULT, SEARCH, SYSTEM_PROMPT, Store, load_questions

#: How the error begins that records a reply which is no chat completion.
NO_COMPLETION = "OpenAIError: the server's answer is not a chat completion"
QUESTIONS = load_questions(limit=6)
ANSWERS = {question.text: question.answer for question in QUESTIONS}


def ask(server: Scripted, out: Path, questions=QUESTIONS, **settings) -> list[dict]:
    url = f"http://127.0.0.1:{server.server_port}/v1"
    endpoint = EndpointConfig(**{"base_url": url, "model": "m", "protocol": "closed-book"} | settings)
    return asyncio.run(ask_all(questions, endpoint, ANSWERS.get, out))


def right(request: dict, n: int = 0) -> tuple[int, dict]:
    return says(ANSWERS[request["messages"][-1]["content"]])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- What goes over the wire


def test_closed_book_a_question_is_one_request_and_a_record(server, tmp_path):
    wrong = QUESTIONS[2].text
    play = server(lambda request, n: says("No idea") if request["messages"][-1]["content"] == wrong else right(request))
    records = ask(play, tmp_path / "new" / "records.jsonl")
    assert [record["question"] for record in records] == [question.text for question in QUESTIONS]
    for record in records:
        known = record["question"] != wrong
        said = ANSWERS[record["question"]] if known else "No idea"
        assert record == {
            "question": record["question"], "model": "m", "protocol": "closed-book", "asked": records[0]["asked"],
            "query": None, "result": None, "answer": said, "correct": known, "n_turns": 1, "error": None,
        }  # fmt: skip
    assert sorted(map(str, lines(tmp_path / "new" / "records.jsonl"))) == sorted(map(str, records))
    request = play.requests[0]
    assert (request["model"], request["temperature"], "tools" in request) == ("m", 0, False)
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    ask(play, tmp_path / "new" / "records.jsonl", system="", max_tokens=7)  # asked in another way, so asked again
    assert [message["role"] for message in play.requests[-1]["messages"]] == ["user"]
    assert play.requests[-1]["max_tokens"] == 7
    url = f"http://127.0.0.1:{play.server_port}/api.openai.com"
    ask(play, tmp_path / "r.jsonl", QUESTIONS[:1], max_tokens=7, base_url=url)
    assert play.requests[-1]["max_completion_tokens"] == 7 and "max_tokens" not in play.requests[-1]
    share = accuracy(records)
    assert share["accuracy"] == 5 / 6 and share["standard_error"] == pytest.approx((5 / 6 * 1 / 6 / 6) ** 0.5)


def test_text_queries_are_answered_from_the_table_and_inventions_are_left_out(server, tmp_path):
    def script(request, n):
        last = request["messages"][-1]["content"]
        if last.startswith("<result>"):
            return says(last.removeprefix("<result>").removesuffix("</result>"))
        return says(f"Let me see. <query>\n{last} </query><result>an invention</result> So it is an invention")

    play = server(script)
    records = ask(play, tmp_path / "r.jsonl", protocol="text")
    for record in records:
        assert record["query"] == record["question"] and record["result"] == ANSWERS[record["question"]]
        assert record["correct"] and record["n_turns"] == 2
    system, user, request, result = next(r["messages"] for r in play.requests if len(r["messages"]) == 4)
    assert system == {"role": "system", "content": SYSTEM_PROMPT}
    assert request == {"role": "assistant", "content": f"<query>{user['content']}</query>"}
    assert result == {"role": "user", "content": f"<result>{ANSWERS[user['content']]}</result>"}
    assert accuracy(records) == {
        "accuracy": 1, "standard_error": 0, "looked_up": 1, "n_questions": 6, "n_errors": 0,
    }  # fmt: skip


def test_native_calls_are_answered_each_and_strange_ones_with_no_result(server, tmp_path):
    (question,) = QUESTIONS[:1]
    strange = [
        ("search", "{"),
        ("search", "[" * 9999),
        ("search", "[]"),
        ("search", '{"query": 3}'),
        ("find", '{"query": "x"}'),
    ]
    turns = [calls(("search", json.dumps({"query": question.text})), *strange), says(question.answer)]
    play = server(lambda request, n: turns[len(play.requests) - 1])
    (record,) = ask(play, tmp_path / "r.jsonl", [question], protocol="tools")
    assert record["correct"] and record["n_turns"] == 2 and (record["query"], record["result"]) == (None, NO_RESULT)
    first, second = play.requests
    assert first["tools"] == second["tools"] == [SEARCH] and first["messages"] == second["messages"][:2]
    said, *results = second["messages"][2:]
    assert [call["id"] for call in said["tool_calls"]] == [result["tool_call_id"] for result in results]
    assert [result["content"] for result in results] == [question.answer] + [NO_RESULT] * 5
    assert all(isinstance(json.loads(call["function"]["arguments"]), dict) for call in said["tool_calls"])


def test_half_characters_are_an_answer_like_any_other_but_cannot_be_sent(server, tmp_path):
    play = server(lambda request, n: says("\ud800 <query>\ud800</query>"))
    (record,) = ask(play, tmp_path / "r.jsonl", QUESTIONS[:1])
    assert record["answer"].startswith("\ud800") and record["error"] is None
    (record,) = ask(play, tmp_path / "r.jsonl", QUESTIONS[:1], protocol="text")
    assert record["error"].startswith("UnicodeEncodeError") and len(lines(tmp_path / "r.jsonl")) == 2


@pytest.mark.parametrize("protocol", ["text", "tools"])
def test_who_asks_for_ever_is_stopped(server, tmp_path, protocol):
    endless = {"text": says("<query>Why?</query>"), "tools": calls(("search", '{"query": "Why?"}'))}
    play = server(lambda request, n: endless[protocol])
    look_up = {"Why?": "So"}.get
    url = f"http://127.0.0.1:{play.server_port}/v1"
    endpoint = EndpointConfig(base_url=url, model="m", protocol=protocol, max_turns=3)
    (record,) = asyncio.run(ask_all(QUESTIONS[:1], endpoint, look_up, tmp_path / "r.jsonl"))
    assert (record["n_turns"], record["query"], record["result"]) == (3, "Why?", "So")
    assert (record["answer"], record["correct"], record["error"], len(play.requests)) == (None, False, None, 3)


# ---- Many at a time, and failures


def test_no_more_workers_are_made_than_there_are_questions(server, tmp_path):
    assert all(record["correct"] for record in ask(server(right), tmp_path / "r.jsonl", concurrency=10**12))


@pytest.mark.parametrize("concurrency", [1, 3])
def test_so_many_requests_are_under_way_and_no_more(server, tmp_path, concurrency):
    play = server(lambda request, n: time.sleep(0.05) or right(request))
    assert all(record["correct"] for record in ask(play, tmp_path / "r.jsonl", concurrency=concurrency))
    assert play.most_busy == concurrency and len(play.requests) == len(QUESTIONS)


@pytest.mark.parametrize("failure", [(429, {}), (500, "oops"), (200, None), (200, 1.5)])
def test_what_may_pass_is_tried_again(server, tmp_path, failure):
    play = server(lambda request, n: failure if n == 0 else right(request))
    records = ask(play, tmp_path / "r.jsonl", timeout=0.5, retries=1)
    assert all(record["correct"] and record["n_turns"] == 1 for record in records)
    assert set(play.counts.values()) == {2}


def test_waits_grow_from_one_try_to_the_next(server, tmp_path):
    play = server(lambda request, n: (200, None))
    (record,) = ask(play, tmp_path / "r.jsonl", QUESTIONS[:1], retries=2)
    assert record["error"].startswith("APIConnectionError") and record["answer"] is None
    first, second = play.times[1] - play.times[0], play.times[2] - play.times[1]
    assert 0.3 < first < second  # half a second and one, less up to a quarter


@pytest.mark.parametrize(
    "answer, error, tries",
    [
        ((500, {}), "InternalServerError", 3),
        ((400, {"error": "no such model"}), "BadRequestError: Error code: 400 no such model", 1),
        ((400, {"error": {"message": "too\nlong"}}), "BadRequestError: Error code: 400 - too long", 1),
        ((422, {"detail": ["unknown"]}), r"UnprocessableEntityError: Error code: 422 \{'detail': \['unknown'\]\}", 1),
        ((404, {}), "NotFoundError", 1),
        ((200, "<html>"), "JSONDecodeError", 1),
        ((200, '"text"'), NO_COMPLETION, 1),
        ((200, {"choices": []}), NO_COMPLETION, 1),
        (says(["in", "parts"]), NO_COMPLETION, 1),
        (
            says(None, tool_calls=[{"id": "1", "type": "custom", "custom": {"name": "search", "input": "x"}}]),
            NO_COMPLETION,
            1,
        ),
        ((200, "[" * 100_000), "RecursionError", 1),
        ((200, '{"created": ' + "9" * 10_000 + "}"), "ValueError: Exceeds the limit", 1),
        (says("x" * 2**20), "OpenAIError: the server's answer is larger than 1 MB", 1),
        ((200, gzip.compress(b" " * 2**24, mtime=0)), "OpenAIError: the server's answer is larger than 1 MB", 1),
        (calls(*[("search", "{}")] * 33), f"{NO_COMPLETION} of up to 32 calls", 1),
    ],
    ids=lambda given: str(given)[:40],
)
def test_a_failure_is_recorded_with_its_question_and_the_others_go_on(server, tmp_path, answer, error, tries):
    broken = QUESTIONS[1].text
    play = server(lambda request, n: answer if request["messages"][-1]["content"] == broken else right(request))
    records = ask(play, tmp_path / "r.jsonl", retries=2)
    (failed,) = [record for record in records if record["error"] is not None]
    assert failed == records[1]
    assert re.fullmatch(f"{error}.*", failed["error"])
    assert (failed["correct"], failed["answer"], failed["n_turns"]) == (False, None, 0)
    assert max(play.counts.values()) == tries and sum(play.counts.values()) == len(QUESTIONS) - 1 + tries
    assert accuracy(records) | {"looked_up": 0} == {
        "accuracy": 1, "standard_error": 0, "looked_up": 0, "n_questions": 5, "n_errors": 1,
    }  # fmt: skip
    assert str(accuracy(records[1:2])["accuracy"]) == "nan"


@pytest.mark.parametrize("words", ["<query>", "<query></query", "a ", "\u0301"])
def test_what_a_model_says_at_length_is_read_in_no_time(server, tmp_path, words):
    """In time that grows with the length, not with its square: all others would wait."""
    said = words * (2**20 // 2 // len(json.dumps(words)))
    started = time.process_time()
    records = ask(server(lambda request, n: says(said)), tmp_path / "r.jsonl", QUESTIONS[:1], protocol="text")
    assert records[0]["answer"] == said and time.process_time() - started < 5


def test_long_questions_are_asked_and_looked_up_like_others(server, tmp_path):
    question = QUESTIONS[0]._replace(text="the who " * 12_500)
    asking = says(f"<query>{question.text}</query>")
    play = server(lambda request, n: asking if len(request["messages"]) == 2 else says(question.answer))
    endpoint = EndpointConfig(base_url=f"http://127.0.0.1:{play.server_port}/v1", model="m", protocol="text")
    (record,) = asyncio.run(ask_all([question], endpoint, Store([question]), tmp_path / "r.jsonl"))
    assert record["result"] == question.answer and record["correct"]


def test_only_a_server_elsewhere_is_asked_through_a_proxy(server, tmp_path, monkeypatch):
    proxy = server(right)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_port}")
    ask(server(right), tmp_path / "here.jsonl")
    assert not proxy.requests
    ask(server(right), tmp_path / "elsewhere.jsonl", base_url="http://elsewhere.invalid/v1")
    assert len(proxy.requests) == len(QUESTIONS)


@pytest.mark.parametrize("proxy", ["ftp://host", "http://[::1", "http://host:99x"])
def test_a_proxy_that_cannot_be_is_one_sentence(tmp_path, monkeypatch, proxy):
    monkeypatch.setenv("http_proxy", proxy)
    endpoint = EndpointConfig(base_url="http://elsewhere.invalid/v1", model="m")
    with pytest.raises(InputError, match="^http://elsewhere.*, or the proxy in the environment, is invalid: "):
        asyncio.run(ask_all(QUESTIONS, endpoint, str, tmp_path / "r.jsonl"))


@pytest.mark.parametrize("url", ["http://[::1", "http://host:many/v1", "http://h/\x7f"])
def test_an_address_that_no_server_has_is_one_sentence(tmp_path, url):
    with pytest.raises(InputError, match=f"^{re.escape(url)}, or the proxy .* is invalid: "):
        asyncio.run(ask_all(QUESTIONS, EndpointConfig(base_url=url, model="m"), str, tmp_path / "new" / "r.jsonl"))
    assert not list(tmp_path.iterdir())


def test_a_models_files_are_read_once_however_many_are_asked(server, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("lib.finetune.endpoint.fingerprint", lambda model: read.append(model) or "its digits")
    ask(server(right), tmp_path / "r.jsonl")
    assert read == ["m"]


# ---- Going on


def test_only_what_failed_is_asked_again(server, tmp_path):
    out = tmp_path / "r.jsonl"
    failing = {question.text for question in QUESTIONS[:2]}
    play = server(lambda request, n: (400, {}) if request["messages"][-1]["content"] in failing else right(request))
    assert accuracy(ask(play, out))["n_errors"] == 2
    failing.clear()
    play.requests.clear()
    records = ask(play, out, [*QUESTIONS, QUESTIONS[0]])
    again = {request["messages"][-1]["content"] for request in play.requests}  # in what order, nobody promises
    assert len(play.requests) == 2 and again == {question.text for question in QUESTIONS[:2]}
    assert all(record["correct"] for record in records) and records[0] == records[-1] and len(lines(out)) == 8
    for other in ({"model": "other"}, {"protocol": "text"}):  # have been asked nothing
        play.requests.clear()
        ask(play, out, **other)
        ask(play, out, **other)
        assert len(play.requests) == len(QUESTIONS)


def test_what_was_answered_before_counts_by_the_key_of_today(server, tmp_path):
    out, play = tmp_path / "r.jsonl", server(lambda request, n: says("As I said"))
    assert not any(record["correct"] for record in ask(play, out))
    play.requests.clear()
    accepting = QUESTIONS[0]._replace(aliases=("as i said!",))
    key = [accepting, *QUESTIONS[1:], accepting._replace(aliases=("Not this",))]  # the last asks the same
    assert [record["correct"] for record in ask(play, out, key)] == [True] + [False] * 6
    assert not any(record["correct"] for record in ask(play, out)) and not play.requests


def test_records_are_told_apart_by_all_that_an_answer_may_depend_on(monkeypatch):
    def digest(**settings) -> str:
        as_ever = {"base_url": "http://h:1/a/v1", "model": "m", "protocol": "text"}
        return EndpointConfig(**{**as_ever, **settings}).digest_of(triviaqa)

    before = digest()
    assert before == digest(base_url="http://h:2/a/v1/", api_key="k", timeout=1, concurrency=1)
    other = [{"model": "n"}, {"protocol": "tools"}, {"system": ""}, {"max_tokens": 1}, {"max_turns": 1}]
    other += [{"base_url": "http://h:1/b/v1"}, {"base_url": "http://i:1/a/v1"}]
    monkeypatch.setattr("lib.finetune.triviaqa.SYSTEM_PROMPT", "Ask.")
    assert len({before, digest(), *(digest(**settings) for settings in other)}) == 2 + len(other)


def test_a_query_that_would_find_something_else_now_is_asked_again(server, tmp_path):
    def script(request, n):
        last = request["messages"][-1]["content"]
        return says(last[len("<result>") : -len("</result>")] if "<result>" in last else f"<query>{last}</query>")

    play, table = server(script), dict(ANSWERS)
    endpoint = EndpointConfig(base_url=f"http://127.0.0.1:{play.server_port}/v1", model="m", protocol="text")

    def said() -> list[str]:
        records = asyncio.run(ask_all(QUESTIONS, endpoint, table.get, tmp_path / "r.jsonl"))
        return [record["answer"] for record in records]

    assert said() == [*ANSWERS.values()]
    table[QUESTIONS[1].text] = "Somebody else"
    play.requests.clear()
    for _ in range(2):
        assert said() == [*table.values()] and len(play.requests) == 2  # a query and an answer, once


def test_who_ran_out_of_turns_has_not_answered_whatever_else_was_said(server, tmp_path):
    (question,), call = QUESTIONS[:1], {"name": "search", "arguments": '{"query": "Why?"}'}
    talking = says(question.answer, tool_calls=[{"id": "1", "type": "function", "function": call}])
    play = server(lambda request, n: talking)
    for _ in range(2):  # when asked, and when read from the file
        (record,) = ask(play, tmp_path / "r.jsonl", [question], protocol="tools", max_turns=2)
        assert (record["n_turns"], record["correct"], len(play.requests)) == (2, False, 2)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(part=st.floats(0, 1))
def test_a_file_cut_anywhere_is_gone_on_with(server, tmp_path, part):
    out, play = tmp_path / f"{part}.jsonl", server(right)
    whole = [json.dumps(record) for record in ask(play, tmp_path / "whole.jsonl")]
    text = "".join(f"{line}\n" for line in whole).encode()
    out.write_bytes(text[: round(part * len(text))])
    kept = out.read_bytes().count(b"\n")
    play.requests.clear()
    assert all(record["correct"] for record in ask(play, out))
    assert len(play.requests) == len(QUESTIONS) - kept
    assert Counter(record["question"] for record in lines(out)) == Counter(ANSWERS.keys())


@pytest.mark.parametrize(
    "text",
    ["# A title\n", "no newline", '{"question": "Why?"}\n', "[1]\n", '{"a": 1}', "\xe9\n", "[" * 100_000 + "\n"],
    ids=len,
)
def test_a_file_of_something_else_is_left_alone(tmp_path, text):
    out = tmp_path / "notes.md"
    out.write_text(text, encoding="latin-1")
    endpoint = EndpointConfig(base_url="http://127.0.0.1:9/v1", model="m")
    with pytest.raises(InputError, match="cannot read .*notes.md as records, name a new file: "):
        asyncio.run(ask_all(QUESTIONS, endpoint, str, out))
    assert out.read_text(encoding="latin-1") == text


@pytest.mark.parametrize("place", ["/dev/null", "pipe", "link to a pipe"])
def test_records_are_written_to_files_alone(tmp_path, place):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link to a pipe").symlink_to("pipe")
    endpoint = EndpointConfig(base_url="http://127.0.0.1:9/v1", model="m")
    with pytest.raises(InputError, match=f"cannot write records to .*{place}: a file name"):
        asyncio.run(ask_all(QUESTIONS, endpoint, str, tmp_path / place))


def test_the_command_does_not_write_records_over_its_questions(tmp_path, monkeypatch, itl):
    (tmp_path / "q.jsonl").write_text('{"question": "Why?", "answer": {"value": "So", "aliases": []}}\n')
    os.link(tmp_path / "q.jsonl", tmp_path / "r.jsonl")
    monkeypatch.chdir(tmp_path)
    given = ["--base-url", "http://127.0.0.1:9", "--model", "m", "--source", "q.jsonl", "--out", "r.jsonl"]
    answer = itl("trivia", *given)
    assert answer.code == 2 and answer.err.startswith("itl: --source and --out name the same file")


def test_a_full_disk_ends_in_one_sentence_and_what_fits_is_kept(server, tmp_path):
    play, out = server(right), tmp_path / "r.jsonl"
    with full_after(600), pytest.raises(WorkError, match="cannot write records to .*r.jsonl: File too large"):
        ask(play, out, concurrency=1)
    kept = out.read_bytes().count(b"\n")
    play.requests.clear()
    assert 0 < kept < len(QUESTIONS) and all(record["correct"] for record in ask(play, out))
    assert len(play.requests) == len(QUESTIONS) - kept


def test_a_broken_table_is_no_failure_of_the_model(server, tmp_path):
    def look_up(query):
        raise InputError("the table is gone")

    play = server(lambda request, n: says("<query>Why?</query>"))
    endpoint = EndpointConfig(base_url=f"http://127.0.0.1:{play.server_port}/v1", model="m", protocol="text")
    with pytest.raises(InputError, match="the table is gone"):
        asyncio.run(ask_all(QUESTIONS, endpoint, look_up, tmp_path / "r.jsonl"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"base_url": "localhost:8000"},
        {"base_url": "http://h/\ud800"},
        {"model": ""},
        {"protocol": "sql"},
        {"system": "\udcff"},
        {"concurrency": 0},
        {"timeout": 0.0},
        {"x": 1},
    ],
    ids=lambda wrong: ascii(wrong)[:40],
)
def test_impossible_settings_are_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        EndpointConfig(**{"base_url": "http://localhost", "model": "m"} | wrong)


def test_the_key_is_sent_but_neither_shown_nor_recorded(server, tmp_path):
    endpoint = EndpointConfig(base_url="http://localhost", model="m", api_key="secret")
    assert "secret" not in repr(endpoint) + str(endpoint)
    ask(server(right), tmp_path / "r.jsonl", api_key="secret")
    assert "secret" not in (tmp_path / "r.jsonl").read_text()
