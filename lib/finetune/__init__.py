"""Section 6: pretrained chat models, fine-tuned on facts (extra `[scale]`)."""

import os
from importlib.util import find_spec

from lib.base import InputError

for _package in ("accelerate", "datasets", "lm_eval", "peft", "transformers", "trl"):
    if find_spec(_package) is None:
        raise InputError(f"fine-tuning takes the package {_package}: pip install -e '.[scale]'")

from transformers.utils import logging  # noqa: E402

# Runs show their own progress; TRANSFORMERS_VERBOSITY brings the library's warnings back.
logging.disable_progress_bar()
if "TRANSFORMERS_VERBOSITY" not in os.environ:
    logging.set_verbosity_error()
