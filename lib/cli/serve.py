"""`itl serve`: lets assistants look people up (extra `serve`)."""

import asyncio
import logging
import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from lib.cli.options import ENDS, Terminal


def serve(
    file: Annotated[Path, typer.Argument(help="SQLite database of people, or a CSV file (.csv)")],
    http: Annotated[bool, typer.Option("--http", help="HTTP on this machine alone (default: stdin, stdout)")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="of --http; 0 is any free one")] = 8000,
) -> None:
    """Let assistants look people up, over the Model Context Protocol (MCP; extra `serve`)."""
    from lib.agent import server
    from lib.facts.database import as_database

    with ExitStack() as stack:

        def leave(*_) -> None:
            stack.close()
            os._exit(0)  # a thread is blocked on stdin, and Python would wait for it

        for number in (signal.SIGINT, *ENDS):
            stack.callback(signal.signal, number, signal.signal(number, leave))
        offered = server.people_server(stack.enter_context(as_database(file)))
        if http:
            listening = stack.enter_context(server.listen(port))
            work, where = server.http(offered, listening), f"http://{server.HOST}:{listening.getsockname()[1]}/mcp"
        else:
            work, where = server.stdio(offered), "stdin and stdout"
        told = Terminal(stderr=True, highlight=False, soft_wrap=True, markup=False)  # stdout carries the protocol
        told.print(f"serving {file} at {where}; Ctrl-C ends it")
        logging.disable()  # the packages log what clients say
        asyncio.run(work)
