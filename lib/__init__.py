"""In-tool and in-weight learning: the experiments of arXiv 2508.20755, from facts to figures."""

import os

# Before torch is imported: a thread that has nothing to do spins for a tenth of a millisecond, then sleeps. Sleeping at
# once makes two threads slower than one, for work comes in small pieces. Spinning for milliseconds, the default, makes
# a step take seven times as long if another process wants the core; our setting, four times (measured: LOG.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
