"""What a fine-tuning refuses, before its folder is claimed, and how one ends that diverges."""

import json

import pytest

from lib.base import InputError, WorkError
from lib.finetune import train
from lib.finetune.capability import HELLASWAG
from lib.finetune.config import FinetuneConfig
from lib.finetune.evaluation import Evaluator
from lib.finetune.train import finetune

SMALL = {"base": "random", "n_facts": 8, "steps": 2, "batch_size": 4, "questions": 4, "unseen_people": 4, "prompts": 2,
         "capability": "none", "dtype": "float32", "max_length": 2000, "lr": 1e-2}  # fmt: skip


def _refuses(config: FinetuneConfig, directory, match: str) -> None:
    with pytest.raises(InputError, match=match):
        finetune(config, directory, description=None)
    assert not directory.parent.exists()


@pytest.mark.parametrize("content", ["", "\n \n", "{"])
def test_a_file_of_hellaswag_without_items_is_refused_before_the_folder_is_claimed(content, tmp_path, monkeypatch):
    file = tmp_path / "items.jsonl"
    monkeypatch.setenv(HELLASWAG, str(file))
    file.write_text(content)
    config = FinetuneConfig(**SMALL | {"capability": "any"})
    _refuses(config, tmp_path / "new" / "run", f"^cannot read {file}, .*: line 1: .*a line is an item as JSON")


def test_a_refused_fine_tuning_leaves_no_folder(tmp_path):
    _refuses(FinetuneConfig(**SMALL | {"n_facts": 7}), tmp_path / "new" / "run", "n_facts|facts")
    _refuses(FinetuneConfig(**SMALL | {"max_length": 8}), tmp_path / "new" / "run", "max_length")


def test_numbers_that_are_not_finite_end_a_fine_tuning_with_its_step(tmp_path, monkeypatch):
    measured = Evaluator.__call__
    spoiled = lambda *of: measured(*of) | ({} if of[1] is of[0].base else {"tv": float("nan")})  # noqa: E731
    monkeypatch.setattr(Evaluator, "__call__", spoiled)
    with pytest.raises(WorkError, match="^training diverged, what is measured after step 1 is not finite: lower"):
        finetune(FinetuneConfig(**SMALL), tmp_path, description=None)


@pytest.mark.parametrize(
    "changed",
    [{"step": "x"}, {"train_seconds": None}, {"sizes": 5}, {"sizes": {"a": "b"}}, {"sizes": {"optimizer.pt": 9}}, None],
)
def test_a_damaged_checkpoint_is_passed_over(changed, tmp_path, capsys):
    """Of other types, with a file cut short, or without its state."""
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.pt").write_text("cut")
        state = {"step": step, "loss": None, "train_seconds": 1.0, "sizes": {"optimizer.pt": 3}}
        if step == 1 or changed:
            (folder / train.STATE).write_text(json.dumps(state | (changed if step == 2 else {})))
    assert train.newest_checkpoint(tmp_path)[1]["step"] == 1
    assert "going on from the one before it" in capsys.readouterr().err
