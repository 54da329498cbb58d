"""Libraries that take seconds to import are loaded only by who needs them: a question for help need not wait."""

import json
import os
import shutil
import subprocess
import sys

from finished import FINISHED

from lib import paths
from lib.experiments.plan import searches

SERVER = ["--base-url", "http://127.0.0.1:9/v1", "--model", "none"]
#: In one process, the strictest first: commands, and what must not have been imported after them.
STEPS = [
    (
        [["sweep", "05_1", "--profile", "smoke"], ["sweep", "05_2", "--profile", "paper", "--dry-run"]],
        ["torch", "transformers", "matplotlib", "pandas", "numpy"],
    ),
    ([["compare", "05_1"]], ["torch", "transformers", "matplotlib"]),
    (
        [
            ["--help"],
            ["submit", "train", "--help"],
            ["status"],  # which finds no Slurm
            ["data", "--out", "x.sqlite"],
            ["ask", *SERVER, "--people", "people.csv"],
            ["trivia", *SERVER, "--retries", "0", "--limit", "1"],
            *(["sweep", section, "--profile", "laptop", "--dry-run"] for section in ("05_1", "06", "07_1", "07_2")),
        ],
        ["torch", "transformers"],
    ),
]
CODE = f"""
import sys
from pathlib import Path
from lib import paths, progress, provenance
from lib.cli import app
paths.PAPER_DATA = Path("paper_data").resolve()
for commands, libraries in {STEPS}:
    for command in commands:
        sys.argv = ["itl", *command]
        try:
            app.main()
        except SystemExit as end:
            assert end.code != 2 or command == ["status"], command
        assert not set(libraries) & set(sys.modules), (command, set(libraries) & set(sys.modules))
from lib.finetune import bases, config, experiments
experiments.plan("paper")
from lib.figures import ask, record
[record.draw(name) for name in ("parameter_bounds", "generalization")]
import pandas
from lib.experiments import scale_tables
from lib.figures import scale
scale_tables.comparable(pandas.DataFrame())
assert not {{"torch", "transformers", "datasets", "peft", "trl", "lm_eval"}} & set(sys.modules), "figures"
"""


def test_planning_asking_and_drawing_import_no_more_than_they_need(tmp_path):
    shutil.copytree(paths.PAPER_DATA, tmp_path / "paper_data")
    (tmp_path / "people.csv").write_text("name,job\nAnn Lee,baker\n")
    for config in (config for search in searches("05_1", "smoke") for config in search.pending({})):
        row = tmp_path / "runs" / "smoke" / "05_1" / config.run_id / "row.json"
        row.parent.mkdir(parents=True)
        row.write_text(json.dumps(FINISHED | {"run_id": config.run_id, "config": config.canonical_json()}))
    environment = {**os.environ, "PYTHONPATH": str(paths.ROOT), "ITL_RUNS": str(tmp_path / "runs")}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
