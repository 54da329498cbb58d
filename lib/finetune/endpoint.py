"""A chat model behind any server that speaks OpenAI's chat-completions protocol, asked many questions at a time."""

import asyncio
import hashlib
import json
import os
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError
from openai.types.chat import ChatCompletionMessage
from pydantic import Field, ValidationError

from lib import paths
from lib.base import Config, InputError, to_json
from lib.finetune import triviaqa
from lib.finetune.bases import fingerprint
from lib.finetune.config import ChatMode
from lib.progress import progress

Protocol = Literal["closed-book", "text", "tools"]

#: Without a tool, with the textual queries of `lib.finetune.triviaqa`, or with the server's function calls.
PROTOCOLS: dict[Protocol, ChatMode] = {"closed-book": "in-weight", "text": "in-tool-text", "tools": "in-tool"}
#: Maximum bytes of a server's answer, and function calls in one.
LARGEST, MOST_CALLS = 1 << 20, 32


class EndpointConfig(Config):
    """The model, its server, and how it is queried.

    The `openai` client repeats a request up to `retries` times, waiting longer each time, if the connection fails, is
    silent for `timeout` seconds, or the server says that it is busy or broken. Other refusals are final.
    """

    base_url: str = Field(pattern=r"^https?://\S+$", max_length=2_000)
    model: str = Field(min_length=1)
    api_key: str = Field("none", pattern="^[!-~]([ -~]*[!-~])?$", repr=False)  # as HTTP takes it
    protocol: Protocol = "tools"
    system: str = Field("Answer in a few words, without a sentence around them.", max_length=100_000)  # "" for none
    max_tokens: int = Field(128, ge=1)  # of one turn
    max_turns: int = Field(4, ge=1)  # of the model, for one question
    concurrency: int = Field(8, ge=1)
    timeout: float = Field(60.0, gt=0)
    retries: int = Field(5, ge=0)

    def digest_of(self, task: Any) -> str:
        """Return 8 hexadecimal digits of all that an answer depends on, except the question and the tool's result."""
        how = self.model_dump_json(include={"model", "protocol", "system", "max_tokens", "max_turns"})
        told = json.dumps(task.opening("", PROTOCOLS[self.protocol]))
        server = urlsplit(self.base_url)  # without its port
        where = server.hostname, server.path.rstrip("/"), fingerprint(self.model)
        return hashlib.sha256(f"{how} {told} {where}".encode()).hexdigest()[:8]


async def ask_all(
    questions: Sequence[Any],
    endpoint: EndpointConfig,
    look_up: Callable[[Any], str],
    out: str | Path,
    description: str | None = None,
    task: Any = triviaqa,
) -> list[dict]:
    """Ask all questions, `endpoint.concurrency` at a time, and return a record of each, in their order.

    A record holds `question`, `model`, `protocol`; `asked`, a digest of server, model, system prompt and limits; the
    last `query` and its `result`, None without one; all `calls` as [query, result], if any; `answer`, the first
    turn without a query, None if the turns ran out before; whether it is `correct`; `n_turns`; and `error`, or None.

    task: how a model asks its tool and which answers are right, as `lib.finetune.triviaqa` has it. look_up: answers a
    query, which is JSON, as a `Store` does. out: a file of JSON lines to which each record is added. Questions with an
    error-free record of the same `asked` are skipped, unless a query would now find something else; old answers are
    graded against today's `questions`. Raises `InputError` if `out` is no file of records, or an address is not valid.
    """
    limits = {"timeout": endpoint.timeout, "max_retries": endpoint.retries}
    try:
        is_here = urlsplit(endpoint.base_url).hostname in ("localhost", "127.0.0.1", "::1")  # reached without a proxy
        http = DefaultAsyncHttpxClient(trust_env=not is_here, event_hooks={"response": [_bound]})
        client = AsyncOpenAI(http_client=http, base_url=endpoint.base_url, api_key=endpoint.api_key, **limits)
    except Exception as error:  # each cause raises another type
        raise InputError(f"{endpoint.base_url}, or the proxy in the environment, is invalid: {error}") from None
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    out, asked = paths.check_output(Path(out), "records to "), endpoint.digest_of(task)
    key = {question.text: question for question in questions}
    done = _finished(out, asked, key, look_up, task)
    waiting = [text for text in key if text not in done]

    async def work() -> None:
        while waiting:  # shared by all workers: each takes the next
            text = waiting.pop(0)
            done[text] = await _ask(client, endpoint, text, look_up, task, asked)
            print(to_json(done[text] | task.grade(done[text], key[text])), file=file, flush=True)
            bar.update(1)

    with paths.writing(out, "records to "), out.open("a", encoding="utf-8") as file:
        async with client:
            with progress(len(waiting), description) as bar:
                await asyncio.gather(*(work() for _ in range(min(endpoint.concurrency, len(waiting)))))
    return [done[question.text] | task.grade(done[question.text], question) for question in questions]


def _finished(out: Path, asked: str, key: dict[str, Any], look_up: Callable[[Any], str], task: Any) -> dict[str, dict]:
    """Return the records that `ask_all` need not ask for again, by question; remove a truncated last line."""
    *lines, cut = (out.read_bytes() if out.exists() else b"").split(b"\n")
    with paths.reading(f"{out} as records, name a new file", AttributeError, KeyError, TypeError):
        records = [r for r in map(json.loads, lines) if r["error"] is None and r["asked"] == asked]
        finished = {
            text: record | task.grade(record, question)
            for text, record in {record["question"]: record for record in records}.items()
            if (question := key.get(text))
            and all(query is None or look_up(query) == result for query, result in record.get("calls", []))
        }
        if not cut.startswith(b'{"question": '[: len(cut)]):
            raise ValueError("its last line is no record")
    if cut:
        os.truncate(out, out.stat().st_size - len(cut))
    return finished


async def _ask(
    client: AsyncOpenAI, endpoint: EndpointConfig, question: str, look_up: Callable[[Any], str], task: Any, asked: str
) -> dict[str, Any]:
    """Return the record of one question, not graded yet."""
    record = {"question": question, "model": endpoint.model, "protocol": endpoint.protocol, "asked": asked}
    record |= {"query": None, "result": None, "answer": None, "correct": False, "n_turns": 0, "error": None}
    # Ollama knows only the old name of the limit, OpenAI's newer models only the new one.
    limit = "max_completion_tokens" if re.search(r"\.openai\.|azure\.com", endpoint.base_url) else "max_tokens"
    request = {"model": endpoint.model, "temperature": 0, limit: endpoint.max_tokens}
    request |= task.opening(question, mode := PROTOCOLS[endpoint.protocol])
    messages = request["messages"]
    if endpoint.system and endpoint.protocol != "text":
        messages.insert(0, {"role": "system", "content": endpoint.system})
    try:
        while record["n_turns"] < endpoint.max_turns:
            message = _message(await client.chat.completions.create(**request))
            record["n_turns"] += 1
            if endpoint.protocol == "tools":
                queries = [_query(call, task) for call in message.tool_calls or ()]
            else:
                query = task.read_query(message.content or "", mode)
                queries = [] if query is None else [query]
            if not queries:
                record["answer"] = message.content or ""
                break
            results = [task.NO_RESULT if query is None else look_up(query) for query in queries]
            record |= {"query": queries[-1], "result": results[-1]}
            record.setdefault("calls", []).extend(map(list, zip(queries, results, strict=True)))
            if endpoint.protocol == "tools":
                messages.append(message.model_dump(include={"role", "tool_calls"}) | {"content": message.content or ""})
                answers = zip(message.tool_calls, results, strict=True)
                messages += [{"role": "tool", "tool_call_id": call.id, "content": text} for call, text in answers]
            else:  # drop what the model wrote after its request, perhaps an invented result
                messages += task.look_up_turns(queries[0], results[0], mode)
    except InputError:  # the table cannot be read
        raise
    except Exception as error:  # whatever the server says, only this question fails
        body = getattr(error, "body", None)
        said = "" if isinstance(body, dict) and "message" in body else body or error.__cause__ or ""  # in str(error)
        record["error"] = " ".join(f"{type(error).__name__}: {error} {said}".split())[:300]
    return record


async def _bound(response: Any) -> None:
    """Limit a response to `LARGEST` bytes, decompressed; more is an OpenAIError."""
    read = response.aiter_bytes

    async def parts(*size) -> AsyncIterator[bytes]:
        n_bytes = 0
        async for part in read(*size):
            n_bytes += len(part)
            if n_bytes > LARGEST:
                raise OpenAIError(f"the server's answer is larger than {LARGEST >> 20} MB")
            yield part

    response.aiter_bytes = parts


def _message(completion: Any) -> ChatCompletionMessage:
    """Return what the model said. Raises OpenAIError if the server's answer is no chat completion."""
    with suppress(AttributeError, LookupError, TypeError, ValidationError):  # the client accepts any JSON
        message = ChatCompletionMessage.model_validate(completion.choices[0].message.model_dump(warnings=False))
        calls = message.tool_calls or ()
        if len(calls) <= MOST_CALLS and all(call.type == "function" for call in calls):  # nothing else was offered
            return message
    raise OpenAIError(f"the server's answer is not a chat completion of up to {MOST_CALLS} calls")


def _query(call: Any, task: Any) -> Any:
    with suppress(ValueError, RecursionError):
        asked = {"name": call.function.name, "arguments": json.loads(call.function.arguments)}
        if (query := task.query_of_call(asked)) is not None:
            return query
    call.function.arguments = "{}"  # it is sent back: servers parse it again, and some fail on invalid JSON


def accuracy(records: Sequence[dict]) -> dict[str, float]:
    """Return the share of correct answers and its standard error, over the `n_questions` without an error.

    Also `looked_up`, the share of these for which the model asked the tool, and `n_errors`. Shares of none are NaN.
    """
    answered = [record for record in records if record["error"] is None]
    n = len(answered) or float("nan")
    share = sum(record["correct"] for record in answered) / n
    return {
        "accuracy": share,
        "standard_error": (share * (1 - share) / n) ** 0.5,
        "looked_up": sum(record["query"] is not None for record in answered) / n,
        "n_questions": len(answered),
        "n_errors": len(records) - len(answered),
    }
