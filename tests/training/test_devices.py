"""Cores and memory that a process may use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lib import paths
from lib.training import devices


def test_as_many_cores_as_the_process_may_use(monkeypatch):
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    code = "from lib.training.devices import usable_cores; print(usable_cores())"
    environment = {**os.environ, "PYTHONPATH": str(paths.ROOT)}
    command = ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0))), sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
    assert 1 <= devices.usable_cores() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("given", "cores"), [("3", 3), ("64", 16), ("0", 1), ("many", 16)])
def test_slurm_says_how_many_cores_a_process_may_use(monkeypatch, given, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(devices, "_quotas", lambda _: iter(()))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", given)
    assert devices.usable_cores() == cores


@pytest.mark.parametrize(
    ("group", "files", "quotas"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, [1.5]),  # in a container
        ("0::/\n", {"cpu.max": "max 100000\n"}, []),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n", "cpu.max": "7 1\n"}, [2, 7]),
        ("0::/a\n", {}, []),
        ("2:cpu:/a\n0::/b\n", {"b/cpu.max": "3 1", "a/cpu.max": "2 1"}, [3]),  # beside groups of version 1
        (None, {}, []),
    ],
)  # fmt: skip
def test_quotas_of_cpu_time_are_read_as_linux_writes_them(tmp_path, group, files, quotas):
    _write(tmp_path, group, files)
    assert list(devices._quotas(tmp_path)) == quotas


def _write(root: Path, group: str | None, files: dict[str, str]) -> None:
    """Write the files of control groups as Linux would."""
    written = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, content in (written if group is None else written | {"proc/self/cgroup": group}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
