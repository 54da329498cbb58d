"""A checkout of the project that tests may change, and `itl` run in it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lib.paths import ROOT

#: Appended to the checkout's modules. Each step takes a while and says so in the job's log.
SLOW_STEPS = """
import os
import time


def _slow(self, advance=Monitor.advance):
    time.sleep(float(os.environ.get("STEP_SECONDS", 0)))
    print("a step", flush=True)
    advance(self)

Monitor.advance = _slow
"""
TWELVE_RUNS = """
_searches = searches


def searches(source, profile, *arguments):
    if (source, profile) != ("05_3", "smoke"):
        return _searches(source, profile, *arguments)
    values = {"facts": {"n_people": 2}, "training": {"steps": 20}, "evaluation": {"every": None}}
    return [Search(RunConfig.parse(values | {"seed": seed}), threshold=None, sizes=(4,)) for seed in range(12)]
"""


class Checkout:
    """A git checkout of the project, its results, and `itl` run in it."""

    def __init__(self, folder: Path):
        self.folder, self.runs = folder / "project", folder / "runs"
        for name in ("lib", "notebooks", "paper_data"):
            shutil.copytree(ROOT / name, self.folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        self.append("training/monitor", SLOW_STEPS)
        self.append("experiments/plan", TWELVE_RUNS)
        self.git("init", "--quiet")
        self.git("add", "--all")
        self.git("-c", "user.name=A Test", "-c", "user.email=test@localhost", "commit", "--quiet", "--message=A test")

    def append(self, module: str, code: str) -> None:
        with (self.folder / "lib" / f"{module}.py").open("a") as file:
            file.write(code)

    @contextmanager
    def edited(self, module: str, code: str) -> Iterator[None]:
        """Add code to a module for a while."""
        self.append(module, code)
        try:
            yield
        finally:
            self.git("checkout", "--quiet", "lib")

    def git(self, *arguments: str) -> str:
        command = ["git", "-C", str(self.folder), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def itl(self, *arguments: Any, step_seconds: float = 0) -> str:
        """Run `itl` and return what it prints; a failure fails the test."""
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "ITL_RUNS": str(self.runs)}
        environment |= {"STEP_SECONDS": str(step_seconds), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "lib", *map(str, arguments)]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *arguments: Any, **options: Any) -> str:
        """Run `itl submit` and return the name of the submission."""
        return self.itl("submit", *arguments, **options).split()[1].rstrip(":")
