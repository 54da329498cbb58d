"""The commands of `itl` about models that others trained (Section 6). All need the extra `[scale]`."""

from pathlib import Path
from typing import Annotated

import typer

from lib import paths
from lib.base import InputError
from lib.options import Device, assignment, console, with_options


def finetuning(
    model: Annotated[
        str | None, typer.Option(help="embedded, a published one as SmolLM-135M, a folder, or a name on the hub")
    ] = None,
    mode: Annotated[str | None, typer.Option(help="in-weight, in-tool, or in-tool-text (no native tool calls)")] = None,
    facts: Annotated[int | None, typer.Option(help="how many facts, four a person")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="train adapters of this rank [default: all weights]")] = None,
    lr: Annotated[float | None, typer.Option(help="[default: the base's published rate]")] = None,
    steps: Annotated[int | None, typer.Option(help="at most [default: 100 passes]")] = None,
    seed: Annotated[int | None, typer.Option(help="of the people and the data order")] = None,
    set_: Annotated[list[str], typer.Option("--set", help="any other field, as batch_size=32")] = [],  # noqa: B006
):
    """The configuration of one fine-tuning."""
    from lib.finetune.config import FinetuneConfig

    fields = {
        "base": model,
        "mode": mode,
        "n_facts": facts,
        "lora_rank": lora_rank,
        "lr": lr,
        "steps": steps,
        "seed": seed,
    }
    given = {name: value for name, value in fields.items() if value is not None}
    return FinetuneConfig.parse(given | dict(map(assignment, set_)))


def finetune_folder(config, out: Path | None) -> Path:
    return out or paths.runs() / "finetune" / config.run_id


@with_options(config=finetuning)
def finetune(
    config,
    out: Annotated[Path | None, typer.Option(help="folder of the run [default: runs/finetune/<run id>]")] = None,
    device: Device = "auto",
) -> None:
    """Fine-tune a chat model on facts, and evaluate every checkpoint (extra `[scale]`).

    The same command goes on where it was interrupted. Started by torchrun or accelerate, several processes train it
    together.
    """
    from lib.distributed import is_first
    from lib.finetune.experiments import title
    from lib.finetune.train import finetune as run

    console.quiet = not is_first()
    directory = finetune_folder(config, out)
    console.print(f"run {config.run_id}: {title(config)}")
    rows = run(config, directory, device=device, description="fine-tuning" if is_first() else None)
    columns = {"recall": "recall", "recall_unseen": "of unseen", "capability": "capability", "tv": "total variation"}
    for row in rows:
        measured = [f"{said} {row[name]:.3f}" for name, said in columns.items() if row[name] is not None]
        console.print(f"step {row['step']:>6,}: {', '.join(measured)}")
    console.print(f"model and rows: {directory}")


def sweep(profile: str, jobs: int | None, dry_run: bool, max_hours: float, device: str, publish: bool) -> None:
    """`itl sweep 06`: the fine-tunings of a profile."""
    from lib import results
    from lib.finetune import experiments

    if jobs not in (None, 1):
        raise InputError("section 06 runs one fine-tuning at a time: for more, start the same command again beside it")
    if publish:
        results.check_publishes(profile)
        results.check_traceable()
    if not dry_run:
        console.print(f"{experiments.sweep(profile, device=device, max_hours=max_hours)} runs done now")
    left = experiments.missing(profile)
    console.print(
        f"{len(left)} of {len(experiments.plan(profile))} fine-tunings are ahead" if left else "nothing is missing"
    )
    for config in left:
        console.print(f"  {experiments.title(config)}")
    if publish and not dry_run:
        console.print(f"{experiments.publish(profile)} new rows in {experiments.table_path()}")
