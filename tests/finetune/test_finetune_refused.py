"""What a fine-tuning refuses, before its folder is claimed, and how one ends that diverges."""

import json
import os
import re
import subprocess
import sys

import pytest

from lib.base import InputError, WorkError
from lib.finetune import train
from lib.finetune.capability import HELLASWAG
from lib.finetune.config import FinetuneConfig
from lib.finetune.train import finetune

SMALL = {"base": "random", "n_facts": 8, "steps": 2, "batch_size": 4, "questions": 4, "unseen_people": 4, "prompts": 2,
         "capability": "none", "dtype": "float32", "max_length": 2000, "lr": 1e-2}  # fmt: skip
ITEM = {"activity_label": "Painting", "ctx_a": "A man sits.", "ctx_b": "he", "endings": [*"abcd"], "label": "3"}
DAMAGE = {
    "no JSON": "{",
    "a list": "[1]",
    "a cut line": json.dumps(ITEM)[:-9],
    "a label out of range": json.dumps(ITEM | {"label": "4"}),
    "a label that is no number": json.dumps(ITEM | {"label": "x"}),
    "no label": json.dumps({name: value for name, value in ITEM.items() if name != "label"}),
    "three endings": json.dumps(ITEM | {"endings": [*"abc"]}),
    "an ending that is no text": json.dumps(ITEM | {"endings": ["a", "b", "c", 4]}),
    "a context that is null": json.dumps(ITEM | {"ctx_b": None}),
    "no UTF-8": "\udcff",
}


def _refuses(config: FinetuneConfig, directory, match: str) -> None:
    with pytest.raises(InputError, match=match):
        finetune(config, directory, description=None)
    assert not directory.parent.exists()


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_item_of_hellaswag_is_one_sentence_before_the_folder_is_claimed(how, tmp_path, monkeypatch):
    file = tmp_path / "items.jsonl"
    file.write_text(f"{json.dumps(ITEM)}\n{json.dumps(ITEM)}\n{DAMAGE[how]}\n", errors="surrogateescape")
    monkeypatch.setenv(HELLASWAG, str(file))
    config = FinetuneConfig(**SMALL | {"capability": "any"})
    _refuses(config, tmp_path / "new" / "run", f"^cannot read {file}, .*: line 3: .*a line is an item as JSON")


def test_a_file_without_items_is_refused_too(tmp_path, monkeypatch):
    file = tmp_path / "items.jsonl"
    monkeypatch.setenv(HELLASWAG, str(file))
    for content in ("", "\n \n"):
        file.write_text(content)
        config = FinetuneConfig(**SMALL | {"capability": "hellaswag"})
        _refuses(config, tmp_path / "new" / "run", "line 1: .*a line is an item as JSON")


def test_a_refused_fine_tuning_leaves_no_folder(tmp_path):
    _refuses(FinetuneConfig(**SMALL | {"n_facts": 7}), tmp_path / "new" / "run", "n_facts|facts")
    _refuses(FinetuneConfig(**SMALL | {"max_length": 8}), tmp_path / "new" / "run", "max_length")


@pytest.mark.parametrize("where", ["loss", "tv"])
def test_numbers_that_are_not_finite_end_a_fine_tuning(where, tmp_path, monkeypatch):
    write = train.write_json
    spoiled = lambda path, values: write(path, values | {where: float("nan")} if values.get("step") else values)  # noqa: E731
    monkeypatch.setattr(train, "write_json", spoiled)
    with pytest.raises(WorkError, match="^a number is not finite, so nothing is written: .'step': 1, "):
        finetune(FinetuneConfig(**SMALL), tmp_path, description=None)


def test_capability_outside_of_git_says_nothing(tmp_path):
    items = tmp_path / "items.jsonl"
    items.write_text(f"{json.dumps(ITEM)}\n" * 2)
    code = (
        "from lib.finetune.capability import measure_capability as measure\n"
        "from lib.finetune.models import load_model, load_tokenizer\n"
        "from lib.finetune.weights import base_source\n"
        "source = base_source('random')\n"
        "print(len(measure(load_model(source, 'cpu'), load_tokenizer(source), 'hellaswag')['acc']))"
    )
    environment = os.environ | {HELLASWAG: str(items), "GIT_DIR": str(tmp_path / "none"), "ITL_PROGRESS": "off"}
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (asked.stdout, re.findall("fatal.*|Traceback.*", asked.stderr)) == ("2\n", [])


@pytest.mark.parametrize("changed", [{"step": "x"}, {"train_seconds": None}, {"sizes": 5}, {"sizes": {"a": "b"}}])
def test_a_checkpoint_of_other_types_is_passed_over(changed, tmp_path, capsys):
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = {"step": step, "loss": None, "train_seconds": 1.0, "sizes": {}} | (changed if step == 2 else {})
        (tmp_path / f"checkpoint-{step}" / train.STATE).write_text(json.dumps(state))
    assert train.newest_checkpoint(tmp_path)[1]["step"] == 1
    assert "going on from the one before it" in capsys.readouterr().err
