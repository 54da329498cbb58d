"""The experiments of Section 7.1 on a chat model that Section 6 fine-tuned."""

import copy
from collections.abc import Mapping, Sequence
from operator import eq
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import nn

from lib.agent.server import Find
from lib.agent.tools import ERROR_TEXTS, Outcome, Response
from lib.config import OptimConfig
from lib.dialogs.request import parse_request
from lib.dialogs.templates import answer, question, tool_call
from lib.experiments.edited_models import RATE, Setting, measured
from lib.facts.people import FactsConfig
from lib.finetune.bases import learning_rate
from lib.finetune.capability import choices, choose_test, measure_capability
from lib.finetune.config import FinetuneConfig
from lib.finetune.conversations import (
    answered,
    chats,
    found_turns,
    look_up_turns,
    opening,
    people_of,
    read_call,
)
from lib.finetune.evaluation import capability_columns
from lib.finetune.generation import look_up_and_reply, reply_all
from lib.finetune.models import load_model, load_tokenizer
from lib.finetune.tasks import measure_recall
from lib.finetune.tokens import tokenize_chats
from lib.finetune.train import adapters, best_dtype, summed_loss, turn_limit
from lib.training.devices import resolve_device
from lib.training.edit import edit
from lib.training.loss import IGNORED

#: By profile, as `lib.experiments.edited_models.SIZES`; hybrids of chat models belong to Section 6.
SIZES = {"smoke": ((1, 2), 4, 0, 5), "laptop": ((1, 10, 100), 100, 0, 100)}
#: Rank of the adapters (LoRA) that an edit trains, where it does not train all weights.
RANK = 16
#: Candidates for a fact's value, the true one included.
N_CANDIDATES = 10
#: Items of the capability test, the first ones of Section 6.
N_ITEMS = 100


class ChatModel(Setting):
    """The last model of a fine-tuning, in a folder."""

    def __init__(self, folder: Path, config: FinetuneConfig, profile: str):
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling  # of the extra [scale], as `peft` below

        device, people = resolve_device("auto"), people_of(config.n_facts, config.seed)
        # Edits train in float32, as Section 6 does; everything else is measured in `dtype`.
        model, self.dtype = load_model(folder, device, torch.float32), best_dtype(device)
        sampled = FactsConfig(n_people=len(people), seed=config.seed)
        super().__init__(model, people, config.mode, config.seed, sampled, SIZES.get(profile, SIZES["laptop"]))
        self.config, self.tokenizer, self.find = config, load_tokenizer(folder), Find(people.attributes)
        trained = tokenize_chats(chats(people, config.mode), self.tokenizer, config.max_length)
        self.options = {"max_new_tokens": turn_limit(trained)}
        pad = self.tokenizer.pad_token_id
        self.collate = DataCollatorForLanguageModeling(self.tokenizer.eos_token_id if pad is None else pad)
        self.test = choose_test(config.capability)
        self.before = self._capability(model) if config.mode == "in-weight" else None  # else weights do not change

    def _measured(self, model: nn.Module) -> nn.Module:
        """Return a copy to be asked: in `dtype`, with its adapters added to the weights."""
        model = copy.deepcopy(model)
        return (model.merge_and_unload() if hasattr(model, "merge_and_unload") else model).to(self.dtype).eval()

    def _capability(self, model: nn.Module) -> dict[str, list[float]]:
        items = min(N_ITEMS, self.config.items or N_ITEMS)
        return measure_capability(self._measured(model), self.tokenizer, self.test, items)

    def _opening(self, name: str, attribute: str) -> dict:
        return opening(question(name, attribute), self.mode, self.find.declaration)

    def edits(self, facts, keep, is_done, forget):
        """Edit all weights of a copy, then adapters alone; their columns say what it does to general capability."""
        from peft import get_peft_model

        dialogs, kept = (
            told and tokenize_chats([self._in_weight(*each) for each in told], self.tokenizer, self.config.max_length)
            for told in (facts, keep)
        )
        options = {"keep": kept, "forget": forget, "max_steps": self.max_steps, "seed": self.seed}
        for adaptation in ("full", "lora"):
            lora = adaptation == "lora"
            model = get_peft_model(copy.deepcopy(self.model), adapters(RANK)) if lora else self.model
            rate = RATE * learning_rate(self.config.base, self.mode, lora)
            optim = OptimConfig(name="adamw", lr=rate, beta2=0.999)  # AdamW as Section 6 has it
            edited = edit(model, dialogs, optim, is_done, mean_loss=self._mean_loss, **options)
            columns = capability_columns(self._capability(edited.model), self.before)
            yield edited, {"adaptation": adaptation, "capability_task": self.test, **columns}

    def _in_weight(self, name: str, attribute: str, value: str) -> dict:
        return answered(self._opening(name, attribute), [], answer(name, attribute, value))

    def _mean_loss(self, model: nn.Module, data: Sequence[Mapping], rows: torch.Tensor) -> torch.Tensor:
        batch = self.collate([data[i] for i in rows.tolist()])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return summed_loss(model, batch) / (batch["labels"][:, 1:] != IGNORED).sum()

    def recall(self, model, facts, tool=None):
        found = measure_recall(self._measured(model), self.tokenizer, facts, self.mode, tool, **self.options)
        return fmean([recalled and looked_up == (tool is not None) for looked_up, recalled in found])

    def memory(self, model, facts, after_error=False):
        draw, rows = np.random.default_rng(0), []
        for name, attribute, value in facts:
            others = draw.permutation(sorted({*self.people.columns[attribute]} - {value}))[: N_CANDIDATES - 1].tolist()
            start = self._opening(name, attribute)
            turns = found_turns(self.mode, name, attribute, ERROR_TEXTS[Outcome.NO_MATCH]) if after_error else []
            options = {"tools": start.get("tools"), "add_generation_prompt": True, "tokenize": False}
            context = self.tokenizer.apply_chat_template([*start["messages"], *turns], **options)
            endings = [answer(name, attribute, candidate) for candidate in (value, *others)]
            rows.append({"ctx": context, "endings": endings, "label": 0})
        right = measure_capability(self._measured(model), self.tokenizer, choices("facts", rows))["acc"]
        return {"memory": fmean(right), "guess": fmean([1 / len(row["endings"]) for row in rows])}

    def belief(self, model, facts, results):
        openings = [self._opening(*fact[:2]) for fact in facts]
        asked = [
            [*start["messages"], *found_turns(self.mode, *fact[:2], result)]
            for start, fact, result in zip(openings, facts, results, strict=True)
        ]
        said = reply_all(self._measured(model), self.tokenizer, asked, openings[0].get("tools"), **self.options)
        told = [answer(*fact[:2], result) for fact, result in zip(facts, results, strict=True)]
        true = [answer(*fact) for fact in facts]
        return {"follows": fmean(map(eq, said, told)), "remembers": fmean(map(eq, said, true))}

    def ask(self, facts, tool):
        def look_up(_, said: str) -> tuple[Response, list[dict]] | None:
            call = read_call(said) if self.mode == "in-tool" else None
            query = self.find.query_of_call(call) if call else None
            request = tool_call(**query) if query else said
            if parse_request(request):
                return (result := tool(request)), look_up_turns(self.mode, call, said, result.text)

        asked = self._measured(self.model), self.tokenizer, [self._opening(*fact[:2]) for fact in facts]
        answers = look_up_and_reply(*asked, look_up, **self.options)
        return [(said, found.text if found and found.ok else None) for found, said in answers]


def measure_chat(folder: Path, config: FinetuneConfig, profile: str) -> list[dict[str, Any]]:
    """Run all experiments on the model that a finished fine-tuning left in `folder`; return their rows."""
    base = ChatModel(folder, config, profile)
    about = {"run_id": config.run_id, "base": config.base, "n_params": base.model.num_parameters(), "repeats": True}
    return measured(base, about)
