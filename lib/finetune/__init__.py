"""Section 6: pretrained chat models, fine-tuned on facts (extra `[scale]`)."""

from importlib.util import find_spec

from lib.base import InputError

for _package in ("accelerate", "datasets", "lm_eval", "peft", "transformers", "trl"):
    if find_spec(_package) is None:
        raise InputError(f"fine-tuning needs the package {_package}: pip install -e '.[scale]'")
