"""Where a number comes from: machine, versions, commit."""

import platform
import subprocess
from datetime import UTC, datetime
from functools import cache

from lib import paths

#: File in the root of a copy of the code that names the copied commit.
COMMIT = "COMMIT"


def provenance(device) -> dict:
    """Return the columns of a row that say where its numbers come from; device: the torch.device that made them."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }


@cache
def commit() -> str:
    """Return the commit of the code, marked `-dirty` if lib differs from it; `unknown` outside a git checkout of it.

    A copy of the code (`lib.slurm.submissions.snapshot`) has a file that says what it was copied from. A copy without
    one may lie in the checkout of something else, whose commit says nothing about it.
    """
    if (paths.ROOT / COMMIT).exists():
        return (paths.ROOT / COMMIT).read_text(encoding="utf-8").strip()
    try:
        if not paths.ROOT.samefile(_git("rev-parse", "--show-toplevel")) or not _git("ls-files", "--", "lib"):
            return "unknown"
        head = _git("rev-parse", "HEAD")
        return f"{head}-dirty" if _git("status", "--porcelain", "--", "lib") else head
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(paths.ROOT), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()
