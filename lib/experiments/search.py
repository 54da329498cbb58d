"""Search for the smallest model that reaches a recall: which runs, in which order."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from lib.config import RunConfig

#: The 26 sizes of Section 5, 2,612 to 591,488 parameters.
SIZES = (*range(4, 81, 4), *range(88, 129, 8))


@dataclass(frozen=True)
class Search:
    """The runs that lead to one point of a parameter-bounds figure.

    It ends when a size reaches the threshold and the next smaller one does not. A full grid may find a still smaller
    one, by luck.
    """

    base: RunConfig  # at any size
    threshold: float | None = 0.95  # None: run every size (a full grid)
    start: int = 0  # index of the size to begin with
    sizes: tuple[int, ...] = SIZES  # ascending values of d_model

    def config(self, size: int) -> RunConfig:
        """Return the run at one size."""
        return self.base.model_copy(update={"model": self.base.model.model_copy(update={"d_model": size})})

    @cached_property
    def run_ids(self) -> tuple[str, ...]:
        """Return the id of the run at each size."""
        return tuple(self.config(size).run_id for size in self.sizes)

    @property
    def certain(self) -> tuple[int, ...]:
        """Sizes that every seed runs. Section 5.2 shows only these: others are run for some seeds only."""
        return self.sizes if self.threshold is None else (self.sizes[self.start],)

    def pending(self, recalls: Mapping[str, float]) -> list[RunConfig]:
        """Return the runs to do next, given the recall of finished runs by id; none when the search is over."""
        known = {i: recalls[run_id] for i, run_id in enumerate(self.run_ids) if run_id in recalls}
        if self.threshold is None:
            return [self.config(size) for i, size in enumerate(self.sizes) if i not in known]
        following = self._next({i: recall >= self.threshold for i, recall in known.items()})
        return [] if following is None else [self.config(self.sizes[following])]

    def _next(self, reached: dict[int, bool]) -> int | None:
        """Return the index to try next, given which reached the threshold; None when the search is over."""
        if not reached:
            return self.start
        n = len(self.sizes)
        high = min((i for i, yes in reached.items() if yes), default=n)  # the smallest known to be enough
        low = max((i for i in reached if i < high), default=-1)
        stride = 2 ** (len(reached) - 1)
        if high == n:
            return min(low + stride, n - 1) if low < n - 1 else None
        if low < 0:
            return max(high - stride, 0) if high else None
        return (low + high) // 2 if high - low > 1 else None
