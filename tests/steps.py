"""Small trainers whose steps are compared, eager and from a CUDA graph, on a CPU and on a GPU."""

from pathlib import Path

import torch

from lib.config import RunConfig
from lib.dialogs.batches import Source
from lib.dialogs.templates import dialogs
from lib.dialogs.tokenizers import ByteTokenizer
from lib.dialogs.tokens import tokenize
from lib.facts.sampling import load_people
from lib.model.transformer import Transformer
from lib.training.trainer import Trainer

STEPS = 20
VARIANTS = [
    {"optim": {"weight_decay": 0.1}},
    {"optim": {"name": "adamw", "clip_norm": None, "warmup_steps": 5, "weight_decay": 0.1}},
    {"mode": "in-tool", "training": {"batch_size": 7}},
    {"training": {"grad_accumulation": 3, "batch_size": 11}},
    {"training": {"biographies": 0.3}},
]


def make_trainer(variant: dict, folder: Path, cuda_graph: bool, device: str = "cpu", evaluate=None) -> Trainer:
    """In float64, so that the order of sums is no matter."""
    training = {"steps": STEPS, "batch_size": 12, **variant.get("training", {})}
    config = RunConfig.parse({"facts": {"n_people": 13}, **variant, "model": {"d_model": 8}, "training": training})
    people = load_people(config.facts)
    texts = [list(dialogs(people, config.mode))]
    if config.training.biographies:
        texts.append(list(dialogs(people, "biography")))
    shares = [config.training.questions, config.training.biographies]
    sources = [Source(len(part), share) for part, share in zip(texts, shares, strict=False)]
    data = tokenize(sum(texts, []), ByteTokenizer())
    model = Transformer(config.model, torch.Generator().manual_seed(config.seed)).double().to(device)
    return Trainer(model, data, config, folder, evaluate, sources=sources, cuda_graph=cuda_graph)
