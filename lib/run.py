"""`run(config, directory) -> row`: one cell from facts to result, what every launcher calls.

The folder of a run holds `config.json`, `people.sqlite`, copies of the files that say who its people and what its
tokens are, `metrics.jsonl`, `checkpoints/`, and once it is finished `model/` (weights alone) and `row.json`; beside
them, what observers write (`lib.monitor.Observers`) and `evaluations.jsonl` (`lib.evaluation`). A finished run is never
repeated; one that was killed goes on.
"""

import errno
import json
import platform
import shutil
import subprocess
import tempfile
import timeit
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

from lib import checkpoint, paths
from lib.base import InputError, WorkError, to_json
from lib.capture import WARM_UP
from lib.config import RunConfig
from lib.dialogs import Source, TokenizedDialogs, Tokenizer, join, tokenize_people
from lib.distributed import ALONE, Preempted, Ranks, asked_to_leave, connect, local_device, world_size
from lib.facts import People, load_people, write_database, write_people_csv
from lib.generalization import measure_generalization
from lib.model import ModelConfig, Transformer
from lib.monitor import UNOBSERVED, Observers
from lib.recall import Fact, Recall, bits_of_dialogs, measure_recall
from lib.shards import ConcatDialogs, open_dialogs, tokenize_file
from lib.tokenizers import load_tokenizer, run_tokenizer, tokenizer_file
from lib.tools import SqlTool
from lib.trainer import Ending, Lockstep, Trainer, train_together

#: How many times as fast a compiled step is, about (notebooks/A2_performance measures it).
COMPILED_SPEEDUP = 1.4
CLAIM, DATABASE, ROW, MODEL = "config.json", "people.sqlite", "row.json", "model"
ROWS = "rows.json"  # of a fine-tuning: a row a checkpoint
#: Copies, in a run's folder, of files that its configuration names: what becomes of those does not matter to it.
PEOPLE, TOKENIZER = "people.csv", "tokenizer"  # and the suffix of its kind
#: In the root of a copy of the code: the commit it was copied from.
COMMIT = "COMMIT"


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
    is probed; on a GPU steps are recorded instead (`lib.capture`). observers: what else watches, without changing what
    is learned, but for rounding where it keeps a GPU's steps from being recorded. A single run may be trained by
    several processes, which all call this: sharded and tensor say how (`lib.distributed.connect`). inputs: where files
    lie now, by the paths that configurations name them by.

    Raises `InputError` if a directory belongs to another configuration, people, tokens or files; then nothing was
    trained; and `WorkError`, `Preempted` among them, if training could not go on: the same call does from where it was.
    """
    device = local_device(resolve_device(device))
    observers.check()
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
    are recorded instead (`lib.capture`).
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


#: Configuration, digest of the people, tokens of the files by path, name of the tokenizer.
_Identity = tuple[RunConfig, str, dict[str, str], str]


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


def read_claim(directory: Path) -> _Identity:
    """What a run's folder was claimed with."""
    try:
        claim = json.loads((directory / CLAIM).read_text())
        config = RunConfig.parse(claim["config"])
        return config, claim["people_digest"], claim.get("files", {}), claim.get("tokenizer", "bytes")
    except (OSError, ValueError, KeyError, TypeError):  # `InputError` among them: fields of another version
        raise InputError(f"{directory} is not the folder of a run ({CLAIM} is missing or not readable)") from None


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


def _located(config: RunConfig, inputs: Mapping[str, str]) -> RunConfig:
    """`config` with its people and tokens where they lie now, by the paths that it names them by."""
    facts = config.facts.model_copy(update={"csv": inputs.get(config.facts.csv, config.facts.csv)})
    return config.model_copy(update={"facts": facts, "tokenizer": inputs.get(config.tokenizer, config.tokenizer)})


def _own_paths(directory: Path, config: RunConfig) -> dict[str, Path]:
    """Where a run's folder has its copies of people and tokens, by the paths that the configuration names."""
    own = {}
    if config.facts.csv is not None:
        own[config.facts.csv] = directory / PEOPLE
    if config.tokenizer != "bytes":
        kind = ".tiktoken" if config.tokenizer.endswith(".tiktoken") else ".json"
        own[config.tokenizer] = directory / f"{TOKENIZER}{kind}"
    return own


def own_files(folder: Path, config: RunConfig) -> RunConfig:
    """`config` with the copies that a run's folder, or that of its model, has in place of the files that it names."""
    own = _own_paths(_run_folder(folder), config)
    return _located(config, {path: str(copy) for path, copy in own.items() if copy.exists()})


def _run_folder(folder: Path) -> Path:
    """The folder of the run whose folder, or whose model's folder, that is."""
    return folder.parent if folder.name == MODEL and (folder.parent / CLAIM).exists() else folder


def read_people(folder: Path, config: RunConfig) -> People:
    """Whom the model in a run's folder was trained on, whatever has become of the file that they came from.

    Raises `InputError` if that cannot be told: the folder has no copy, and the file is gone or holds others.
    """
    directory = _run_folder(Path(folder))
    people = load_people(own_files(directory, config).facts)
    for record in (CLAIM, ROW):
        with suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads((directory / record).read_text())["people_digest"] != people.digest():
                break
    else:
        return people
    raise InputError(
        f"{config.facts.csv or 'this version'} holds other people now than the run in {folder} is about: restore it"
    )


def save_model(model: Transformer, folder: Path, config: RunConfig, tokenizer: str = "bytes") -> None:
    """Write the weights alone, with the configuration that made them and the name of its tokenizer."""
    checkpoint.save(folder, model.state_dict(), {"config": config.model_dump(mode="json"), "tokenizer": tokenizer})


def load_model(folder: Path, device: str = "auto") -> tuple[Transformer, RunConfig]:
    """The model of a run's folder, or of a folder that `save_model` wrote, ready to be asked."""
    home = folder = Path(folder)
    if (folder / MODEL).is_dir():
        folder = folder / MODEL
    device = resolve_device(device)
    tensors, state = checkpoint.load(folder)
    config = RunConfig.parse(state["config"])
    if run_tokenizer(own_files(home, config)).name != state.get("tokenizer", "bytes"):
        raise InputError(f"{config.tokenizer} is not what the model in {folder} was trained with: give that file again")
    model = Transformer(config.model)
    try:
        model.load_state_dict(tensors)
    except RuntimeError:
        raise InputError(f"the weights in {folder} do not fit its configuration of the model") from None
    return model.to(device).eval(), config


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one; a device that this machine does not have is an `InputError`."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        probe = torch.zeros(1, device=device)
        probe.item()  # "meta" fails here
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"this machine has no device {device!r}: use auto or cpu") from None


def provenance(device: torch.device) -> dict:
    """Where a number comes from: time, machine, versions, commit."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }


@cache
def commit() -> str:
    """The commit of the code, marked `-dirty` if lib differs from it; `unknown` outside a git checkout of it.

    A copy of the code (`lib.submissions.snapshot`) has a file that says what it was copied from. A copy without one may
    lie in the checkout of something else, whose commit says nothing about it.
    """
    if (paths.ROOT / COMMIT).exists():
        return (paths.ROOT / COMMIT).read_text().strip()
    try:
        if not paths.ROOT.samefile(_git("rev-parse", "--show-toplevel")) or not _git("ls-files", "--", "lib"):
            return "unknown"
        head = _git("rev-parse", "HEAD")
        return f"{head}-dirty" if _git("status", "--porcelain", "--", "lib") else head
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(paths.ROOT), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def write_json(path: Path, content: dict | list) -> None:
    """Write JSON under a temporary name, then rename: the file is whole or absent."""
    with paths.replacing(path) as temporary:
        temporary.write_text(to_json(content, indent=1))
