"""What the README promises of one model, through the command line and real processes."""

import json
import subprocess
import sys

import pytest

from lib import paths


def itl(*arguments: str) -> str:
    command = [sys.executable, "-m", "lib", *arguments]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)  # minutes of training, on whatever machine
@pytest.mark.parametrize("mode", ["in-weight", "in-tool"])
def test_a_model_of_64_people_recalls_all_their_facts_and_really_asks_if_it_has_a_tool(mode, tmp_path):
    run = str(tmp_path / mode)
    itl("train", "--mode", mode, "--people", "64", "--d-model", "32", "--out", run)
    row = json.loads((tmp_path / mode / "row.json").read_text())
    assert row["n_questions"] == 256
    assert row["recall"] == 1.0
    asked = itl("recall", run)
    assert "recall 1.0000 on 256 questions" in asked
    assert ("256 queries to" in asked) == (mode == "in-tool")
