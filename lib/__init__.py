"""In-tool and in-weight learning: the experiments of arXiv 2508.20755, from facts to figures."""

import os

# Before torch is imported: a thread that has nothing to do sleeps. By default it spins, and where another process wants
# the core, a training step takes 5 to 20 times as long (measured: LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
