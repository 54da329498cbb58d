"""trl's `SFTTrainer` with a loss that computes less, and micro-batches of similar lengths."""

from collections.abc import Iterator
from random import Random

from torch.nn.functional import cross_entropy
from torch.utils.data import Sampler
from trl import SFTTrainer

from lib.finetune.data import IGNORED
from lib.finetune.models import read_shared


class ChatTrainer(SFTTrainer):
    """`SFTTrainer` that reads a batch's shared prefix once, and computes logits only for trained tokens."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the mean cross-entropy of the trained tokens: `num_items_in_batch`, over all parts and processes."""
        tokens, labels, mask = (inputs[name] for name in ("input_ids", "labels", "attention_mask"))  # (B, S)
        trained = labels[:, 1:] != IGNORED
        places = trained.any(0).nonzero().squeeze(-1)  # (P,): in some row, the next token is trained
        shared, cache = read_shared(model, tokens, int(places[0]))
        options = {"attention_mask": mask, "logits_to_keep": places - shared, "past_key_values": cache}
        logits = model(input_ids=tokens[:, shared:], **options).logits  # (B, P, V)
        targets = labels[:, places + 1].flatten()
        loss = cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="sum")
        # Gradients are averaged over processes, so each loss is multiplied by their number.
        return loss * self.accelerator.num_processes / num_items_in_batch

    def _get_train_sampler(self, train_dataset=None):
        lengths = [len(tokens) for tokens in self.train_dataset["input_ids"]]
        parts = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        return LikeLengths(lengths, self.args.per_device_train_batch_size * parts, self.args.seed)


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
