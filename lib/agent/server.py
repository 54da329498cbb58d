"""A server that lets assistants look people up, over the Model Context Protocol (MCP; extra `serve`)."""

import asyncio
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.agent.tools import Outcome, SqlTool
from lib.base import InputError, optional

HOST = "127.0.0.1"
#: Maximum length of a name, in characters.
LONGEST_NAME = 1_000


def function_schema(name: str, description: str, properties: dict[str, dict]) -> dict[str, Any]:
    """Return the JSON schema of a function, as chat templates and OpenAI's API take it; all properties are required."""
    parameters = {"type": "object", "properties": properties, "required": [*properties]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


class Find:
    """The tool `find`: its JSON schema, how a call is read, and the sentences that report errors."""

    name, description = "find", "Look up one attribute of a person, by full name."

    def __init__(self, attributes: Sequence[str]):
        text, accepted = {"type": "string"}, f"attribute is one of {', '.join(attributes)}"
        known = {"attribute": {**text, "enum": [*attributes]}, "name": {**text, "maxLength": LONGEST_NAME}}
        self.declaration = function_schema(self.name, self.description, known)
        self.schema = self.declaration["function"]["parameters"]
        self.sentences = {  # in place of an answer
            Outcome.NO_MATCH: "Nobody of exactly this name has this attribute in the database.",
            Outcome.UNKNOWN_ATTRIBUTE: f"There is no such attribute: {accepted}.",
            Outcome.TIMEOUT: "The database took too long to answer.",
            Outcome.MALFORMED: f"The tool find takes two strings: {accepted}; name, "
            f"at most {LONGEST_NAME:,} characters.",
        }

    def query_of_call(self, call: dict[str, Any]) -> dict[str, str] | None:
        """Return the arguments `attribute` and `name` of a call, {"name", "arguments"}; None if it is malformed."""
        match call:
            case {"name": self.name, "arguments": {"attribute": str(attribute), "name": str(name)}}:
                return {"attribute": attribute, "name": name} if len(name) <= LONGEST_NAME else None
        return None


def people_server(path: str | Path):
    """Return an MCP server with one tool, `find`: `SqlTool.find_spelled`, with errors of one sentence.

    Each call opens the database anew, in a thread: calls do not wait for one another, and others can write meanwhile.
    Raises `InputError` for a database that `SqlTool` refuses, and without the package mcp.
    """
    types = optional("mcp", "serve", "serving people needs the package mcp").types
    from mcp.server import Server

    with SqlTool(path) as opened:
        find = Find(opened.attributes)
    tool = types.Tool(name=find.name, description=find.description, input_schema=find.schema)

    def answer(params: types.CallToolRequestParams) -> types.CallToolResult:
        outcome, text = Outcome.MALFORMED, find.sentences[Outcome.MALFORMED]
        try:
            if query := find.query_of_call(dict(params)):
                with SqlTool(path) as sql:
                    outcome, text = sql.find_spelled(**query)
                text = Find(sql.attributes).sentences.get(outcome, text)  # the file may be a new one
        except Exception as error:  # this call failed, but the next one may succeed
            outcome, text = None, f"{error}."
        content = types.TextContent(type="text", text=text)
        return types.CallToolResult(content=[content], is_error=outcome is not Outcome.ANSWER)

    async def tools(*_) -> types.ListToolsResult:
        return types.ListToolsResult(tools=[tool])

    return Server("people", on_list_tools=tools, on_call_tool=lambda _, params: asyncio.to_thread(answer, params))


async def stdio(server) -> None:
    """Serve one client at the standard input and output until it leaves. Raises `InputError` where these are closed."""
    from mcp.server.stdio import stdio_server

    if not (sys.stdin and sys.stdout):
        raise InputError("there is no standard input or output: an MCP client opens both, --http needs neither")
    try:
        async with stdio_server() as streams:
            await server.run(*streams, server.create_initialization_options())
    except* OSError:  # the client left before its answer came
        pass


def listen(port: int) -> socket.socket:
    """Listen on a port of this machine alone; 0 is any free one. Raises `InputError` if that is not possible."""
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        reason = os.strerror(error.errno)
        raise InputError(f"cannot listen on port {port} of {HOST} ({reason}): give another with --port") from None


async def http(server, listening: socket.socket) -> None:
    """Serve clients at /mcp until a signal. On loopback, mcp refuses requests to other hosts and from other sites."""
    import uvicorn

    app = server.streamable_http_app(host=HOST, stateless_http=True, json_response=True)
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1)
    await uvicorn.Server(config).serve([listening])
