"""`run(config, directory) -> row`: one cell from facts to result, what every launcher calls.

The folder of a run holds `config.json`, `people.sqlite`, copies of the files that say who its people and what its
tokens are, `metrics.jsonl`, `checkpoints/`, and once it is finished `model/` (weights alone) and `row.json`; beside
them, what observers write (`lib.config.Observers`) and `evaluations.jsonl` (`lib.training.watch`). A finished run is
never repeated; one that was killed goes on.
"""

import errno
import json
import shutil
import tempfile
import timeit
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock

from lib import paths
from lib.agent.tools import SqlTool
from lib.base import InputError, WorkError
from lib.config import UNOBSERVED, ModelConfig, Observers, RunConfig
from lib.dialogs.batches import Source
from lib.dialogs.files import ConcatDialogs, open_dialogs, tokenize_file
from lib.dialogs.tokenizers import Tokenizer, load_tokenizer, tokenizer_file
from lib.dialogs.tokens import TokenizedDialogs, join, tokenize_people
from lib.evaluation.generalization import measure_generalization
from lib.evaluation.recall import Fact, Recall, bits_of_dialogs, measure_recall
from lib.facts.csv import write_people_csv
from lib.facts.database import write_database
from lib.facts.people import People
from lib.facts.sampling import load_people
from lib.model.transformer import Transformer
from lib.paths import CLAIM, DATABASE, MODEL, ROW, write_json
from lib.provenance import commit, provenance
from lib.training import checkpoint
from lib.training.cuda_graph import WARM_UP
from lib.training.devices import resolve_device
from lib.training.distributed import ALONE, Preempted, Ranks, asked_to_leave, connect, local_device, world_size
from lib.training.monitor import check_observers
from lib.training.saved import _Identity, _located, _own_paths, read_claim, run_tokenizer, save_model
from lib.training.trainer import Ending, Lockstep, Trainer, train_together

#: How many times as fast a compiled step is, about (notebooks/A2_performance measures it).
COMPILED_SPEEDUP = 1.4


def run(config: RunConfig, directory: Path, **options) -> dict:
    """Train and measure one model; returns its row (see `paper_data/README.md` for the columns).

    `options` are those of `run_together`, and so are its errors.
    """
    (row,) = run_together([config], [directory], **options)
    return row


def run_together(
    configs: Sequence[RunConfig],
    directories: Sequence[Path],
    *,
    device: str = "auto",
    description: str | None = None,
    observers: Observers = UNOBSERVED,
    compiled: bool | None = None,
    sharded: bool = False,
    tensor: int = 1,
    inputs: Mapping[str, str] = {},  # noqa: B006
) -> list[dict]:
    """Several runs as one stack of models (see `train_together` for what they must have in common); returns the rows.

    compiled: whether torch.compile fuses a single model's elementwise work; None does where it pays, and where nothing
    is probed; on a GPU steps are recorded instead (`lib.training.cuda_graph`). observers: what else watches, without
    changing what is learned, but for rounding where it keeps a GPU's steps from being recorded. A single run may be
    trained by several processes, which all call this: sharded and tensor say how (`lib.training.distributed.connect`).
    inputs: where files lie now, by the paths that configurations name them by.

    Raises `InputError` if a directory belongs to another configuration, people, tokens or files; then nothing was
    trained; and `WorkError`, `Preempted` among them, if training could not go on: the same call does from where it was.
    """
    device = local_device(resolve_device(device))
    check_observers(observers)
    if (observers.probe_every or observers.profile_steps) and len(configs) > 1:
        raise InputError("probes and the profiler watch one run at a time: give each a call of its own")
    if observers.probe_every and (compiled or world_size() > 1):
        raise InputError("probes watch a model that is not compiled, in a single process")
    commit()  # remembers the code that was imported, whatever is committed while the runs go on
    cells = [_Cell(config, Path(directory), inputs) for config, directory in zip(configs, directories, strict=True)]
    if len({cell.directory.resolve() for cell in cells}) < len(cells):
        raise InputError("two runs that train together have one folder: give each its own")
    if world_size() > 1 and len(cells) != 1:
        raise InputError(f"{len(cells)} runs and {world_size()} processes: several processes train one run at a time")
    with (
        asked_to_leave() as asked,
        connect(device, configs[0].model if configs else ModelConfig(), sharded, tensor) as ranks,
        ExitStack() as stack,
    ):
        missing = ranks.first_does(lambda: _lock(cells, stack))
        to_do = [cells[i] for i in missing]
        if compiled is None and not observers.probe_every:  # hooks would be compiled away
            compiled = len(to_do) == 1 and ranks.size == 1 and _pays_to_compile(to_do[0].config, device)
        if compiled:
            torch.compiler.reset()  # what this process compiled for runs of other shapes counts against a limit
        # Texts of files can be of any length, and a recording takes all batches as long as the longest.
        recorded = (
            device.type == "cuda"
            and ranks.size == 1
            and not (compiled or observers.probe_every or any(cell.files for cell in to_do))
        )
        with _full_disks_told():
            for cell in to_do:
                cell.prepare(device, compiled, ranks, recorded)
            ranks.first_does(lambda: _claim(to_do, stack))  # now that nothing is refused
            endings = train_together([cell.trainer for cell in to_do], description, observers, asked)
            for cell, ending in zip(to_do, endings, strict=True):
                cell.finish(ending)
        if ranks.any(asked.is_set()):  # while everything was measured
            raise Preempted("asked to leave: this run is finished, the same command goes on after it")
        return ranks.first_does(lambda: [json.loads((cell.directory / ROW).read_text()) for cell in cells])


def _lock(cells: "list[_Cell]", locks: ExitStack) -> list[int]:
    """Lock the folders of all cells; the places of those that have no row yet."""
    for cell in sorted(cells, key=lambda cell: cell.directory.resolve()):  # no two processes wait for each other
        cell.lock(locks)
    return [i for i, cell in enumerate(cells) if not (cell.directory / ROW).exists()]


def _claim(cells: "list[_Cell]", databases: ExitStack) -> None:
    for cell in cells:
        cell.claim(databases)


@contextmanager
def _full_disks_told() -> Iterator[None]:
    """A disk that takes no more is no mistake in the code."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise WorkError(f"there is no room left ({error}): make some, the same command goes on from there") from error


class _Cell:
    """One run: its folder, and while it goes on, its people, database, model and trainer."""

    def __init__(self, config: RunConfig, directory: Path, inputs: Mapping[str, str] = {}):  # noqa: B006
        """Raises `InputError` unless `directory` is this run's, or free, and its people and dialogs can be read."""
        self.config, self.directory, self.located = config, directory, _located(config, inputs)
        self.people, self.tokenizer = read_inputs(self.located)
        with _full_disks_told():
            #: The folders with the tokens of the files of dialogs, by path.
            self.files = {
                path: tokenize_file(inputs.get(path, path), self.tokenizer) for path in sorted(config.training.files)
            }
        #: What tells this run from any other, files by what they hold.
        files = {path: folder.name for path, folder in self.files.items()}
        self.identity = config, self.people.digest(), files, self.tokenizer.name
        _check_claim(directory, self.identity)

    def lock(self, locks: ExitStack) -> None:
        """Make the folder and keep other processes from it until `locks` closes; if it is not claimed then, it goes."""
        new = [folder for folder in (self.directory, *self.directory.parents) if not folder.exists()]
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the folder {self.directory}: {error.strerror}") from None
        locks.enter_context(FileLock(self.directory / ".lock"))  # a second process waits and finds the row
        locks.callback(self._leave, new)
        _check_claim(self.directory, self.identity)

    def _leave(self, new: list[Path]) -> None:
        """Delete what was made for this run if it was refused."""
        if not (self.directory / CLAIM).exists():
            (self.directory / ".lock").unlink(missing_ok=True)
            with suppress(OSError):  # somebody keeps something in one
                for folder in new:
                    folder.rmdir()

    def claim(self, stack: ExitStack) -> None:
        """Write into the folder whose it is and what it asks, and open its database until `stack` closes."""
        if not (self.directory / CLAIM).exists():
            config, people, files, tokenizer = self.identity
            claim = {"config": config.model_dump(mode="json"), "people_digest": people, "files": files}
            write_json(self.directory / CLAIM, {**claim, "tokenizer": tokenizer})
        own = _own_paths(self.directory, self.config)
        if (copy := own.get(self.config.facts.csv)) and not copy.exists():
            write_people_csv(self.people, copy)
        if (copy := own.get(self.config.tokenizer)) and not copy.exists():
            self._copy_tokenizer(copy)
        write_database(self.people, self.directory / DATABASE)
        database = stack.enter_context(SqlTool(self.directory / DATABASE))
        self.tool = database if self.config.mode == "in-tool" else None

    def _copy_tokenizer(self, copy: Path) -> None:
        source = tokenizer_file(self.located.tokenizer)
        with paths.replacing(copy) as temporary:
            shutil.copyfile(source, temporary)
        if load_tokenizer(str(copy)).name != self.tokenizer.name:
            copy.unlink()
            raise InputError(f"{source} has changed while it was read: give a file that is finished")

    def prepare(
        self,
        device: torch.device,
        compiled: bool,
        ranks: Ranks = ALONE,
        recorded: bool = False,
    ) -> None:
        """Make the data and the trainer; nothing is written."""
        self.ranks = ranks
        self.tool = None
        self.facts = list(self.people.facts())
        probe = self.facts[: self.config.evaluation.questions]
        self.questions = tokenize_people(self.people, self.config.mode, self.tokenizer)
        data, sources = self._dataset()
        self.trainer = Trainer(
            Transformer(self.config.model, torch.Generator().manual_seed(self.config.seed)).to(device),
            data,
            self.config,
            self.directory,
            lambda model: self.recall(model, probe).overall,
            compiled,
            sources,
            ranks,
            recorded,
        )

    def _dataset(self) -> tuple[TokenizedDialogs | ConcatDialogs, list[Source]]:
        """Everything that is trained on: the people's questions, their biographies, and what the files hold."""
        training = self.config.training
        parts, shares = [self.questions], [training.questions]
        if training.biographies:
            parts.append(tokenize_people(self.people, "biography", self.tokenizer))
            shares.append(training.biographies)
        for path, folder in self.files.items():
            parts.append(open_dialogs(folder))
            shares.append(training.files[path])
        sources = [Source(len(part), share) for part, share in zip(parts, shares, strict=True)]
        return ConcatDialogs(parts) if self.files else join(parts), sources

    def recall(self, model: Transformer, questions: list[Fact]) -> Recall:
        return measure_recall(model, questions, self.tokenizer, self.tool)

    def finish(self, ending: Ending) -> None:
        """Measure and save the model, and write the row."""
        model = self.ranks.whole(self.trainer.model)
        self.ranks.first_does(lambda: write_json(self.directory / ROW, self._row(model, ending)))
        if self.ranks.is_first:  # the model is kept, the way to it is not
            checkpoint.delete_steps(self.directory / "checkpoints")

    def _row(self, model: Transformer, ending: Ending) -> dict:
        measured, bits = self.recall(model, self.facts), bits_of_dialogs(model, self.questions)
        asks_unseen = self.config.evaluation.unseen_people > 0
        save_model(model, self.directory / MODEL, self.config, self.tokenizer.name)
        return {
            "run_id": self.config.run_id,
            **_configuration_columns(self.config, self.people),
            "steps_budget": self.trainer.total_steps,
            "n_params": self.config.model.n_params,
            "steps": ending.steps,
            "stopped": ending.stopped,
            "dialogs_seen": ending.dialogs_seen,
            "loss": ending.loss,
            "nll_bits": float(bits.mean()),
            **{f"nll_bits_{a}": float(bits[measured.attributes == a].mean()) for a in self.people.attributes},
            "recall": measured.overall,
            **{f"recall_{attribute}": share for attribute, share in measured.by_attribute().items()},
            "n_questions": len(self.facts),
            **(measure_generalization(model, self.config, self.tokenizer) if asks_unseen else {}),
            "train_seconds": round(ending.seconds, 2),
            "people_digest": self.people.digest(),
            **({} if self.config.tokenizer == "bytes" else {"tokenizer": self.tokenizer.name}),
            **provenance(model.device),
            "config": self.config.canonical_json(),
        }


def stacked_speedup(configs: Sequence[RunConfig], device: str = "auto", steps: int = 3) -> float:
    """How many times as fast all runs are as one stack as one after the other, by a few steps measured here and now.

    One after the other they would be compiled where that pays, which counts as `COMPILED_SPEEDUP`.
    """
    device = resolve_device(device)
    with tempfile.TemporaryDirectory() as folder:
        cells = [_Cell(config, Path(folder) / str(i)) for i, config in enumerate(configs)]
        for cell in cells:
            cell.directory.mkdir()
            cell.prepare(device, compiled=False, recorded=device.type == "cuda" and not cell.files)
        alone = sum(
            _seconds(Lockstep([cell.trainer]), steps)
            / (COMPILED_SPEEDUP if _pays_to_compile(cell.config, device) else 1)
            for cell in cells
        )
        return alone / _seconds(Lockstep([cell.trainer for cell in cells]), steps)


def _seconds(lockstep: Lockstep, steps: int) -> float:
    """Seconds of so many steps after the first ones."""
    for _ in range(1 + WARM_UP if lockstep.recording else 1):
        float(lockstep.step()[-1])  # waits for the device
    return timeit.timeit(lambda: float(lockstep.step()[-1]), number=steps)


def _pays_to_compile(config: RunConfig, device: torch.device) -> bool:
    """Whether a run is long enough for what torch.compile saves to make up for the 10 to 25 seconds that it takes.

    Eager, a core does some 3e10 floating-point operations a second, so the limit is about two minutes. On a GPU steps
    are recorded instead (`lib.training.cuda_graph`).
    """
    return device.type == "cpu" and config.flops() > 4e12 and shutil.which("g++") is not None


def _configuration_columns(config: RunConfig, people: People) -> dict:
    """What tables and figures group by; the whole configuration is in the column `config`."""
    return {
        "mode": config.mode,
        "n_people": len(people),
        "n_facts": people.n_facts,
        "alpha": config.facts.alpha,
        "seed": config.seed,
        "d_model": config.model.d_model,
        "optimizer": config.optim.name,
        "lr": config.optim.lr,
        "batch_size": config.training.batch_size,
        "dtype": config.training.dtype,
    }


def _check_claim(directory: Path, identity: _Identity) -> None:
    """Raise `InputError` unless `directory` is that run's, or free: what begins with a dot does not count."""
    if (directory / CLAIM).exists():
        if read_claim(directory) != identity:
            raise InputError(
                f"{directory} holds a run of another configuration or other people or dialogs or another tokenizer: "
                "give another folder"
            )
    elif directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file: give a new folder")
    elif directory.exists() and any(not path.name.startswith(".") for path in directory.iterdir()):
        raise InputError(f"{directory} is not empty and holds no run: give a new folder")


def read_inputs(config: RunConfig) -> tuple[People, Tokenizer]:
    """The people and the tokenizer of a run, from the files that it names as they are now. Raises `InputError`."""
    people = load_people(config.facts)
    for path, share in config.training.files.items():
        if round(people.n_facts * share / config.training.questions) == 0:
            raise InputError(
                f"training.files: {path} takes {share:g} of the dialogs, "
                f"less than one in a pass over the {people.n_facts} questions: give it a larger share"
            )
    return people, run_tokenizer(config)
