"""Speed against what a user would pick instead: a plain Hugging Face loop for training, `generate` for recall.

Contenders take turns within one run and medians are compared, for machines drift. Needs the extra `[scale]`.
"""

import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from lib import paths
from lib.agent.tools import Tool
from lib.config import RunConfig
from lib.dialogs.templates import answer, in_weight_dialog, question
from lib.dialogs.tokenizers import ByteTokenizer
from lib.dialogs.tokens import TokenizedDialogs, encode_prompt, tokenize_people
from lib.evaluation.recall import BATCH_ROWS, Fact, measure_recall
from lib.facts.database import write_database
from lib.facts.sampling import load_people, sample_people
from lib.figures.style import STYLES, log_ticks, panels
from lib.model.llama import to_llama
from lib.model.transformer import Transformer
from lib.progress import progress
from lib.training.devices import resolve_device
from lib.training.loss import IGNORED
from lib.training.trainer import Trainer


def take_turns(
    contenders: Mapping[str, Callable[[], int]], rounds: int = 5, description: str | None = None
) -> pd.DataFrame:
    """Run every contender once a round, after one round that does not count.

    A contender does some work and returns how many units. Rows: contender, per_second (units, median of the rounds),
    least and most (in the slowest and the fastest round).
    """
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    with progress((rounds + 1) * len(contenders), description) as bar:
        for counted in [False] + [True] * rounds:
            for name, work in contenders.items():
                started = time.perf_counter()
                units = work()
                _finish_device_work()
                if counted:
                    speeds[name].append(units / (time.perf_counter() - started))
                bar.update(1)
    return pd.DataFrame([
        {"contender": name, "per_second": statistics.median(each), "least": min(each), "most": max(each)}
        for name, each in speeds.items()
    ])  # fmt: skip


def _finish_device_work() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# Training -------------------------------------------------------------------------------------------------------------


def training_throughput(
    mode: str,
    d_model: int,
    dtype: str = "float32",
    *,
    batch_size: int = 128,
    steps: int = 10,
    rounds: int = 5,
    compiled: bool = True,
) -> pd.DataFrame:
    """Dialogs a second of our step and of a plain Hugging Face loop, both with fused AdamW.

    `compiled` adds our step with torch.compile, but on a GPU, where ours are replayed. Rows: those of `take_turns`, and
    share_of_peak: the arithmetic a second of the whole model at every token (ours leaves some of it out) over that of a
    large matrix product.
    """
    config = RunConfig.parse({
        "mode": mode,
        "facts": {"n_people": 1024},
        "model": {"d_model": d_model},
        "optim": {"name": "adamw", "lr": 1e-3, "clip_norm": None},
        "training": {"steps": 10**6, "batch_size": batch_size, "dtype": dtype},
    })  # fmt: skip
    data = _dataset(config)
    with tempfile.TemporaryDirectory() as folder:
        contenders = {
            "ours": _our_steps(_trainer(config, folder, data), steps),
            "Hugging Face": _their_steps(config, data, steps),
        }
        if compiled and not torch.cuda.is_available():  # where steps are replayed instead
            contenders["ours, compiled"] = _our_steps(_trainer(config, folder, data, compiled=True), steps)
        table = take_turns(contenders, rounds, f"training {mode}, d = {d_model}, {dtype}")
    flops = 3 * config.model.forward_flops(round(data.lengths().float().mean().item()) - 1)
    share = table.per_second * flops / matrix_product_peak(dtype)
    return table.assign(mode=mode, d_model=d_model, dtype=dtype, share_of_peak=share)


def _dataset(config: RunConfig) -> TokenizedDialogs:
    return tokenize_people(load_people(config.facts), config.mode, ByteTokenizer())


def _trainer(
    config: RunConfig, folder: str | Path, data: TokenizedDialogs, compiled: bool = False, **options
) -> Trainer:
    model = Transformer(config.model, torch.Generator().manual_seed(config.seed))
    on_gpu = torch.cuda.is_available()
    model = model.to("cuda" if on_gpu else "cpu")
    return Trainer(model, data, config, Path(folder), compiled=compiled, cuda_graph=on_gpu and not compiled, **options)


def _our_steps(trainer: Trainer, steps: int) -> Callable[[], int]:
    def work() -> int:
        before = trainer.counters["dialogs_seen"]
        for _ in range(steps):
            trainer.step()
        return trainer.counters["dialogs_seen"] - before

    return work


def _their_steps(config: RunConfig, data: TokenizedDialogs, steps: int) -> Callable[[], int]:
    """A plain training loop on the same architecture: shuffled batches padded to their longest, fused AdamW.

    Padding is on the right, where causal attention needs no mask, which is the faster way for it.
    """
    llama = to_llama(Transformer(config.model, torch.Generator().manual_seed(config.seed))).train()
    llama = llama.to("cuda" if torch.cuda.is_available() else "cpu")
    data = data.to(llama.device)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=config.optim.lr, fused=True)
    rng = np.random.default_rng(config.seed)
    bfloat16 = config.training.dtype == "bfloat16"

    def work() -> int:
        for _ in range(steps):
            rows = torch.from_numpy(rng.choice(len(data), config.training.batch_size, replace=False))
            tokens, mask = data.batch(rows.to(llama.device))
            with torch.autocast(llama.device.type, dtype=torch.bfloat16, enabled=bfloat16):
                loss = llama(input_ids=tokens, labels=tokens.masked_fill(~mask, IGNORED)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return steps * config.training.batch_size

    return work


def matrix_product_peak(dtype: str, size: int = 2048, rounds: int = 5) -> float:
    """Floating-point operations a second of a square matrix product, the best of some."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = torch.randn(2, size, size, dtype=getattr(torch, dtype), device=device)
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        a @ b
        _finish_device_work()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds[1:])


# Recall ---------------------------------------------------------------------------------------------------------------


def learning_curve(config: RunConfig, keep: Sequence[float] = (0.5, 1.0)) -> tuple[pd.DataFrame, list[Transformer]]:
    """Train one model and watch its recall of all its facts.

    Rows: seconds (of training and measuring), steps, recall. Also returns copies of the model as it was when it first
    reached each recall of `keep`, or at the end.
    """
    people = load_people(config.facts)
    facts, tokenizer = list(people.facts()), ByteTokenizer()
    rows: list[tuple[float, int, float]] = []
    kept: dict[float, Transformer] = {}

    def evaluate(model: Transformer) -> float:
        recall = measure_recall(model, facts, tokenizer).overall
        rows.append((time.perf_counter() - started, trainer.counters["step"], recall))
        for level in keep:
            if recall >= level:
                kept.setdefault(level, copy.deepcopy(model).eval())
        return recall

    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(config, folder, _dataset(config), evaluate=evaluate)
        started = time.perf_counter()
        trainer.train(f"learning {len(facts):,} facts")
    table = pd.DataFrame(rows, columns=["seconds", "steps", "recall"])
    return table, [kept.get(level, trainer.model.eval()) for level in keep]


def recall_throughput(
    model: Transformer, facts: Sequence[Fact], tool: Tool | None = None, *, rounds: int = 3
) -> pd.DataFrame:
    """Questions a second of our two ways to measure recall and, without a tool, of `generate` on the same weights.

    Rows: those of `take_turns`, recall, and same_verdicts: whether every question was judged as by "ours, decoding".
    """
    tokenizer, verdicts = ByteTokenizer(), {}

    def ours(name: str, method: str) -> Callable[[], int]:
        def work() -> int:
            verdicts[name] = measure_recall(model, facts, tokenizer, tool, method=method).correct
            return len(facts)

        return work

    contenders = {
        "ours, verifying": ours("ours, verifying", "verify"),
        "ours, decoding": ours("ours, decoding", "decode"),
    }
    if tool is None:
        judge = _hugging_face_judge(model, facts, tokenizer)

        def theirs() -> int:
            verdicts["Hugging Face"] = judge()
            return len(facts)

        contenders["Hugging Face"] = theirs
    table = take_turns(contenders, rounds, f"recall of {len(facts):,} questions")
    reference = verdicts["ours, decoding"]
    return table.assign(
        recall=[verdicts[name].mean() for name in table.contender],
        same_verdicts=[bool((verdicts[name] == reference).all()) for name in table.contender],
    )


def _hugging_face_judge(
    model: Transformer, facts: Sequence[Fact], tokenizer: ByteTokenizer
) -> Callable[[], np.ndarray]:
    """Verdicts from greedy `generate`, prompts of similar length together and padded on the left."""
    batch_size = BATCH_ROWS[model.device.type]  # as many as ours
    llama = to_llama(model).to(model.device)
    prompts = [encode_prompt(in_weight_dialog(*fact)[:1], tokenizer) for fact in facts]
    answers = [[*tokenizer.encode(answer(*fact)), tokenizer.end] for fact in facts]
    order = sorted(range(len(facts)), key=lambda i: len(prompts[i]))
    longest = max(map(len, answers))

    def judge() -> np.ndarray:
        correct = np.zeros(len(facts), dtype=bool)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            length = max(len(prompts[i]) for i in batch)
            tokens = torch.tensor([[0] * (length - len(prompts[i])) + prompts[i] for i in batch], device=llama.device)
            mask = torch.tensor([[j >= length - len(prompts[i]) for j in range(length)] for i in batch]).to(tokens)
            written = llama.generate(
                tokens, attention_mask=mask, max_new_tokens=longest, do_sample=False,
                eos_token_id=tokenizer.end, pad_token_id=tokenizer.end,
            )[:, length:].tolist()  # fmt: skip
            for i, said in zip(batch, written, strict=True):
                correct[i] = said[: len(answers[i])] == answers[i]
        return correct

    return judge


# Fine-tuning: these import the libraries of Section 6 when they are called -------------------------------------------


def finetuning_throughput(
    base: str, mode: str, *, n_facts: int = 100, batch_size: int = 16, steps: int = 2, rounds: int = 3
) -> pd.DataFrame:
    """Tokens a second of our fine-tuning and of trl's plain `SFTTrainer`: same model, conversations, batch and dtype.

    Tokens are those of the conversations, padding not counted. Rows: those of `take_turns`.
    """
    from transformers import AutoModelForCausalLM
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from lib.finetune import models, train
    from lib.finetune.conversations import chats, people_of
    from lib.finetune.tokens import tokenize_chats

    source, device = models.base_source(base), resolve_device("auto")
    tokenizer = models.load_tokenizer(source)
    data = tokenize_chats(chats(people_of(n_facts), mode), tokenizer, max_length=2048)
    per_round = round(steps * batch_size * np.mean([len(row) for row in data["input_ids"]]))
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            max_length=None,
            bf16=train.best_dtype(device) == torch.bfloat16,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda",
            activation_checkpointing=False,  # trl's default would read everything twice
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
        )
        sides = {
            "ours": (train.ChatTrainer, models.load_model(source, dtype=torch.float32)),
            "SFTTrainer": (SFTTrainer, AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)),
        }
        trainers = {
            name: kind(model, arguments, train_dataset=data, processing_class=tokenizer)
            for name, (kind, model) in sides.items()
        }
        for trainer in trainers.values():
            trainer.remove_callback(PrinterCallback)
        work = {name: (lambda each=each: each.train() and per_round) for name, each in trainers.items()}
        table = take_turns(work, rounds, f"fine-tuning {base}, {mode}")
    return table.assign(base=base, mode=mode)


def chat_recall_throughput(base: str, *, n_facts: int = 300, rounds: int = 2) -> pd.DataFrame:
    """Questions a second, of facts in weights: our measure of recall, and `generate` on batches of 16 as they come.

    Asked is a model that was fine-tuned for eight steps: it knows hardly any fact, but its answers end. Rows: those of
    `take_turns`, and `recall`.
    """
    from lib.finetune import models, tasks, train
    from lib.finetune.config import FinetuneConfig
    from lib.finetune.conversations import chats, people_of
    from lib.finetune.tokens import tokenize_chats

    config = FinetuneConfig(
        base=base, mode="in-weight", n_facts=n_facts, batch_size=16, steps=8, checkpoint_every=8, questions=4,
        unseen_people=4, prompts=1, capability="none", max_length=2048,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        train.finetune(config, Path(folder), description=f"fine-tuning {base} for a moment")
        dtype = train.best_dtype(resolve_device("auto"))
        model = models.load_model(Path(folder) / "model", dtype=dtype)
        tokenizer = models.load_tokenizer(Path(folder) / "model")
    facts, recall = list(people_of(n_facts).facts()), {}
    data = tokenize_chats(chats(people_of(n_facts), "in-weight"), tokenizer, max_length=2048)
    limit = train.turn_limit(data)

    def ours() -> int:
        found = tasks.measure_recall(model, tokenizer, facts, "in-weight", max_new_tokens=limit)
        recall["ours"] = sum(recalled for _, recalled in found) / len(found)
        return len(facts)

    def theirs() -> int:
        tokenizer.padding_side, right = "left", 0
        for start in range(0, len(facts), 16):
            batch = facts[start : start + 16]
            asked = [[{"role": "user", "content": question(name, attribute)}] for name, attribute, _ in batch]
            inputs = tokenizer.apply_chat_template(
                asked, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
            ).to(model.device)
            written = model.generate(**inputs, max_new_tokens=128, do_sample=False)
            replies = tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            right += sum(tasks.says(reply, value) for reply, (*_, value) in zip(replies, batch, strict=True))
        recall["generate"] = right / len(facts)
        return len(facts)

    table = take_turns({"ours": ours, "generate": theirs}, rounds, f"recall of {len(facts)} facts")
    return table.assign(recall=[recall[name] for name in table.contender])


def cold_start(config: RunConfig) -> dict:
    """Seconds that `itl train` takes in a new process, from its start to its end, with the row it leaves."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(config.canonical_json())
        started = time.perf_counter()
        command = [sys.executable, "-m", "lib", "train", "--config", str(path), "--out", str(Path(folder) / "run")]
        subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=paths.ROOT)  # errors are for all to see
        seconds = time.perf_counter() - started
        return {"wall_seconds": seconds, **json.loads((Path(folder) / "run" / "row.json").read_text())}


# Growth with the facts ------------------------------------------------------------------------------------------------


def growth(n_people: Sequence[int], d_model: int = 32, *, steps: int = 10, rounds: int = 5) -> pd.DataFrame:
    """What a training step and the data in memory cost as the database grows, in-weight.

    Rows: those of `take_turns` for each number of people, n_facts, microseconds a dialog, and megabytes that the
    tokenized dialogs take.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for n in n_people:
            config = RunConfig.parse({
                "facts": {"n_people": n}, "model": {"d_model": d_model}, "training": {"steps": 10**6},
            })  # fmt: skip
            trainers[str(n)] = _trainer(config, Path(folder) / str(n), _dataset(config))
        table = take_turns({n: _our_steps(trainer, steps) for n, trainer in trainers.items()}, rounds, "growth")
        size = [sum(t.nbytes for t in vars(trainers[n].data).values()) / 1e6 for n in table.contender]
    return table.assign(n_facts=[4 * n for n in n_people], microseconds=1e6 / table.per_second, megabytes=size)


def data_speed(n_people: int) -> pd.DataFrame:
    """Seconds to sample people, to store them in SQLite, and to tokenize their dialogs in both modes."""
    rows = []

    def measure(task: str, work: Callable):
        started = time.perf_counter()
        result = work()
        rows.append({"task": task, "seconds": time.perf_counter() - started})
        return result

    people = measure("sample", lambda: sample_people(n_people))
    with tempfile.TemporaryDirectory() as folder:
        measure("store in SQLite", lambda: write_database(people, Path(folder) / "people.sqlite"))
    for mode in ("in-weight", "in-tool"):
        data = measure(f"tokenize, {mode}", lambda mode=mode: tokenize_people(people, mode, ByteTokenizer()))
        rows[-1]["gigabytes"] = sum(tensor.nbytes for tensor in vars(data).values()) / 1e9
        del data
    return pd.DataFrame(rows).assign(n_people=n_people)


_CONTENDERS = {
    "ours": {"linestyle": "--", "alpha": 0.7},
    "ours, compiled": {"linestyle": "-"},
    "Hugging Face": {"linestyle": ":", "markerfacecolor": "white"},
}


def performance(training: pd.DataFrame, curve: pd.DataFrame, growth: pd.DataFrame) -> Figure:
    """Draw the speed that was measured: throughput and share of the matrix-product peak against size, time to recall,
    and the cost of a dialog against the number of facts.

    training: tables of `training_throughput`, concatenated; curve: of `learning_curve`; growth: of `growth`. Bars go
    from the slowest to the fastest round.
    """
    with panels((8.6, 6.2), 2, 2) as (figure, ((speed, share), (recall, cost))):
        for (mode, contender), rows in training[training.dtype == "float32"].groupby(["mode", "contender"]):
            style = {**STYLES[mode], **_CONTENDERS[contender]}
            bars = [rows.per_second - rows.least, rows.most - rows.per_second]
            speed.errorbar(rows.d_model, rows.per_second, yerr=bars, label=f"{mode}, {contender}", **style)
            share.plot(rows.d_model, rows.share_of_peak, **style)
        speed.set(yscale="log", ylabel="dialogs trained a second", title="throughput")
        sizes = sorted(training.d_model.unique())
        for axes in (speed, share):
            axes.set(xscale="log", xlabel="d_model")
            axes.set_xticks(sizes, sizes)
            axes.minorticks_off()
        speed.set_ylim(top=2.5 * training.most.max())  # room for the legend
        log_ticks(speed.yaxis, training.per_second)
        speed.yaxis.set_major_formatter("{x:,.0f}")
        speed.legend(fontsize=6.5, ncols=2, loc="upper center")
        share.set(ylabel="share of the peak", title="the model's FLOP/s over those of a matrix product")
        share.set_ylim(bottom=0)
        recall.plot(curve.seconds, curve.recall, color=STYLES["in-weight"]["color"])
        recall.axhline(0.95, color="#999999", linewidth=0.8, linestyle="--")
        recall.set(xlabel="seconds of training", ylabel="recall", ylim=(-0.03, 1.06), title="time to recall, in-weight")
        slowest, fastest = 1e6 / growth.least, 1e6 / growth.most
        bars = growth.microseconds - fastest, slowest - growth.microseconds
        cost.errorbar(growth.n_facts, growth.microseconds, yerr=bars, **STYLES["in-weight"])
        cost.set(xscale="log", xlabel="facts", ylabel="microseconds a dialog", ylim=(0, 1.3 * slowest.max()))
        cost.set_title("a step does not grow with the facts")
    return figure
