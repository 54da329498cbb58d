"""What is trained of a batch: the loss is that of transformers, whatever is read once; and what is in a batch."""

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from chat_models import FAMILIES, tiny
from trl import SFTConfig

from lib.finetune.config import FinetuneConfig
from lib.finetune.conversations import chats, people_of
from lib.finetune.models import base_source, load_model, load_tokenizer
from lib.finetune.tokens import tokenize_chats
from lib.finetune.train import ChatTrainer, LikeLengths, finetune
from lib.training.loss import IGNORED

VOCABULARY = 60
#: How many tokens the rows begin with in common, what follows in each, and from where on about half is trained.
BATCHES = {
    "a long beginning in common": (40, [9, 3, 17], 40),
    "trained within what is common": (40, [9, 3, 17], 20),
    "nothing in common": (0, [30, 24, 9], 5),
    "one row": (12, [9], 12),
    "equal rows": (25, [0, 0], 10),
}


def batch(common: int, lengths: Sequence[int], first: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    beginning = torch.randint(10, VOCABULARY, (common,))
    # What is a row's own begins with its number.
    own = [torch.randint(10, VOCABULARY, (n,)).index_fill(0, torch.arange(min(n, 1)), i) for i, n in enumerate(lengths)]
    rows = [torch.cat([beginning, each]) for each in own]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    trained = mask.bool() & (torch.rand(tokens.shape) < 0.5) & (torch.arange(tokens.shape[1]) >= first)
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.where(trained, IGNORED)}


def gradients(model, *losses) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for loss in losses:
        loss().backward()
    return {name: weights.grad.clone() for name, weights in model.named_parameters()}


def ours(model, inputs, **options) -> torch.Tensor:
    trainer = SimpleNamespace(accelerator=SimpleNamespace(num_processes=1))
    return ChatTrainer.compute_loss(trainer, model, inputs, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", BATCHES)
def test_loss_and_gradients_are_those_of_transformers(family, case):
    model, inputs, read = tiny(family, VOCABULARY).train(), batch(*BATCHES[case]), []
    plain = model(**inputs).loss
    expected = gradients(model, lambda: plain)
    model.register_forward_pre_hook(lambda *given: read.append(given[-1]["input_ids"].numel()), with_kwargs=True)
    loss = ours(model, inputs, num_items_in_batch=(inputs["labels"][:, 1:] != IGNORED).sum())
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(model, lambda: loss), expected, rtol=1e-5, atol=1e-5)
    assert (sum(read) < inputs["input_ids"].numel()) == (case not in ("nothing in common", "one row"))


def test_parts_of_a_batch_have_its_gradients_together():
    model, inputs = tiny("Llama", VOCABULARY).train(), batch(20, [9, 3, 17], 20)
    n = (inputs["labels"] != IGNORED).sum()
    parts = [{name: each[rows] for name, each in inputs.items()} for rows in (slice(0, 2), slice(2, 3))]
    made = gradients(model, *(lambda part=part: ours(model, part, num_items_in_batch=n) for part in parts))
    torch.testing.assert_close(made, gradients(model, lambda: model(**inputs).loss), rtol=1e-5, atol=1e-5)


def test_a_pass_is_of_all_rows_by_length_within_a_batch_and_another_each_time():
    lengths = torch.randint(1, 50, (23,), generator=torch.Generator().manual_seed(0)).tolist()

    def order(seed: int, epoch: int) -> list[int]:
        sampler = LikeLengths(lengths, 5, seed)
        sampler.set_epoch(epoch)
        assert len(sampler) == 23
        return list(sampler)

    orders = [order(seed, epoch) for seed in range(2) for epoch in range(3)]
    assert all(sorted(each) == list(range(23)) for each in orders) and len(set(map(tuple, orders))) == 6
    for each in orders:
        batches = [[lengths[i] for i in each[start : start + 5]] for start in range(0, 23, 5)]
        assert batches == list(map(sorted, batches)) and sum(batches, []) != sorted(lengths)
    assert order(1, 2) == orders[-1]


def test_a_training_takes_every_conversation_once_a_pass_in_batches_of_like_parts(tmp_path):
    seen: list[list[list[int]]] = []

    class Watched(ChatTrainer):
        def compute_loss(self, model, inputs, **options):
            pairs = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
            seen.append([row[mask].tolist() for row, mask in pairs])
            return super().compute_loss(model, inputs, **options)

    tokenizer = load_tokenizer(base_source("random"))
    data = tokenize_chats(chats(people_of(16), "in-weight"), tokenizer, 500)
    settings = SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=8,
        max_length=None, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, bf16=False,
    )  # fmt: skip
    Watched(load_model(base_source("random"), "cpu"), settings, train_dataset=data, processing_class=tokenizer).train()
    assert [len(part) for part in seen] == [2] * 16
    passes = [sum(seen[start : start + 8], []) for start in (0, 8)]
    assert passes[0] != passes[1] and all(sorted(each) == sorted(data["input_ids"]) for each in passes)
    for each in passes:
        lengths = [[len(row) for row in each[start : start + 4]] for start in range(0, 16, 4)]
        assert lengths == list(map(sorted, lengths))


@pytest.mark.parametrize("family", ["SmolLM3", "Gemma3"])  # whose layers differ most from the Llama of "random"
def test_a_model_of_any_family_is_read_from_a_folder_and_fine_tuned(family, tmp_path, monkeypatch):
    monkeypatch.setattr("lib.finetune.evaluation.PROMPT_TOKENS", 8)
    monkeypatch.setattr("lib.finetune.train.SPARE_TOKENS", -40)
    tokenizer = load_tokenizer(base_source("random"))
    model = tiny(family, len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    tokens = torch.arange(40)[None]
    loaded = load_model(tmp_path / "base", "cpu")
    assert type(loaded) is type(model)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
    config = FinetuneConfig(
        base=str(tmp_path / "base"), n_facts=4, steps=2, checkpoint_every=1, batch_size=4, questions=1, unseen_people=4,
        prompts=1, capability="none", dtype="float32", lr=1e-2,
    )  # fmt: skip
    rows = finetune(config, tmp_path / "run", device="cpu", description=None)
    surprises = []
    for row in tokenize_chats(chats(people_of(4), "in-weight"), tokenizer, 500):
        log_p, labels = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1), row["labels"]
        surprises += [-log_p[i, label].item() for i, label in enumerate(labels[1:]) if label != IGNORED]
    assert rows[1]["loss"] == pytest.approx(sum(surprises) / len(surprises), rel=1e-5)
    assert rows[1]["tv"] == 0 < rows[2]["tv"]  # the rate of the first step is 0, as warming up begins there
    trained = load_model(tmp_path / "run" / "model", "cpu")
    assert type(trained) is type(model) and not torch.allclose(trained(tokens).logits, model(tokens).logits)
