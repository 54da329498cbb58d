"""`finetune(config, directory) -> rows`: a base model that is taught facts, and every checkpoint on the way evaluated.

Training is trl's `SFTTrainer` on conversations that have their labels already (`lib.finetune.data`), with a loss that
reads less (`ChatTrainer`). What is evaluated are its checkpoints, as they were saved. The folder of a run holds
`config.json`, `checkpoints/`, `evaluations/` (a row a checkpoint, as it was measured), and once it is finished `model/`
and `rows.json`. A finished run is never repeated; one that was killed goes on exactly.
"""

import hashlib
import json
import math
import re
import shutil
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from random import Random

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from filelock import FileLock
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from torch.nn.functional import cross_entropy
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from lib.base import InputError
from lib.finetune.config import FinetuneConfig
from lib.finetune.data import IGNORED, tokenize_chats
from lib.finetune.examination import Examination
from lib.finetune.lessons import lesson
from lib.finetune.models import fingerprint, load_model, load_tokenizer
from lib.finetune.triviaqa import load_questions
from lib.finetune.weights import base_source, origin
from lib.paths import CLAIM, DATABASE, MODEL, ROWS, write_json
from lib.progress import progress
from lib.provenance import provenance
from lib.training.devices import resolve_device
from lib.training.distributed import Preempted, asked_to_leave
from lib.training.trainer import are_finite, diverged

#: In a checkpoint: its step, and how training went until then.
STATE = "training.json"
_FOLDERS = ("checkpoints", "evaluations")
#: Checkpoints that are kept while training goes on.
KEPT = 2
#: What a turn may take beyond the longest that was trained: names of strangers may be longer.
SPARE_TOKENS = 8
#: Above so many parameters a GPU does not keep activations, but computes them again.
RECOMPUTES_ABOVE = 1_000_000_000
#: What a checkpoint holds only to go on from it.
_FOR_TRAINING = (STATE, "optimizer.pt", "scheduler.pt", "rng_state*.pth", "trainer_state.json", "training_args.bin")


def finetune(
    config: FinetuneConfig, directory: Path, *, device: str = "auto", description: str | None = "fine-tuning"
) -> list[dict]:
    """Fine-tune one model; returns a row for the base and for each checkpoint (columns: `paper_data/README.md`).

    Started by torchrun or accelerate, several processes train it together, each on its part of every batch.

    Raises `InputError` if the base or the data cannot be used, or if `directory` belongs to another run; and
    `Preempted` if a signal asks the process to leave: the same call goes on from where it was.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device = {device!r}: fine-tuning takes auto, cpu or cuda (CUDA_VISIBLE_DEVICES says which)")
    directory, cpu = Path(directory), resolve_device(device).type == "cpu"
    state = PartialState(cpu=cpu, timeout=timedelta(days=7))  # the others wait while the first evaluates
    with asked_to_leave() as asked, ExitStack() as stack:
        if state.is_main_process:
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(directory / ".lock"))  # a second call waits and finds the rows
        state.wait_for_everyone()
        claim = {"config": config.model_dump(mode="json")}
        if config.task == "trivia" and config.source != "hub":  # whose questions do not change
            questions = json.dumps(load_questions(config.source))
            claim["questions"] = hashlib.sha256(questions.encode()).hexdigest()[:16]
        with state.main_process_first():  # the others find what the first had to make or to fetch
            claim["base"] = fingerprint(base_source(config.base))
        _check_claim(claim, directory)
        state.wait_for_everyone()
        is_new = state.is_main_process and not (directory / CLAIM).exists()
        if is_new:
            write_json(directory / CLAIM, claim)
        if not (directory / ROWS).exists():
            try:
                run = _Run(config, directory, state, asked, stack, description)
            except InputError:
                for name in (CLAIM, DATABASE) if is_new else ():  # or the folder were not free for a corrected call
                    (directory / name).unlink(missing_ok=True)
                raise
            run.complete()
        state.wait_for_everyone()
        return json.loads((directory / ROWS).read_text())


def _check_claim(claim: dict, directory: Path) -> None:
    """Raise `InputError` unless the folder is that run's, or free: what begins with a dot does not count."""
    if (directory / CLAIM).exists():
        try:
            found = json.loads((directory / CLAIM).read_text())
        except ValueError:
            found = None
        if not isinstance(found, dict) or claim | found != claim:  # an earlier claim may say less
            raise InputError(
                f"{directory} holds a fine-tuning of another configuration or base model, or of other questions: "
                "give another folder, or delete this one"
            )
    elif any(not path.name.startswith(".") for path in directory.iterdir()):
        raise InputError(f"{directory} is not empty and holds no fine-tuning: give a new folder")


class _Run:
    """One fine-tuning: its conversations, what is asked of its checkpoints, and where it stands."""

    def __init__(
        self,
        config: FinetuneConfig,
        directory: Path,
        state: PartialState,
        asked: threading.Event,
        stack: ExitStack,
        description: str | None,
    ):
        self.config, self.state, self.asked = config, state, asked
        self.description = description if state.is_main_process else None
        self.directory, self.checkpoints, self.evaluations = (directory / name for name in ("", *_FOLDERS))
        self.share, rest = divmod(config.batch_size, config.grad_accumulation * state.num_processes)
        if rest:
            raise InputError(
                f"batch_size = {config.batch_size} cannot be divided among {state.num_processes} processes "
                f"in grad_accumulation = {config.grad_accumulation} parts: give a multiple"
            )
        self.dtype = best_dtype(state.device) if config.dtype == "auto" else getattr(torch, config.dtype)
        self.tokenizer = load_tokenizer(base_source(config.base))
        self.lesson = stack.enter_context(lesson(config, directory if state.is_main_process else None))
        self.data = tokenize_chats(self.lesson.conversations, self.tokenizer, config.max_length)
        self.examination = Examination(config, self.lesson, self.tokenizer, turn_limit(self.data), self.description)
        self.total, self.interval = config.total_steps(len(self.data)), config.interval(len(self.data))

    def complete(self) -> None:
        """Train to the end, evaluate every checkpoint, and write the rows."""
        newest = newest_checkpoint(self.checkpoints)
        if self.state.is_main_process:
            self._catch_up(newest)
        self.state.wait_for_everyone()
        if not self.stopped():
            self._trainer().train(resume_from_checkpoint=str(newest) if newest else None)
            self.state.wait_for_everyone()
        if not self.stopped():
            raise Preempted("asked to leave: the same command goes on from the checkpoint that was written")
        if self.state.is_main_process:
            self._finish()

    def rows(self) -> list[dict]:
        """What was evaluated so far, by step."""
        return sorted(
            (json.loads(path.read_text()) for path in _numbered(self.evaluations, r"(\d+)\.json")),
            key=lambda row: row["step"],
        )

    def stopped(self) -> str | None:
        """Why training is over; None if it is not."""
        last = self.rows()[-1]
        return self._stops(last["step"], last["recall"])

    def _stops(self, step: int, recall: float) -> str | None:
        if step and recall >= (self.config.stop_at_recall or math.inf):
            return "recall"
        return "steps" if step >= self.total else None

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint of this step is evaluated; the others are only there to go on from."""
        return step % self.interval == 0 or step == self.total

    def evaluate(self, checkpoint: Path | None, state: dict) -> None:
        """Write the row of a checkpoint, None for the base. state: its step, and how training went until then."""
        self.evaluations.mkdir(exist_ok=True)
        step, device = state["step"], self.state.device
        base = self.examination.base(device, self.dtype)
        model = base if checkpoint is None else load_model(checkpoint, device, self.dtype)
        record = self.evaluations / f"{step}.parts"
        found = self.examination(model, record, lambda recall: not step or self._stops(step, recall) is not None)
        write_json(self.evaluations / f"{step}.json", state | found)

    def _catch_up(self, newest: Path | None) -> None:
        """Evaluate the base, and what was saved last, if training was interrupted before that."""
        state = json.loads((newest / STATE).read_text()) if newest else {"step": 0}
        for path in _numbered(self.evaluations, r"(\d+)\.(json|parts)"):
            if int(path.stem) > state["step"]:  # its checkpoint is gone: it will be made again
                path.unlink()
        done = {row["step"] for row in self.rows()}
        if 0 not in done:
            self.evaluate(None, {"step": 0, "loss": None, "train_seconds": 0.0})
        if state["step"] not in done | {0} and self.is_due(state["step"]):
            self.evaluate(newest, state)

    def _trainer(self) -> SFTTrainer:
        config, on_gpu = self.config, self.state.device.type == "cuda"
        # What is trained is in float32, or steps would be lost in rounding; adapters are, whatever they stand beside.
        weights = self.dtype if config.lora_rank else torch.float32
        model = load_model(base_source(config.base), self.state.device, weights)
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
            save_strategy="steps",
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
        adapter = None
        if config.lora_rank:
            adapter = LoraConfig(
                r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
            )
        trainer = ChatTrainer(
            model, arguments, train_dataset=self.data, processing_class=self.tokenizer, peft_config=adapter
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Watch(self))
        return trainer

    def _finish(self) -> None:
        """Keep the last model, and the rows with what they have in common; the way to it is not kept."""
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
            "n_params": self.examination.base(self.state.device, self.dtype).num_parameters(),
            "n_conversations": len(self.data),
            "steps_budget": self.total,
        }
        base = {f"capability_base{suffix}": rows[0][f"capability{suffix}"] for suffix in ("", "_stderr")}
        endings = [{"final": False, "stopped": None}] * (len(rows) - 1) + [{"final": True, "stopped": self.stopped()}]
        made = {**provenance(self.state.device), "config": config.canonical_json()}
        table = [common | row | base | ending | made for row, ending in zip(rows, endings, strict=True)]
        write_json(self.directory / ROWS, table)
        for path in _checkpoints(self.checkpoints):
            shutil.rmtree(path)
        (self.checkpoints / "README.md").unlink(missing_ok=True)  # trl's
        with suppress(OSError):  # somebody keeps something in it
            self.checkpoints.rmdir()


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where a device multiplies in it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if able.get("amx_bf16") or able.get("avx512_bf16") else torch.float32


def turn_limit(data: Dataset) -> int:
    """How many tokens a turn may have when what `data` teach is asked: as many as their longest, and a few."""
    turns = (groupby(labels, lambda label: label != IGNORED) for labels in data["labels"])
    return max(len(list(turn)) for row in turns for said, turn in row if said) + SPARE_TOKENS


class ChatTrainer(SFTTrainer):
    """`SFTTrainer`, but what all conversations of a batch begin with is read once, and only what is trained predicted.

    The loss is the same. A batch is cut into parts of like lengths; which conversations it holds is left to chance.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean cross-entropy of the trained tokens, of `num_items_in_batch` in all parts of all processes."""
        tokens, labels, mask = (inputs[name] for name in ("input_ids", "labels", "attention_mask"))
        trained = labels[:, 1:] != IGNORED
        places = trained.any(0).nonzero().squeeze(-1)  # in some row, what comes next is trained
        shared = int((tokens == tokens[:1]).all(0).long().cumprod(0).sum().clamp(max=int(places[0])))
        cache = None
        if shared and len(tokens) > 1:
            cache = model(input_ids=tokens[:1, :shared], use_cache=True, logits_to_keep=1).past_key_values
        if cache is None:  # nothing is shared, or activations are computed again and not kept
            shared, options = 0, {}
        else:
            cache.batch_repeat_interleave(len(tokens))
            options = {"past_key_values": cache}
        logits = model(
            input_ids=tokens[:, shared:], attention_mask=mask, logits_to_keep=places - shared, **options
        ).logits  # (B, P, V)
        loss = cross_entropy(
            logits.flatten(0, 1).float(), labels[:, places + 1].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        loss = loss / (trained.sum() if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # whose gradients are averaged
        return (loss, {"logits": logits}) if return_outputs else loss

    def _get_train_sampler(self, train_dataset=None):
        lengths = [len(tokens) for tokens in self.train_dataset["input_ids"]]
        parts = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        return _LikeLengths(lengths, self.args.per_device_train_batch_size * parts, self.args.seed)


class _LikeLengths(Sampler):
    """All rows in random order, those of a batch by length."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate, before each pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = list(range(len(self)))
        Random(f"{self.seed} {self.epoch}").shuffle(order)
        for start in range(0, len(order), self.batch_size):
            yield from sorted(order[start : start + self.batch_size], key=self.lengths.__getitem__)


class _Watch(TrainerCallback):
    """Shows progress, evaluates what is saved, and ends training when it is enough or when somebody asks."""

    def __init__(self, run: _Run):
        self.run = run

    def on_train_begin(self, args, state, control, **_):
        begun = self.run.checkpoints / f"checkpoint-{state.global_step}" / STATE
        self.seconds = json.loads(begun.read_text())["train_seconds"] if state.global_step else 0.0
        self.since = time.perf_counter()
        self.bar = progress(state.max_steps, self.run.description, state.global_step)

    def on_step_end(self, args, state, control, **_):
        self.bar.update(1)
        if any(gather_object([self.run.asked.is_set()])):
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, model=None, **_):
        self.seconds += time.perf_counter() - self.since
        if not are_finite(model.parameters()):  # what has just been saved stays incomplete, and is passed over
            raise diverged(f"the weights are not finite after step {state.global_step}")
        reached = [None]
        if self.run.state.is_main_process:
            loss = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None)
            training = {"step": state.global_step, "loss": loss, "train_seconds": round(self.seconds, 2)}
            # Last of all files: a checkpoint without it was cut off.
            checkpoint = self.run.checkpoints / f"checkpoint-{state.global_step}"
            write_json(checkpoint / STATE, training)
            if self.run.is_due(state.global_step) and not self.run.asked.is_set():
                self.run.evaluate(checkpoint, training)
                self.bar.set_postfix_str(f"recall {self.run.rows()[-1]['recall']:.2f}", refresh=False)
            # Not transformers, which would also delete what only looks like one of its own.
            found = _checkpoints(self.run.checkpoints)
            here = found.index(checkpoint)
            for path in found[:here] + found[here + KEPT :]:  # later ones are damaged: this run has passed over them
                shutil.rmtree(path)
            reached = [self.run.stopped()]
        if broadcast_object_list(reached)[0]:
            control.should_training_stop = True
        self.since = time.perf_counter()

    def on_train_end(self, args, state, control, **_):
        self.bar.close()


def _numbered(folder: Path, pattern: str) -> list[Path]:
    """What has a name of this pattern, whose first group is a number: the greatest first. All else is not a run's."""
    found = {path: re.fullmatch(pattern, path.name) for path in folder.glob("*")}
    return sorted((path for path in found if found[path]), key=lambda path: int(found[path][1]), reverse=True)


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that a run wrote, the newest first."""
    return _numbered(folder, r"checkpoint-(\d+)")


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the most steps that is whole; damaged ones are passed over with a sentence."""
    for path in _checkpoints(folder):
        if damage := _damage(path):
            print(f"{path} is damaged ({damage}): going on from the one before it", file=sys.stderr)
        else:
            return path
    return None


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None if nothing is."""
    if not (checkpoint / STATE).exists():
        return "it was cut off"
    for path in checkpoint.rglob("[!.]*"):  # some systems put hidden files beside those that are written
        try:
            if path.suffix == ".safetensors":
                safe_open(path, "pt")  # compares the size of the file with what its header says
            elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
                return f"{path.name} is not whole"
            elif path.suffix == ".json":
                json.loads(path.read_text())
        except (SafetensorError, ValueError, OSError) as error:
            return f"{path.name}: {error}"
    return None
