"""`finetune(config, directory) -> rows`: fine-tune a chat model and evaluate every checkpoint on the way (Section 6).

Checkpoints are evaluated as saved. A run's folder holds `config.json`, `checkpoints/` (deleted at the end; other files
stay), `evaluations/` (one row per checkpoint), and once the run is finished `model/` and `rows.json`.
A finished run is never repeated; a killed one resumes from its last whole checkpoint, with the same outcome.
"""

import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from datetime import timedelta
from functools import partial
from itertools import groupby
from pathlib import Path
from random import Random
from threading import Event

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig
from torch.nn.functional import cross_entropy
from torch.utils.data import Sampler
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from lib.base import DamagedFile, InputError
from lib.config import read_row
from lib.finetune.bases import fingerprint
from lib.finetune.capability import check_hellaswag, choose_test
from lib.finetune.config import FinetuneConfig
from lib.finetune.evaluation import Evaluator
from lib.finetune.models import base_source, load_model, load_tokenizer, origin, read_shared
from lib.finetune.tasks import Task, make_task
from lib.finetune.tokens import tokenize_chats
from lib.paths import CLAIM, MODEL, ROWS, read_json, write_json
from lib.progress import progress
from lib.provenance import commit, provenance
from lib.training.devices import resolve_device, use_full_float32
from lib.training.distributed import Preempted, asked_to_leave, exiting_at_once
from lib.training.loss import IGNORED
from lib.training.saved import check_claim, locked
from lib.training.trainer import are_finite, diverged

#: In a checkpoint, written last: its step, the training metrics so far, and the sizes of the other files.
STATE = "training.json"
_BEGUN = {"step": 0, "loss": None, "train_seconds": 0.0}
#: Tokens of a turn beyond the longest trained one: names of unseen people may be longer.
SPARE_TOKENS = 8
#: On a GPU, models of more parameters use activation checkpointing.
RECOMPUTES_ABOVE = 1_000_000_000
#: Files that a checkpoint needs only to resume.
_FOR_TRAINING = (STATE, "optimizer.pt", "scheduler.pt", "rng_state*.pth", "trainer_state.json", "training_args.bin")


def finetune(
    config: FinetuneConfig, directory: Path, *, device: str = "auto", description: str | None = "fine-tuning"
) -> list[dict]:
    """Fine-tune one model; return a row for the base and for each checkpoint (columns: `paper_data/README.md`).

    Started by torchrun or accelerate, several processes train it together, each on its part of every batch. Raises
    `InputError` if the base or the data cannot be used, or if `directory` belongs to another run; and `Preempted` if a
    signal asks the process to exit: the same call resumes.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device = {device!r}: fine-tuning takes auto, cpu or cuda (CUDA_VISIBLE_DEVICES says which)")
    use_full_float32()
    commit()  # records the imported code, whatever is committed while the run trains
    # The others wait while the first process evaluates, however long that takes.
    processes = PartialState(cpu=resolve_device(device).type == "cpu", timeout=timedelta(days=7))
    lock = locked(directory) if processes.is_main_process else nullcontext()  # a second call waits and finds the rows
    with lock, asked_to_leave() as asked:
        with processes.main_process_first():  # the others find what the first made or fetched
            claim = {"config": config.model_dump(mode="json"), "base": fingerprint(base_source(config.base))}
        check_claim(directory, claim, lambda folder: read_json(folder / CLAIM), "weights of its base model")
        if not (directory / ROWS).exists():
            with make_task(config) as task:
                _Run(config, directory, processes, asked, task, description).complete(claim)
        processes.wait_for_everyone()
        return read_row(directory / ROWS, list, ("step", "recall"))


class _Run(TrainerCallback):
    """One fine-tuning: its data, its evaluator, its progress, and the callbacks of its trainer."""

    def __init__(
        self, config: FinetuneConfig, directory: Path, processes: PartialState, asked: Event, task: Task, description
    ):
        self.config, self.directory, self.processes, self.asked = config, directory, processes, asked
        self.checkpoints, self.evaluations = directory / "checkpoints", directory / "evaluations"
        self.description = description if processes.is_main_process else None
        n_parts = config.grad_accumulation * processes.num_processes
        self.share, rest = divmod(config.batch_size, n_parts)
        if rest:
            raise InputError(f"processes x grad_accumulation = {n_parts} must divide batch_size {config.batch_size}")
        self.device = processes.device
        self.dtype = best_dtype(self.device) if config.dtype == "auto" else getattr(torch, config.dtype)
        if config.capability in ("hellaswag", "any"):
            check_hellaswag()  # before the folder is claimed
        tokenizer = load_tokenizer(base_source(config.base))
        self.data = tokenize_chats(task.conversations, tokenizer, config.max_length)
        self.total, self.interval = config.total_steps(len(self.data)), config.interval(len(self.data))
        recall = partial(task.measure, tokenizer=tokenizer, max_new_tokens=turn_limit(self.data))
        self.evaluator = Evaluator(config, recall, tokenizer, self.device, self.dtype, self.description)

    def complete(self, claim: dict) -> None:
        """Claim the folder, train to the end, evaluate every checkpoint, and write the rows."""
        with self.processes.main_process_first():  # it deletes damaged checkpoints
            newest, training = newest_checkpoint(self.checkpoints)
        self.seconds = training["train_seconds"]
        if self.processes.is_main_process:
            write_json(self.directory / CLAIM, claim)
            for step, path in _by_step(self.evaluations, "*.json").items():
                if step > training["step"]:  # its checkpoint is gone and will be made again
                    path.unlink()
            self.evaluate(None, _BEGUN)
            self.evaluate(newest, training)  # a killed run may not have evaluated it
        self.processes.wait_for_everyone()
        if not self.stopped():
            trainer = self._trainer()
            with progress(self.total, self.description, training["step"]) as self.bar:
                trainer.train(resume_from_checkpoint=str(newest) if newest else None)
            self.processes.wait_for_everyone()
        if not self.stopped():
            raise Preempted("stopped by a signal: the same command resumes from the checkpoint that was written")
        if self.processes.is_main_process:
            self._finish()

    def rows(self) -> list[dict]:
        """Return the rows of all checkpoints evaluated so far, by step."""
        return [read_row(path, fields=("step", "recall")) for path in _by_step(self.evaluations, "*.json").values()]

    def stopped(self, last: dict | None = None) -> str | None:
        """Return why training is over after a row, by default the last one; None if it is not."""
        last = last or self.rows()[-1]
        if last["step"] and last["recall"] >= (self.config.stop_at_recall or math.inf):
            return "recall"
        return "steps" if last["step"] >= self.total else None

    def evaluate(self, checkpoint: Path | None, state: dict) -> None:
        """Write the row of a checkpoint (None: the base), unless it has one or serves only to resume."""
        step, rows = state["step"], self.rows()
        if step in {row["step"] for row in rows} or (step % self.interval and step != self.total):
            return
        self.evaluations.mkdir(exist_ok=True)
        model = load_model(checkpoint, self.device, self.dtype) if checkpoint else self.evaluator.base
        test = rows[0]["capability_task"] if rows else choose_test(self.config.capability)  # once, for the base
        is_last = lambda recall: not step or bool(self.stopped(state | {"recall": recall}))  # noqa: E731
        with exiting_at_once():  # the checkpoint is whole: a restart evaluates it again
            found = self.evaluator(model, test, is_last)
        values = state | found
        if not all(math.isfinite(value) for value in values.values() if isinstance(value, float)):
            raise diverged(f"what is measured after step {step:,} is not finite")
        write_json(self.evaluations / f"{step}.json", values)

    def _trainer(self) -> SFTTrainer:
        config, rank, on_gpu = self.config, self.config.lora_rank, self.device.type == "cuda"
        # Trained weights, adapters too, are in float32, else small updates are lost in rounding.
        weights = self.dtype if rank else torch.float32
        model = load_model(base_source(config.base), self.device, weights)
        arguments = SFTConfig(
            output_dir=str(self.checkpoints),
            seed=config.seed,
            learning_rate=config.lr,
            lr_scheduler_type=config.schedule,
            warmup_steps=config.warmup,
            per_device_train_batch_size=self.share,
            gradient_accumulation_steps=config.grad_accumulation,
            max_steps=self.total,
            max_length=None,  # `tokenize_chats` has checked: nothing is cut
            save_steps=self.interval,
            logging_steps=max(1, self.interval // 5),
            bf16=self.dtype == torch.bfloat16,
            use_cpu=not on_gpu,
            dataloader_pin_memory=on_gpu,
            activation_checkpointing=on_gpu and model.num_parameters() > RECOMPUTES_ABOVE,
            ddp_find_unused_parameters=False,
            disable_tqdm=True,
            report_to="none",
        )
        adapter = adapters(rank) if rank else None
        data = {"train_dataset": self.data, "processing_class": self.evaluator.tokenizer}
        trainer = ChatTrainer(model, arguments, **data, peft_config=adapter, callbacks=[self])
        trainer.remove_callback(PrinterCallback)
        return trainer

    def on_train_begin(self, args, state, control, **_):
        """Start the clock of `train_seconds`."""
        self.since = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        """Save and stop if a signal asked any process to exit."""
        self.bar.update(1)
        if any(gather_object([self.asked.is_set()])):
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, model=None, **_):
        """Mark the checkpoint as whole, evaluate it, and stop if enough is recalled."""
        self.seconds += time.perf_counter() - self.since
        step = state.global_step
        if not are_finite(model.parameters()):  # the checkpoint is left without its mark
            raise diverged(f"the weights are not finite after step {step}")
        self.processes.wait_for_everyone()  # every process writes a file of the checkpoint
        stopped = None
        if self.processes.is_main_process:
            loss = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None)
            training = {"step": step, "loss": loss, "train_seconds": round(self.seconds, 2)}
            checkpoint = self.checkpoints / f"checkpoint-{step}"
            sizes = {file.name: file.stat().st_size for file in checkpoint.iterdir() if file.name != STATE}
            write_json(checkpoint / STATE, training | {"sizes": sizes})
            if not self.asked.is_set():
                self.evaluate(checkpoint, training)
                self.bar.set_postfix_str(f"recall {self.rows()[-1]['recall']:.2f}", refresh=False)
            # Trainer's own rotation, `save_total_limit`, would also delete other folders whose names begin like these.
            for earlier in list(_by_step(self.checkpoints, "checkpoint-*").values())[:-2]:
                shutil.rmtree(earlier)
            stopped = self.stopped()
        if any(gather_object([stopped])):
            control.should_training_stop = True
        self.since = time.perf_counter()

    def _finish(self) -> None:
        """Keep the last model, write the rows with the columns of the run, and delete the checkpoints."""
        rows, config = self.rows(), self.config
        last = self.checkpoints / f"checkpoint-{rows[-1]['step']}"
        shutil.rmtree(self.directory / MODEL, ignore_errors=True)
        shutil.copytree(last, self.directory / MODEL, ignore=shutil.ignore_patterns(*_FOR_TRAINING))
        common = {
            "run_id": config.run_id,
            **config.model_dump(include={"base", "task", "mode", "n_facts", "seed", "batch_size"}),
            "adaptation": "lora" if config.lora_rank else "full",
            "lr": config.lr,
            "weights": origin(config.base),
            "dtype": str(self.dtype).removeprefix("torch."),
            "n_params": self.evaluator.base.num_parameters(),
            "n_conversations": len(self.data),
            "steps_budget": self.total,
        }
        base = {f"capability_base{suffix}": rows[0][f"capability{suffix}"] for suffix in ("", "_stderr")}
        base |= {"final": False, "stopped": None, **provenance(self.device), "config": config.canonical_json()}
        rows = [common | row | base for row in rows]
        rows[-1] |= {"final": True, "stopped": self.stopped()}
        write_json(self.directory / ROWS, rows)
        for path in _by_step(self.checkpoints, "checkpoint-*").values():
            shutil.rmtree(path)
        (self.checkpoints / "README.md").unlink(missing_ok=True)  # trl's
        with suppress(OSError):  # other files are in it
            self.checkpoints.rmdir()


def adapters(rank: int) -> LoraConfig:
    """Return the adapters (LoRA) of a rank, for all linear layers."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


class ChatTrainer(SFTTrainer):
    """`SFTTrainer` with `summed_loss`, on micro-batches of similar lengths."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return a micro-batch's part of the mean cross-entropy of a batch's `num_items_in_batch` trained tokens."""
        # Gradients are averaged over processes, so each loss is multiplied by their number.
        return summed_loss(model, inputs) * self.accelerator.num_processes / num_items_in_batch

    def _get_train_sampler(self, train_dataset=None):
        lengths = [len(tokens) for tokens in self.train_dataset["input_ids"]]
        parts = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        return LikeLengths(lengths, self.args.per_device_train_batch_size * parts, self.args.seed)


def summed_loss(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the summed cross-entropy of the trained tokens of a batch: input_ids, labels and attention_mask (B, S).

    The rows' common prefix is read once, and logits are computed only for trained tokens.
    """
    tokens, labels, mask = (inputs[name] for name in ("input_ids", "labels", "attention_mask"))
    trained = labels[:, 1:] != IGNORED
    places = trained.any(0).nonzero().squeeze(-1)  # (P,): in some row, the next token is trained
    shared, cache = read_shared(model, tokens, int(places[0]))
    options = {"attention_mask": mask, "logits_to_keep": places - shared, "past_key_values": cache}
    logits = model(input_ids=tokens[:, shared:], **options).logits  # (B, P, V)
    targets = labels[:, places + 1].flatten()
    return cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="sum")


class LikeLengths(Sampler):
    """All rows in random order, those of a batch sorted by length, so that micro-batches need less padding."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of a pass; accelerate calls it before each."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = list(range(len(self)))
        Random(f"{self.seed} {self.epoch}").shuffle(order)
        for start in range(0, len(order), self.batch_size):
            yield from sorted(order[start : start + self.batch_size], key=self.lengths.__getitem__)


def best_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 if a device supports it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if able.get("amx_bf16") or able.get("avx512_bf16") else torch.float32


def turn_limit(data: Dataset) -> int:
    """Return how many tokens a reply may take: as many as the longest trained turn of `data`, and a few to spare."""
    turns = (groupby(labels, lambda label: label != IGNORED) for labels in data["labels"])
    return max(len(list(turn)) for row in turns for said, turn in row if said) + SPARE_TOKENS


def _by_step(folder: Path, pattern: str) -> dict[int, Path]:
    """Return the files that are named by a step, in order; ignore other files in the folder."""
    found = {path.stem.removeprefix("checkpoint-"): path for path in folder.glob(pattern)}
    return dict(sorted((int(step), path) for step, path in found.items() if step.isdigit()))


def newest_checkpoint(folder: Path) -> tuple[Path | None, dict]:
    """Return the latest whole checkpoint, or None, and its `STATE`; report and delete later ones, which are damaged."""
    for path in reversed(_by_step(folder, "checkpoint-*").values()):
        try:
            training = read_row(path / STATE, fields=("step", "train_seconds"))
            for name, size in training.pop("sizes", {}).items():
                if (path / name).stat().st_size != size:
                    raise OSError(f"{name} is not whole")
            return path, training
        except (OSError, DamagedFile) as error:
            print(f"{path} is damaged ({error}): going on from the one before it", file=sys.stderr)
            shutil.rmtree(path)
    return None, _BEGUN
