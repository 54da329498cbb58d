"""For tests of chat models: a server of them."""

import threading
from collections.abc import Callable, Iterator

import pytest
from chat_server import Scripted


@pytest.fixture
def server() -> Iterator[Callable[[Callable], Scripted]]:
    """A function that starts a server with a script."""
    started = []

    def start(script: Callable) -> Scripted:
        started.append(Scripted(script))
        threading.Thread(target=started[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return started[-1]

    yield start
    for one in started:
        one.shutdown()
        one.server_close()
