"""People as a server of the Model Context Protocol (MCP), which assistants speak (extra `serve`)."""

import asyncio
import os
import socket
import sys
from pathlib import Path

from lib.agent.tools import Outcome, Response, SqlTool
from lib.base import InputError

HOST = "127.0.0.1"
#: Maximum length of a name, in characters.
LONGEST_NAME = 1_000


def people_server(path: str | Path):
    """Return an MCP server with one tool, `find`: it answers as `SqlTool.find` does, or with an error of one sentence.

    Each call opens the database anew, in a thread: calls do not wait for one another, and others can write meanwhile.
    Raises `InputError` for a database that `SqlTool` refuses, and without the package mcp.
    """
    try:
        from mcp import types
        from mcp.server import Server
    except ImportError:
        raise InputError("serving people takes the package mcp: pip install -e '.[serve]'") from None
    with SqlTool(path) as opened:
        attributes = list(opened.attributes)
    known = {"attribute": {"type": "string", "enum": attributes}, "name": {"type": "string", "maxLength": LONGEST_NAME}}
    schema = {"type": "object", "properties": known, "required": list(known)}
    tool = types.Tool(name="find", description="Look up one attribute of a person, by full name.", input_schema=schema)
    accepted = f"attribute is one of {', '.join(attributes)}"
    sentences = {
        Outcome.NO_MATCH: "Nobody of exactly this name has this attribute in the database.",
        Outcome.UNKNOWN_ATTRIBUTE: f"There is no such attribute: {accepted}.",
        Outcome.TIMEOUT: "The database took too long to answer.",
        Outcome.MALFORMED: f"The tool find takes two strings: {accepted}; name, at most {LONGEST_NAME:,} characters.",
    }

    def find(attribute: str, name: str) -> Response:
        with SqlTool(path) as sql:
            return sql.find(attribute, name)

    async def call(_, params: types.CallToolRequestParams) -> types.CallToolResult:
        outcome, text = Outcome.MALFORMED, ""
        match params.name, params.arguments:
            case "find", {"attribute": str(attribute), "name": str(name)} if len(name) <= LONGEST_NAME:
                try:
                    outcome, text = await asyncio.to_thread(find, attribute, name)
                except Exception as error:  # this call failed, but the next one may succeed
                    outcome, text = None, f"{error}."
        content = types.TextContent(type="text", text=sentences.get(outcome, text))
        return types.CallToolResult(content=[content], is_error=outcome is not Outcome.ANSWER)

    async def tools(*_) -> types.ListToolsResult:
        return types.ListToolsResult(tools=[tool])

    return Server("people", on_list_tools=tools, on_call_tool=call)


async def stdio(server) -> None:
    """Serve one client at the standard input and output until it leaves. Raises `InputError` where these are closed."""
    from mcp.server.stdio import stdio_server

    if not (sys.stdin and sys.stdout):
        raise InputError("there is no standard input or output: an MCP client opens both, --http takes neither")
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
