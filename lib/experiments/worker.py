"""One run of a sweep: `python -m lib.experiments.worker CONFIG FOLDER DEVICE`, as `lib.experiments.sweep` starts it."""

import json
import os
import signal
import sys
from pathlib import Path
from threading import Thread

from lib.config import RunConfig


def attempt(config: RunConfig, directory: Path, device: str, description: str | None = None) -> str | None:
    """Do one run; return the error that ended it, in one line, or None if it has its row now. Raises `Preempted`."""
    from lib.training.distributed import Preempted
    from lib.training.run import run

    try:
        run(config, directory, device=device, description=description)
    except Preempted:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:2000]


def _leave_with_the_sweep() -> None:
    os.read(sys.stdin.fileno(), 1)  # nothing is ever written: it returns when the sweep has ended
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the sweep, which asks its runs to leave
    Thread(target=_leave_with_the_sweep, daemon=True).start()
    config, directory, device = sys.argv[1:]
    sys.exit(attempt(RunConfig.parse(json.loads(config)), Path(directory), device))
