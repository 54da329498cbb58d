"""In-tool and in-weight learning: the experiments of arXiv 2508.20755, from facts to figures."""

import os

# Before torch is imported, let an idle thread spin for a tenth of a millisecond, then sleep. If it slept at once, two
# threads would be slower than one, for work comes in small pieces. By default it spins for milliseconds; if another
# process wants the core, a step then takes seven times as long, and four times with our setting (measured: LOG.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
