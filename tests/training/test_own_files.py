"""A run's folder reads nothing outside itself: its own copy of a file, or one sentence."""

import json

import pytest
from vocabularies import train_bpe, write_tokenizer_json

from lib import paths
from lib.base import InputError
from lib.config import RunConfig
from lib.dialogs.tokenizers import load_tokenizer
from lib.training.run import run
from lib.training.saved import load_model, open_conversation, read_claim, read_people
from lib.training.watch import evaluate_checkpoints

PEOPLE = "name,pet\nAnn Lee,cat\nBob Ray,dog\n"


@pytest.fixture
def folder(tmp_path):
    """The folder of a finished run whose people and tokenizer are in files beside it, which still exist."""
    (tmp_path / "pets.csv").write_text(PEOPLE)
    write_tokenizer_json(tmp_path / "words.json", train_bpe())
    tokenizer = str(tmp_path / "words.json")
    config = RunConfig.parse({
        "facts": {"csv": str(tmp_path / "pets.csv")},
        "tokenizer": tokenizer,
        "model": {"d_model": 4, "vocab_size": load_tokenizer(tokenizer).vocab_size},
        "training": {"steps": 1},
        "evaluation": {"every": None},
    })  # fmt: skip
    run(config, tmp_path / "run")
    return tmp_path / "run"


def test_copies_are_read_and_originals_are_not(folder):
    for original in ("pets.csv", "words.json"):
        (folder.parent / original).unlink()
    with open_conversation(folder, device="cpu") as talk:
        assert talk.people.names == ["Ann Lee", "Bob Ray"]
    assert len(list(evaluate_checkpoints(folder, "cpu"))) == 1


def test_a_copy_that_has_changed_is_other_people(folder):
    (folder / paths.PEOPLE).write_text(PEOPLE.replace("cat", "eel"))
    with pytest.raises(InputError, match=r"was trained on other people than .*people\.csv gives now"):
        next(evaluate_checkpoints(folder, "cpu"))
    assert not (folder / "evaluations.jsonl").exists()


@pytest.mark.parametrize("copy", [paths.PEOPLE, f"{paths.TOKENIZER}.json"])
def test_without_its_copy_a_run_does_not_read_what_its_configuration_names(copy, folder):
    (folder / copy).unlink()
    reads = [lambda: list(evaluate_checkpoints(folder, "cpu"))]
    if copy == paths.PEOPLE:
        reads.append(lambda: read_people(folder, load_model(folder, "cpu")[1]))
    else:
        reads += [lambda: load_model(folder, "cpu"), lambda: load_model(folder / paths.MODEL, "cpu")]
    for read in reads:
        with pytest.raises(InputError, match=f"(cannot read people from |tokenizer = '){folder / copy}"):
            read()


@pytest.mark.parametrize("threads", ["x", 0, 1.5, [1], 10**9])
def test_a_claim_of_impossible_threads_is_no_claim(threads, tmp_path):
    claim = {"config": {}, "people_digest": "0" * 16, "threads": threads}
    (tmp_path / paths.CLAIM).write_text(json.dumps(claim))
    with pytest.raises(InputError, match="is not the folder of a run"):
        read_claim(tmp_path)
