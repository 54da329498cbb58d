"""Runs trained on one and two hops, and asked up to three."""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted import DATABASE, END, says, turn

from lib import paths
from lib.config import RunConfig
from lib.dialogs.chains import chain_dialog, chain_question, chains
from lib.dialogs.templates import Role
from lib.dialogs.tokenizers import ByteTokenizer
from lib.experiments import chains as experiment
from lib.experiments.chains import (
    configurations,
    recall_by_hops,
    rows,
    sweep,
    write_inputs,
)
from lib.facts.csv import read_people_csv
from lib.facts.people import FactsConfig
from lib.facts.sampling import sample_people, with_bosses
from lib.model.chain_circuit import ChainCircuit
from lib.model.circuit import Circuit


def smoke() -> RunConfig:
    return configurations("smoke")[0]


def test_the_dialogs_of_each_number_of_hops_are_the_same_share():
    training = smoke().training
    assert [*training.files.values()] == [0.5] == [training.questions]


def test_the_inputs_of_a_run_are_people_with_bosses_and_their_dialogs(tmp_path):
    config = smoke()
    inputs = write_inputs(config, tmp_path / "a")
    people = read_people_csv(inputs["people.csv"])
    assert people == with_bosses(sample_people(4))
    lines = [json.loads(line) for line in open(inputs["dialogs_2.jsonl"], encoding="utf-8")]
    assert lines == [[list(turn) for turn in chain_dialog(chain)] for chain in chains(people, 2)]
    for name, path in write_inputs(config, tmp_path / "b").items():
        assert open(path, "rb").read() == open(inputs[name], "rb").read()


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Iterator[Path]:
    """The runs of the smoke profile, asked one question of each kind."""
    folder = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ITL_RUNS", str(folder))
        patch.setattr(experiment, "MOST_ASKED", 1)
        assert sweep("smoke").done_now == 1
        yield folder


@pytest.fixture
def done(swept, tmp_path, monkeypatch) -> Path:
    """A copy of these runs, as the folder of runs."""
    monkeypatch.setenv("ITL_RUNS", str(tmp_path / "runs"))
    return shutil.copytree(swept, tmp_path / "runs")


def test_a_run_is_asked_about_each_number_of_hops_and_is_not_repeated(done):
    (row,) = rows("smoke").to_dict("records")
    assert {f"{group}_{hops}": row[f"{group}_{hops}"] for group in ("trained", "unseen") for hops in (1, 2, 3)} == (
        dict.fromkeys(["trained_1", "trained_2", "trained_3", "unseen_1", "unseen_2", "unseen_3"], 0.0)
    )  # after five steps
    assert (row["hops"], row["steps"], row["run_id"]) == ([1, 2], 5, smoke().run_id)
    assert {"commit", "measured_commit", "finished_at", "torch", "device", "seed", "config"} <= set(row)
    (file,) = done.glob(f"smoke/07_2/*/{paths.ROWS}")
    written = file.stat().st_mtime_ns
    assert (sweep("smoke").done_before, rows("smoke").to_dict("records")) == (1, [row])
    assert file.stat().st_mtime_ns == written
    file.unlink()  # killed after training: it is measured again
    sweep("smoke")
    assert rows("smoke").finished_at[0] == row["finished_at"]


def test_a_committed_row_is_not_made_again_and_reads_as_a_fresh_one(done, monkeypatch, tmp_path):
    fresh = rows("smoke")
    monkeypatch.setattr(paths, "PAPER_DATA", tmp_path)
    fresh.to_csv(tmp_path / "chains.csv", index=False)
    monkeypatch.setenv("ITL_RUNS", str(tmp_path / "elsewhere"))
    assert sweep("smoke").done_before == 1
    committed = rows("smoke")
    assert not (tmp_path / "elsewhere").exists() and not committed.superseded[0]
    assert committed.trained_1[0] == fresh.trained_1[0]
    assert str(committed.hops[0]) == str(fresh.hops[0]) == "[1, 2]"


@pytest.mark.parametrize(("circuit", "most"), [(ChainCircuit, 3), (Circuit, 1)])
def test_recall_by_hops_of_models_set_by_hand(circuit, most):
    people = with_bosses(sample_people(20, 1), 1)
    recall = recall_by_hops(circuit().model(), FactsConfig(n_people=20, seed=1), people, ByteTokenizer(), 1)
    assert recall.pop("trained_3_as_2") == 0
    assert recall == {f"{group}_{hops}": float(hops <= most) for group in ("trained", "unseen") for hops in (1, 2, 3)}


def test_answers_that_leave_out_the_last_hop_are_counted():
    people, replies = with_bosses(sample_people(20, 1), 1), defaultdict(list)
    for asked, shorter in zip(chains(people, 3), chains(people, 2), strict=True):
        said = [text for role, text in chain_dialog(shorter) if role == Role.ASSISTANT]
        replies[chain_question(asked)] = [
            turn(text, then) for text, then in zip(said, [DATABASE] * 2 + [END], strict=True)
        ]
    recall = recall_by_hops(says(replies), FactsConfig(n_people=20, seed=1), people, ByteTokenizer(), 2)
    assert (recall["trained_3"], recall["trained_3_as_2"]) == (0, 1)


def test_every_profile_has_its_runs_one_a_seed():
    for profile, n_seeds in zip(paths.PROFILES, (1, 1, 3, 10), strict=True):
        runs = configurations(profile)
        assert len({config.run_id for config in runs}) == len(runs) == n_seeds
        assert [config.facts.seed for config in runs] == [config.seed for config in runs] == [*range(len(runs))]


def test_a_profile_gives_its_finished_runs_and_trains_none_unless_told_to(done, monkeypatch, tmp_path):
    finished = rows("smoke")
    assert (finished.profile[0], finished.steps[0]) == ("smoke", 5)
    assert "nothing is missing" in str(sweep("smoke", dry_run=True)) and rows("smoke").equals(finished)
    monkeypatch.setenv("ITL_RUNS", str(tmp_path / "empty"))
    for idle in ({"dry_run": True}, {"max_hours": 0}):
        assert "about 1 runs ahead" in str(sweep("smoke", **idle)) and len(rows("smoke")) == 0
    assert not (tmp_path / "empty").exists()
