"""Tests that take an NVIDIA GPU: elsewhere there are none, rather than some that are skipped."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
