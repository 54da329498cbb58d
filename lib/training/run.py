"""`run(config, directory) -> row`: one run from facts to result, the function that every launcher calls.

The folder of a run holds `config.json`, `people.sqlite`, copies of the files with its people and its tokenizer,
`metrics.jsonl`, `checkpoints/`, and once it is finished `model/` (weights alone) and `row.json`; beside them, what
observers write (`lib.config.Observers`) and `evaluations.jsonl` (`lib.training.watch`). A finished run is never
repeated; a killed one resumes.
"""

import copy
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import torch

from lib.agent.tools import Tool, open_tool
from lib.base import InputError
from lib.config import FINISHED, UNOBSERVED, Observers, RunConfig, check_row, read_row
from lib.dialogs.batches import Source
from lib.dialogs.files import read_dialogs
from lib.dialogs.templates import dialogs
from lib.dialogs.tokenizers import Tokenizer, tokenizer_file
from lib.dialogs.tokens import TokenizedDialogs, join, tokenize
from lib.evaluation.generalization import measure_generalization
from lib.evaluation.recall import bits_of_dialogs, measure_recall
from lib.facts.csv import write_people_csv
from lib.facts.database import write_database
from lib.facts.people import People
from lib.facts.sampling import load_people
from lib.model.transformer import Transformer
from lib.paths import CLAIM, DATABASE, MODEL, ROW, replacing, write_json
from lib.provenance import commit, provenance
from lib.training import checkpoint
from lib.training.devices import fastest_threads, resolve_device, usable_cores, use_full_float32, using_threads
from lib.training.distributed import asked_to_leave, connect, exiting_at_once, local_device, world_size
from lib.training.monitor import check_observers
from lib.training.saved import Claim, check_claim, located, locked, own_files, read_claim, run_tokenizer, save_model
from lib.training.trainer import Ending, Trainer


def run(
    config: RunConfig,
    directory: Path,
    *,
    device: str = "auto",
    description: str | None = None,
    observers: Observers = UNOBSERVED,
    sharded: bool = False,
    tensor: int = 1,
    inputs: Mapping[str, str] = {},
    threads: int | None = None,
) -> dict:
    """Train and measure one model; return its row (see `paper_data/README.md` for the columns).

    A single process compiles the steps of a long run on a CPU (torch.compile); on a GPU it replays a CUDA graph
    (not with files).
    observers: extra logging. It does not change training, except that probes turn off both, which changes rounding.
    Several processes may train one run; all of them call this, and sharded and tensor set their parallelism
    (`lib.training.distributed.connect`). inputs: current paths of files, by the paths in the configuration. threads: of
    the CPU; None: see `_choose_threads`.

    Raises `InputError`, before training, if the directory belongs to another configuration, people, tokenizer or
    files; and `WorkError` (`Preempted` is one) if training could not go on: the same call continues it.
    """
    device, directory = local_device(resolve_device(device)), Path(directory)
    check_observers(observers)
    if observers.probe_every and world_size() > 1:
        raise InputError("probes need a model that is not compiled, in a single process")
    use_full_float32()
    commit()  # records the imported code, whatever is committed while the run trains
    config_here = located(config, inputs)
    people, tokenizer = read_inputs(config_here)
    with ExitStack() as stack:
        files = {path: read_dialogs(inputs.get(path, path), tokenizer) for path in sorted(config.training.files)}
        # In the form of earlier versions, so that their unfinished runs resume.
        hashes = {path: f"{digest[:32]}-{tokenizer.name}-1" for path, (_, digest) in files.items()}
        claim = Claim(config, people.digest(), hashes, tokenizer.name, threads)
        check_claim(directory, claim)
        ranks = stack.enter_context(connect(device, config.model, sharded, tensor))
        lock = locked(directory)
        ranks.first_does(lambda: stack.enter_context(lock) or check_claim(directory, claim))
        if not ranks.first_does((directory / ROW).exists):
            # Prepare: nothing is written, and bad input is refused before the folder is claimed.
            data, sources = _dataset(config, people, tokenizer, files)
            model = Transformer(config.model, torch.Generator().manual_seed(config.seed)).to(device)
            threads = threads or _choose_threads(
                directory, device, lambda: Trainer(copy.deepcopy(model), data, config, directory, sources=sources)
            )
            stack.enter_context(using_threads(threads))
            plain = ranks.size == 1 and not observers.probe_every  # a compiled or replayed step would call no hooks
            compiled = plain and _pays_to_compile(config, people, device)
            if compiled:
                torch.compiler.reset()  # earlier runs' shapes count against the recompile limit
            # Dialogs of files may be very long, and a CUDA graph pads all batches to the longest.
            replayed = plain and device.type == "cuda" and not (compiled or files)
            trainer = Trainer(model, data, config, directory, None, compiled, sources, ranks, replayed)

            ranks.first_does(lambda: _claim(directory, replace(claim, threads=threads), config_here, people))
            tool = stack.enter_context(open_tool(config.mode, directory / DATABASE)) if ranks.rank == 0 else None
            some = list(islice(people.facts(), config.evaluation.questions))
            trainer.evaluate = lambda model: measure_recall(model, some, tokenizer, tool).overall
            with asked_to_leave() as asked:  # elsewhere a signal ends the process: nothing is lost
                ending = trainer.train(description, observers, asked)

            model = ranks.full_model(trainer.model)

            @exiting_at_once()
            def measure() -> None:
                row = _row(model, config, people, tokenizer, tool, ending, trainer.total_steps)
                check_row(row, FINISHED)
                save_model(model, directory / MODEL, config, tokenizer.name)
                write_json(directory / ROW, row)

            ranks.first_does(measure)
        ranks.first_does(lambda: checkpoint.delete_steps(directory / "checkpoints"))
        return ranks.first_does(lambda: read_row(directory / ROW))


def read_inputs(config: RunConfig) -> tuple[People, Tokenizer]:
    """Return the people and the tokenizer of a run, from the files that it names as they are now.

    Raises `InputError` if they cannot be read, or a file of dialogs gives less than one dialog per pass.
    """
    people = load_people(config.facts)
    for path, share in config.training.files.items():
        if round(people.n_facts * share / config.training.questions) == 0:
            raise InputError(f"training.files: {path}: {share:g} is less than one dialog a pass, give a larger share")
    return people, run_tokenizer(config)


def _dataset(
    config: RunConfig, people: People, tokenizer: Tokenizer, files: Mapping[str, tuple[TokenizedDialogs, str]]
) -> tuple[TokenizedDialogs, list[Source]]:
    """Return all dialogs that are trained on: questions about the people, their biographies, and those of files."""
    training = config.training
    texts, sources = dialogs(people, config.mode), [Source(people.n_facts, training.questions)]
    if training.biographies:
        texts = chain(texts, dialogs(people, "biography"))
        sources.append(Source(len(people), training.biographies))
    parts = [tokenize(texts, tokenizer, training.repeats)]
    for path, (part, _) in files.items():
        parts.append(part)
        sources.append(Source(len(part), training.files[path]))
    return join(parts) if files else parts[0], sources


def _choose_threads(directory: Path, device: torch.device, trial: Callable[[], Trainer]) -> int:
    """Return a run's number of threads: what it began with, at most the cores there are; else what is set.

    If neither gives one, a new run on a CPU measures the fastest number, in a few steps of `trial`.
    """
    given = torch.get_num_threads()
    if (directory / CLAIM).exists():  # of a run that may have begun on a larger machine, or with fewer processes
        return min(read_claim(directory).threads or given, given if world_size() > 1 else usable_cores())
    most = min(given, usable_cores())
    if most == 1 or "OMP_NUM_THREADS" in os.environ or device.type != "cpu" or world_size() > 1:
        return given
    return fastest_threads(trial().step, most)


def _pays_to_compile(config: RunConfig, people: People, device: torch.device) -> bool:
    """Return whether a run is long enough for torch.compile to save the 10 to 25 seconds that it takes.

    Without it a core does some 3e10 FLOP/s, so the limit is about two minutes.
    """
    return device.type == "cpu" and config.flops(people.n_facts) > 4e12 and shutil.which("g++") is not None


def _claim(directory: Path, claim: Claim, config_here: RunConfig, people: People) -> None:
    """Write the run's claim, people and tokenizer into its folder: its model needs no file outside."""
    own, is_new = own_files(directory, claim.config), not (directory / CLAIM).exists()
    if is_new:  # the number of threads stays that of the first start
        write_json(directory / CLAIM, {**vars(claim), "config": claim.config.model_dump(mode="json")})
    try:
        write_database(people, directory / DATABASE)  # anew, for it may have been changed
        if own.facts.csv is not None:
            write_people_csv(people, own.facts.csv)
        if own.tokenizer != "bytes":
            with replacing(Path(own.tokenizer)) as temporary:
                shutil.copyfile(tokenizer_file(config_here.tokenizer), temporary)
    except BaseException:
        if is_new:  # a refused run claims no folder
            (directory / CLAIM).unlink()
        raise


def _row(
    model: Transformer,
    config: RunConfig,
    people: People,
    tokenizer: Tokenizer,
    tool: Tool | None,
    ending: Ending,
    steps_budget: int,
) -> dict:
    """Measure the model; return what tables and figures group by, and what they show."""
    measured = measure_recall(model, list(people.facts()), tokenizer, tool)
    bits = bits_of_dialogs(model, measured.dialogs)
    return {
        "run_id": config.run_id,
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
        "steps_budget": steps_budget,
        "n_params": config.model.n_params,
        "steps": ending.steps,
        "stopped": ending.stopped,
        "dialogs_seen": ending.dialogs_seen,
        "loss": ending.loss,
        "nll_bits": float(bits.mean()),
        **{f"nll_bits_{a}": float(bits[measured.attributes == a].mean()) for a in people.attributes},
        **measured.columns(),
        "n_questions": people.n_facts,
        **(measure_generalization(model, config, tokenizer) if config.evaluation.unseen_people else {}),
        "train_seconds": round(ending.seconds, 2),
        "people_digest": people.digest(),
        **({} if config.tokenizer == "bytes" else {"tokenizer": tokenizer.name}),
        **provenance(model.device),
        "config": config.canonical_json(),
    }
