"""Section 6: large models that were trained by others, fine-tuned on facts (extra `[scale]`)."""

from importlib.util import find_spec

from lib.base import InputError

for _package in ("datasets", "transformers"):
    if find_spec(_package) is None:
        raise InputError(f"fine-tuning takes the package {_package}: pip install -e '.[scale]'")
