"""A Slurm cluster of two nodes for the tests of this folder."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import Checkout
from waiting import processes, wait_for

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Path]:
    """The cluster's folder; the tests' processes talk to it."""
    folder = tmp_path_factory.mktemp("cluster")
    with (folder / "start.log").open("w") as log:  # a daemon would hold a pipe open
        code = subprocess.run([HERE / "start.sh", folder], stdout=log, stderr=log).returncode
    said = (folder / "start.log").read_text().strip()
    if code == 77:
        pytest.skip(said)
    try:
        assert code == 0, said
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            yield folder
    finally:
        subprocess.run([HERE / "stop.sh", folder], check=True)
    wait_for(lambda: not processes(f"SLURM_CONF={folder}/slurm.conf"), 30)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Checkout:
    return Checkout(tmp_path_factory.mktemp("checkout"))
