"""Fine-tuning through trl: what is learnt and written, and that an interruption changes nothing. No hub is asked."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lib.base import InputError, WorkError
from lib.finetune import generation, train
from lib.finetune.bases import learning_rate
from lib.finetune.config import FinetuneConfig
from lib.finetune.conversations import chats, people_of
from lib.finetune.models import base_source, load_model, load_tokenizer
from lib.finetune.tasks import Task
from lib.finetune.tokens import tokenize_chats
from lib.finetune.train import finetune, newest_checkpoint
from lib.paths import PUBLISHED, ROOT
from lib.training.distributed import Preempted
from lib.training.loss import IGNORED

#: Two batches are a pass, so that it counts which conversations are in which.
SMALL = {"base": "random", "n_facts": 8, "steps": 6, "checkpoint_every": 2, "batch_size": 4, "questions": 4,
         "unseen_people": 4, "prompts": 2, "capability": "none", "dtype": "float32", "max_length": 2000,
         "lr": 1e-2}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _offline_and_brief():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("lib.finetune.evaluation.PROMPT_TOKENS", 16)
        yield


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    (path,) = (directory / "model").glob("*.safetensors")
    return load_file(path)


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


WAYS = {"all weights": {}, "adapters": {"mode": "in-tool", "lora_rank": 2}}


@pytest.fixture(scope="module", params=WAYS)
def undisturbed(request, tmp_path_factory) -> tuple[FinetuneConfig, Path, list[dict]]:
    """A small run from start to end: of all weights in-weight, of adapters in-tool."""
    config = FinetuneConfig(**SMALL, **WAYS[request.param])
    directory = tmp_path_factory.mktemp("run")
    return config, directory, finetune(config, directory, description=None)


def test_every_checkpoint_has_its_row(undisturbed):
    config, directory, rows = undisturbed
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    assert [row["final"] for row in rows] == [False, False, False, True] and rows[-1]["stopped"] == "steps"
    assert rows[0]["tv"] == rows[0]["kl"] == 0 and all(row["tv"] > 0 for row in rows[1:])  # it has left its base
    assert {row["run_id"] for row in rows} == {config.run_id}
    assert [row["n_recall"] for row in rows] == [4] * 4 and rows[0]["n_unseen"] == 16
    assert all(row["loss"] > 0 for row in rows[1:]) and rows[1]["train_seconds"] <= rows[3]["train_seconds"]
    assert rows[0]["n_params"] == load_model(base_source(config.base)).num_parameters()  # adapters are not counted
    assert not (directory / "checkpoints").exists()


def test_a_finished_run_is_not_repeated(undisturbed, monkeypatch):
    config, directory, rows = undisturbed
    monkeypatch.setattr(train, "_Run", None)
    assert finetune(config, directory) == rows


def test_the_model_that_is_kept_is_the_one_that_was_trained(undisturbed):
    config, directory, _ = undisturbed
    model, base = load_model(directory / "model"), load_model(base_source(config.base))
    tokens = torch.arange(5)[None]
    assert not torch.allclose(model(tokens).logits, base(tokens).logits)
    named = _weights(directory)
    if config.lora_rank:
        assert all("lora_" in name for name in named)
    else:
        assert set(named) <= set(model.state_dict())


DAMAGES = [("all weights", None), ("all weights", "*.safetensors"), ("adapters", "*.safetensors")]


def _die_while_evaluating(step: int, config: FinetuneConfig, directory: Path, monkeypatch) -> None:
    """Fine-tune up to the checkpoint of `step`, which is written but not evaluated."""
    evaluate = train._Run.evaluate

    def dies(run, checkpoint, state):
        if state["step"] == step:
            raise KeyboardInterrupt
        evaluate(run, checkpoint, state)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train._Run, "evaluate", dies)
        finetune(config, directory, description=None)


@pytest.mark.parametrize("undisturbed, damage", DAMAGES, indirect=["undisturbed"])
def test_an_interrupted_run_ends_with_the_weights_of_an_undisturbed_one(
    undisturbed, tmp_path, monkeypatch, capsys, damage
):
    """It dies while its checkpoint of step 4 is evaluated; then a file of that checkpoint is damaged."""
    config, directory, rows = undisturbed
    _die_while_evaluating(4, config, tmp_path, monkeypatch)
    newest, _ = newest_checkpoint(tmp_path / "checkpoints")
    assert newest.name == "checkpoint-4"
    (tmp_path / "evaluations" / ".4.json.1.tmp").write_text("{")  # as a kill in the middle of writing leaves it
    if damage:
        (path,) = newest.glob(damage)
        path.write_bytes(path.read_bytes()[:-20])
    again = finetune(config, tmp_path, description=None)
    assert ("is damaged" in capsys.readouterr().err) == (damage is not None)
    assert _same(_weights(tmp_path), _weights(directory))
    measured = ("step", "recall", "recall_unseen", "tv", "kl", "loss", "final")
    assert [[row[name] for name in measured] for row in again] == [[row[name] for name in measured] for row in rows]


@pytest.mark.parametrize("undisturbed", ["all weights"], indirect=True)
def test_files_of_others_in_the_folder_are_neither_read_nor_deleted(undisturbed, tmp_path, monkeypatch):
    """Copies of a checkpoint and of a row under other names, notes, and what macOS puts beside a file."""
    config, directory, rows = undisturbed
    _die_while_evaluating(2, config, tmp_path, monkeypatch)
    checkpoints, evaluations = tmp_path / "checkpoints", tmp_path / "evaluations"
    copies = {checkpoints / name for name in ("checkpoint-best", "checkpoint-1-copy", "checkpoint-9 2")}
    for copy in copies:
        shutil.copytree(checkpoints / "checkpoint-2", copy)
    others = {evaluations / name for name in ("notes.json", "0 copy.json", "._0.json", "0.json.bak")}
    others.add(checkpoints / "checkpoint-2" / "._model.safetensors")
    for path in others:
        path.write_bytes(b"\0\5\x16\7 is no JSON")
    assert newest_checkpoint(checkpoints)[0].name == "checkpoint-2"
    again = finetune(config, tmp_path, description=None)
    assert [row["recall"] for row in again] == [row["recall"] for row in rows]
    assert _same(_weights(tmp_path), _weights(directory))
    assert set(checkpoints.iterdir()) == copies and all((copy / train.STATE).exists() for copy in copies)
    assert others - {checkpoints / "checkpoint-2" / "._model.safetensors"} < set(evaluations.iterdir())


@pytest.mark.parametrize("undisturbed", ["all weights"], indirect=True)
def test_the_newest_two_checkpoints_are_kept_while_training_goes_on(undisturbed, tmp_path, monkeypatch):
    config, _, _ = undisturbed
    on_step_end, seen, chosen = train._Run.on_step_end, [], []
    monkeypatch.setattr(train, "choose_test", chosen.append)

    def look(run, args, state, control, **options):
        seen.append(sorted(path.name for path in run.checkpoints.glob("checkpoint-*")))
        on_step_end(run, args, state, control, **options)

    monkeypatch.setattr(train._Run, "on_step_end", look)
    finetune(config.model_copy(update={"checkpoint_every": 1, "steps": 4}), tmp_path, description=None)
    assert seen == [[], ["checkpoint-1"], ["checkpoint-1", "checkpoint-2"], ["checkpoint-2", "checkpoint-3"]]
    assert chosen == ["none"]  # for the base, and from its row for all checkpoints


@pytest.mark.slow
def test_who_is_asked_to_leave_writes_a_checkpoint_and_comes_back(undisturbed, tmp_path, monkeypatch):
    config, directory, _ = undisturbed
    on_step_end = train._Run.on_step_end

    def asked(run, args, state, control, **options):
        if state.global_step == 3:
            run.asked.set()
        on_step_end(run, args, state, control, **options)

    with monkeypatch.context() as patch, pytest.raises(Preempted, match="resumes from"):
        patch.setattr(train._Run, "on_step_end", asked)
        finetune(config, tmp_path, description=None)
    newest, _ = newest_checkpoint(tmp_path / "checkpoints")
    assert newest.name == "checkpoint-3"
    state = json.loads((newest / train.STATE).read_text())
    (newest / train.STATE).write_text(json.dumps(state | {"train_seconds": 1000.0}))
    rows = finetune(config, tmp_path, description=None)
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    assert [row["train_seconds"] > 1000 for row in rows] == [False, False, True, True]  # no time is lost
    assert _same(_weights(tmp_path), _weights(directory))


def test_a_signal_during_an_evaluation_ends_it_at_once_and_it_is_repeated(undisturbed, tmp_path, monkeypatch):
    config, directory, _ = undisturbed
    measured = train.Evaluator.__call__

    def asked(evaluator, model, *rest):
        if model is not evaluator.base:
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(60)
        return measured(evaluator, model, *rest)

    with monkeypatch.context() as patch, pytest.raises(Preempted, match="stopped by a signal"):
        patch.setattr(train.Evaluator, "__call__", asked)
        finetune(config, tmp_path, description=None)
    rows = finetune(config, tmp_path, description=None)
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    assert _same(_weights(tmp_path), _weights(directory))


def test_a_checkpoint_is_asked_as_it_was_saved_and_no_longer_than_was_trained(tmp_path, monkeypatch):
    """As on a GPU: training wraps the model in bfloat16, and activation checkpointing takes away its cache."""
    settings, make_task, generate = train.SFTConfig, train.make_task, generation._generate
    tokens = torch.arange(20)[None]
    as_on_gpu = {"activation_checkpointing": True, "bf16": True}
    monkeypatch.setattr(train, "SFTConfig", lambda **given: settings(**given | as_on_gpu))
    asked, lengths, said = [], [], []

    @contextmanager
    def watched(*given):
        with make_task(*given) as taught:

            def measure(model, tokenizer, **options):
                with torch.inference_mode():
                    asked.append((model.training, model(tokens).logits))
                return taught.measure(model, tokenizer, **options)

            said.extend(chat["messages"][1]["content"] for chat in taught.conversations)
            yield Task(taught.conversations, measure)

    def watch(*given):
        answers = generate(*given)
        lengths.extend(map(len, answers))
        return answers

    monkeypatch.setattr(train, "make_task", watched)
    monkeypatch.setattr(generation, "_generate", watch)
    config = FinetuneConfig(**SMALL | {"steps": 2})
    finetune(config, tmp_path, description=None)
    for source, (training, logits) in zip((base_source(config.base), tmp_path / "model"), asked, strict=True):
        with torch.inference_mode():
            assert torch.equal(logits, load_model(source)(tokens).logits) and not training
    # A byte is a token, and one more ends the turn; the base goes on for ever.
    assert max(lengths) == max(len(text.encode()) for text in said) + 1 + train.SPARE_TOKENS


def test_a_fine_tuning_that_diverges_ends_with_one_sentence_and_no_row(tmp_path, monkeypatch):
    on_step_end = train._Run.on_step_end

    def spoiled(run, args, state, control, model=None, **options):
        with torch.no_grad():
            next(model.parameters()).view(-1)[3] = torch.nan
        on_step_end(run, args, state, control, **options)

    monkeypatch.setattr(train._Run, "on_step_end", spoiled)
    with pytest.raises(WorkError, match="training diverged, the weights are not finite after step 2"):
        finetune(FinetuneConfig(**SMALL), tmp_path, description=None)
    assert newest_checkpoint(tmp_path / "checkpoints")[0] is None  # what was saved last is passed over
    assert {path.name for path in (tmp_path / "evaluations").iterdir()} == {"0.json"}
    assert not (tmp_path / "rows.json").exists()


def test_training_ends_when_enough_is_recalled(tmp_path):
    """Eight facts in weights are learnt by heart, and by then no more is trained."""
    config = FinetuneConfig(**SMALL | {"steps": 400, "checkpoint_every": 50, "batch_size": 8, "stop_at_recall": 1.0})
    rows = finetune(config, tmp_path, description=None)
    assert rows[-1]["stopped"] == "recall" and rows[-1]["recall"] == 1.0 and rows[-1]["step"] < 400
    assert all(row["recall"] < 1.0 for row in rows[:-1]) and rows[-1]["recall_unseen"] < 0.5


def test_the_folder_of_another_run_is_refused(undisturbed, tmp_path):
    config, directory, _ = undisturbed
    with pytest.raises(InputError, match="another configuration"):
        finetune(config.model_copy(update={"seed": 1}), directory)
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        finetune(config, tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WorkError, match=r"config\.json is damaged .*: delete it"):
        finetune(config, tmp_path)


def test_another_base_of_the_same_name_is_another_run(undisturbed, monkeypatch):
    config, directory, _ = undisturbed
    monkeypatch.setattr(train, "fingerprint", lambda _: "made anew")
    with pytest.raises(InputError, match="another configuration or other weights of its base model"):
        finetune(config, directory)


def test_the_loss_is_that_of_what_the_labels_say_though_a_batch_is_cut(tmp_path):
    config = FinetuneConfig(
        **SMALL | {"steps": 1, "checkpoint_every": 1, "batch_size": 8}, mode="in-tool", grad_accumulation=4
    )
    model, tokenizer = load_model(base_source(config.base)), load_tokenizer(base_source(config.base))
    surprises = []
    for row in tokenize_chats(chats(people_of(8), "in-tool"), tokenizer, 2000):
        labels = torch.tensor(row["labels"][1:])
        with torch.inference_mode():
            log_p = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        surprises += [-log_p[i, label].item() for i, label in enumerate(labels) if label != IGNORED]
    loss = finetune(config, tmp_path, description=None)[1]["loss"]
    assert loss == pytest.approx(sum(surprises) / len(surprises), rel=1e-5)


def test_rates_are_those_of_the_base_in_its_mode_unless_given():
    def rate(base: str, mode: str = "in-weight", **given) -> float:
        return FinetuneConfig(base=base, mode=mode, **given).lr

    with (PUBLISHED / "large_scale_checkpoints.csv").open() as file:
        released = {(row["base"], row["mode"]): float(row["lr"]) for row in csv.DictReader(file) if row["lr"]}
    assert len(released) == 12 and all(rate(*run) == lr for run, lr in released.items())
    assert rate("SmolLM2-360M", "in-tool-text") == rate("SmolLM-360M", "in-tool") < rate("SmolLM2-360M")
    assert rate("nobody/nothing") == learning_rate("nobody/nothing", "in-weight")
    assert rate("SmolLM-360M", lr=3e-5) == 3e-5 and rate("SmolLM-360M", lora_rank=4) > rate("SmolLM-360M")
    assert FinetuneConfig(base="SmolLM-360M").run_id == FinetuneConfig(base="SmolLM-360M", lr=1e-3).run_id


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "nobody/nothing"], "cannot read a tokenizer from nobody/nothing"),
        (["--facts", "7"], "multiple"),
        (["--mode", "in-air"], "mode"),
        (["--set", "task=hybrid"], "in-tool"),
        (["--set", "batch_size=8", "--set", "grad_accumulation=3"], "divide"),
        (["--set", "colour=blue"], "unknown configuration key"),
        (["--lr", "0"], "lr"),
    ],
)
def test_a_wrong_command_says_so_in_a_sentence(arguments, words, tmp_path, itl):
    base = [] if "--model" in arguments else ["--model", "random"]
    answer = itl("finetune", *base, *arguments, "--out", tmp_path / "run")
    assert answer.code == 2 and answer.err.startswith("itl: ") and words in answer.err and answer.err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.timeout(900)  # three times torch is loaded
def test_two_processes_train_as_one_does(tmp_path):
    """A folder as anybody has it, by its path, through torchrun; the losses are those of a single process."""
    shutil.copytree(base_source("random"), tmp_path / "base")
    settings = [f"--set={name}={json.dumps(value)}" for name, value in SMALL.items() if name != "base"]
    command = ["-m", "lib", "finetune", "--model", str(tmp_path / "base"), *settings, "--device", "cpu"]
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    losses = {}
    for n, launcher in {1: [], 2: together}.items():
        out = tmp_path / str(n)
        subprocess.run([sys.executable, *launcher, *command, "--out", str(out)], cwd=ROOT, check=True)
        losses[n] = [row["loss"] for row in json.loads((out / "rows.json").read_text())[1:]]
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)
