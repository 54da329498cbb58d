"""Experiments as data: grids in YAML files give searches, and searches for the smallest model give the runs to do.

The paper's grids are in `plans`, a file for each section; a user's grid is any other file of the same form.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, product
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, model_validator

from lib.base import Config, InputError, check_known, check_unique
from lib.config import ModelConfig, RunConfig, override
from lib.dialogs.tokenizers import load_tokenizer
from lib.facts.people import ATTRIBUTES, LAWS
from lib.paths import LARGEST_TEXT, PROFILES, PUBLISHING, read_bytes, reading

PLANS = Path(__file__).parent / "plans"
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


def searches(source: str, profile: str, tokenizer: str = "bytes") -> list[Search]:
    """Return all searches of an experiment in a profile, the most useful first.

    source: a section of the paper, the name of a file in `plans`, or the path of a user's file, which ends in .yaml.
    tokenizer: as `RunConfig.tokenizer`, for profiles that do not publish; published runs read bytes.

    Raises `InputError`, with the name of the file, for anything that is no experiment.
    """
    path = Path(source) if is_file(source) else PLANS / f"{source}.yaml"
    grids = _read(path) if is_file(source) or source in _names() else {}
    of_profiles = isinstance(grids, dict) and grids.keys() <= set(PROFILES)
    if of_profiles and profile not in grids:
        known = (f"{name} ({', '.join(_read(PLANS / f'{name}.yaml'))})" for name in _names())
        check_known("experiment", source, [*known, "your own .yaml files"], f" in the profile {profile}")
    grids = grids[profile] if of_profiles else grids
    try:
        grids = [Grid.parse(grid) for grid in (grids if isinstance(grids, list) else [grids])]
        plan = [search for grid in grids for search in grid.searches()]
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if not plan:
        raise InputError(f"{path} asks for no run: give a grid, and each of its axes a value")
    if tokenizer == "bytes":
        return plan
    if profile in PUBLISHING:
        raise InputError(f"tokenizer = {tokenizer!r}: the profile {profile} publishes, so its runs take only 'bytes'")
    fields = {"tokenizer": tokenizer, "model.vocab_size": load_tokenizer(tokenizer).vocab_size}
    return [dataclasses.replace(search, base=override(search.base, fields)) for search in plan]


def is_file(source: str) -> bool:
    """Return whether `source` is the path of a user's file, not the name of one of the paper's plans."""
    return re.search(r"[^./]\.ya?ml$", source) is not None  # the runs of "...yaml" would be outside `runs`


class Grid(Config):
    """Searches that differ in a few fields: one for each combination of the values on `axes`.

    `base` (nested) and `axes` (dotted) name fields of `RunConfig`, or these: n_facts, alpha and law (a name of
    `lib.facts.people.LAWS`) describe the database, and seed also draws its people. An axis may vary the other fields of
    the grid, too.
    """

    #: A name in plans/recipes.yaml: `base` adds to its fields.
    recipe: str | None = None
    base: dict[str, Any] = {}
    #: The first is outermost; fields that share an axis vary together.
    axes: list[dict[str, list[Any]]] = []
    #: Ascending values of d_model.
    sizes: list[int] = Field(list(SIZES), min_length=1)
    #: The recall that a search looks for; None runs every size.
    threshold: float | None = Field(0.95, gt=0, le=1)
    #: The size to begin with; None is the smallest.
    start: int | None = None
    #: Steps that grow with the facts: passes over them, and at least `min_steps`.
    passes: int | None = Field(None, ge=1)
    min_steps: int = Field(1, ge=1)
    #: How often to measure recall, evenly spaced in training.
    evaluations: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _start_is_a_size(self) -> Self:
        if self.sizes != sorted(set(self.sizes)):
            raise ValueError(f"sizes = {self.sizes}: give them in ascending order")
        if self.start not in (None, *self.sizes):
            raise ValueError(f"start = {self.start} is none of the sizes {self.sizes}")
        return self

    def searches(self) -> list[Search]:
        """Return the search of each combination, the last axis varying fastest. Raises `InputError`."""
        check_unique(["axes", *chain.from_iterable(self.axes)])
        found = [self._search(combined) for combined in product(*map(points_of, self.axes))]
        for model, sizes in {(search.base.model, search.sizes) for search in found}:
            for size in sizes:  # `Search.config` does not validate
                ModelConfig(**model.model_dump() | {"d_model": size})
        return found

    def _search(self, point: tuple[dict[str, Any], ...]) -> Search:
        varied = {name: value for part in point for name, value in part.items()}
        of_grid = {name: varied.pop(name) for name in Grid.model_fields.keys() & varied.keys()}
        grid = Grid(**self.model_dump() | of_grid)
        if grid.recipe is not None:
            check_known("recipe", grid.recipe, RECIPES)
        fields = {}
        for group in (RECIPES.get(grid.recipe, {}), grid.base, varied):
            for name, value in group.items():
                fields |= _fields(name, value)
        base = override(RunConfig(), fields)
        n_facts = base.facts.n_facts
        if base.facts.csv and (grid.passes or grid.evaluations):
            from lib.facts.sampling import load_people  # imports numpy: most plans do without it

            n_facts = load_people(base.facts).n_facts
        if grid.passes:
            steps = max(grid.min_steps, grid.passes * n_facts // base.training.batch_size)
            base = override(base, {"training.steps": steps})
        if grid.evaluations:
            every = max(1, base.training.total_steps(n_facts) // grid.evaluations)
            base = override(base, {"evaluation.every": every})
        start = grid.sizes.index(grid.start) if grid.start else 0
        return Search(base, grid.threshold, start, tuple(grid.sizes))


def points_of(axis: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Return the values of an axis, one mapping of fields for each point."""
    if len({len(values) for values in axis.values()}) != 1:
        raise InputError(f"axes: {', '.join(axis)} share an axis, so their lists must be equally long")
    return [dict(zip(axis, values, strict=True)) for values in zip(*axis.values(), strict=True)]


def _fields(name: str, value: Any) -> dict[str, Any]:
    """Return the dotted fields of `RunConfig` that a field of a grid stands for."""
    if name == "n_facts":
        if not isinstance(value, int) or value % len(ATTRIBUTES):
            raise InputError(f"n_facts = {value!r}: each person has {len(ATTRIBUTES)} facts, give a multiple of that")
        return {"facts.n_people": value // len(ATTRIBUTES)}
    if name == "seed":
        return {"seed": value, "facts.seed": value}
    if name == "alpha":
        return {"facts.alpha": value}
    if name == "law":
        check_known("law", value, LAWS)
        return {f"facts.{field}": given for field, given in LAWS[value]._asdict().items()}
    if isinstance(value, dict) and "." not in name:
        return {f"{name}.{field}": given for field, given in value.items()}
    return {name: value}


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as it is in JSON, and a key given twice is an error."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        check_unique(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read(path: Path) -> Any:
    with reading(f"the plan {path}, a file of YAML", yaml.YAMLError):
        return yaml.load(read_bytes(path, LARGEST_TEXT), _Loader)


def _names() -> list[str]:
    return sorted(path.stem for path in PLANS.glob("*.yaml") if path.stem != "recipes")


#: Named fields of a run, which a grid takes with `recipe`.
RECIPES: dict[str, dict[str, Any]] = _read(PLANS / "recipes.yaml")
