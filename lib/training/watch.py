"""Recall during training, measured by another process from the checkpoints of the run."""

import time
from collections.abc import Collection, Iterator
from pathlib import Path

from lib.agent.tools import open_tool
from lib.base import InputError
from lib.config import RunConfig, read_row
from lib.evaluation.recall import bits_of_dialogs, measure_recall
from lib.model.transformer import Transformer
from lib.paths import DATABASE, ROW, only_process
from lib.training import checkpoint
from lib.training.devices import resolve_device
from lib.training.monitor import Record
from lib.training.saved import load_model, own_files, read_claim, read_people, run_tokenizer, with_weights


def evaluate_checkpoints(directory: Path, device: str = "auto", watch: bool = False) -> Iterator[dict]:
    """Measure every whole checkpoint of a run once, and the model of a finished run, over all facts.

    Yields {"step", "recall", "recall_ATTRIBUTE" for each, "nll_bits"}, as in a row, and appends it to
    evaluations.jsonl in the run's folder. With `watch` it continues until the run has its row. Checkpoints that are
    incomplete or damaged are skipped, and so are those that retention deletes before they are read. Raises
    `InputError` if the folder holds no run, or as `read_people` does.
    """
    directory, device = Path(directory), resolve_device(device)
    config = read_claim(directory).config
    people, tokenizer = read_people(directory, config), run_tokenizer(own_files(directory, config))
    facts = list(people.facts())
    with (
        only_process(directory / ".evaluations.lock"),  # a second process waits and finds everything measured
        Record(directory / "evaluations.jsonl") as record,
    ):
        while True:
            finished = (directory / ROW).exists()  # checked first, so that no later checkpoint is missed
            for step, model in _not_yet(directory, config, record.steps):
                with open_tool(config.mode, directory / DATABASE) as tool:
                    measured = measure_recall(model.to(device), facts, tokenizer, tool)
                bits = float(bits_of_dialogs(model, measured.dialogs).mean())
                line = {"step": step, **measured.columns(), "nll_bits": bits}
                record.write(**line)
                yield line
            if finished or not watch:
                return
            time.sleep(1)


def _not_yet(directory: Path, config: RunConfig, measured: Collection[int]) -> Iterator[tuple[int, Transformer]]:
    """Yield step and model of each checkpoint of a run that is not measured yet."""
    for folder in checkpoint.steps(directory / "checkpoints"):
        step = checkpoint.step_of(folder)
        if step in measured:
            continue
        try:
            tensors, _ = checkpoint.load(folder)
        except InputError:  # damaged, or deleted by now
            continue
        prefix = "model."
        weights = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        yield step, with_weights(config.model, weights, folder)
    if (directory / ROW).exists():  # then there may be no checkpoints any more
        step = read_row(directory / ROW)["steps"]
        if step not in measured:
            yield step, load_model(directory)[0]
