"""The two kinds of foreseeable errors, and the strict base of all configurations."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from reprlib import repr as brief  # inputs may be long, or deeply nested
from types import ModuleType
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, field_validator


class InputError(ValueError):
    """The user's input cannot be used.

    The message is one sentence: what was wrong, where, and what is accepted. The command line prints it
    and exits with `exit_code`; a notebook shows it as the last line of the traceback.
    """

    exit_code = 2


class WorkError(RuntimeError):
    """The input is good, but the work could not be done: a full disk, a process that died.

    The message is one sentence that says what to do. The command line prints it and exits with `exit_code`.
    """

    exit_code = 1


class DamagedFile(WorkError):
    """A file that a run wrote has been damaged: by a power cut, a full disk, an editor."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path} is damaged ({reason}): delete it and repeat the command that wrote it")

    def __reduce__(self):  # pickled as the sentence: `Ranks.first_does` sends it to the other processes
        return WorkError, self.args


def optional(module: str, extra: str, lack: str) -> ModuleType:
    """Import a module of an optional package. Where it is missing, an `InputError` says `lack` and names the extra."""
    try:
        return import_module(module)
    except ImportError:
        raise InputError(f"{lack}: pip install -e '.[{extra}]'") from None


def to_json(content: Any, **options: Any) -> str:
    """Return `content` as JSON. Raises `WorkError` for infinite numbers and NaN, which other readers refuse."""
    try:
        return json.dumps(content, allow_nan=False, **options)
    except ValueError:
        raise WorkError(f"a number is not finite, so nothing is written: {str(content)[:200]}") from None


def check_unique(keys: Iterable[str]) -> None:
    """Raise `InputError` for a key that a file sets twice: one of its values would be lost."""
    if twice := [key for key, count in Counter(keys).items() if count > 1]:
        raise InputError(f"{twice[0]!r} is there twice: each key takes one value")


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object of unique keys, for the `object_pairs_hook` of Python's JSON reader."""
    check_unique(key for key, _ in pairs)
    return dict(pairs)


def check_known(kind: str, name: Any, known: Iterable, of: str = "") -> None:
    """Raise `InputError` unless a name is `known`; it lists those that are."""
    if name not in (names := [*known]):
        raise InputError(f"unknown {kind} {name!r}{of}: there are {', '.join(map(str, names)) or 'none'}")


def parse_line(kind: TypeAdapter, line: bytes, number: int, accepted: str) -> Any:
    """Return what a line of JSON holds; a ValueError says which line, why not, and what is `accepted`."""
    try:
        return kind.validate_json(line)
    except ValidationError as error:
        (problem, *_) = error.errors()
        place = "".join(f"[{index}]" for index in problem["loc"])
        raise ValueError(f"line {number}: {place} {problem['msg']}: {accepted}") from None


def printable(text: str) -> str:
    """Return `text` with terminal controls (ESC, say) escaped; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class Config(BaseModel):
    """A frozen, typed group of settings; unknown keys and impossible values raise `InputError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)

    def __init__(self, /, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(self._sentence(error)) from None

    @field_validator("*")
    @classmethod
    def _fits_the_machine(cls, value: Any) -> Any:
        if (
            isinstance(value, int)
            and abs(value) >= 2**63
            or isinstance(value, str | dict)  # in keys, pydantic would replace a lone surrogate
            and b"\0" in "".join(map(str, value)).encode(errors="strict" if isinstance(value, dict) else "ignore")
        ):
            raise ValueError("integers below 2^63, and text without NUL, are accepted")
        return value

    @classmethod
    def parse(cls, values: Any) -> Self:
        """Build from plain data, groups within groups. Raises `InputError`."""
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise InputError(f"{cls._group() or 'a configuration'} takes an object with fields, got {brief(values)}")
        fields = {name: field.annotation for name, field in cls.model_fields.items()}
        groups = {name: kind for name, kind in fields.items() if isinstance(kind, type) and issubclass(kind, Config)}
        return cls(**{name: groups[name].parse(value) if name in groups else value for name, value in values.items()})

    @classmethod
    def _group(cls) -> str:
        """Return this group's name in a run's configuration: `model` for ModelConfig, empty for RunConfig."""
        return cls.__name__.removesuffix("Config").lower().removeprefix("run")

    @classmethod
    def _sentence(cls, error: ValidationError) -> str:
        """Return the first problem of a pydantic error as one sentence that names the field and what it takes."""
        problem = error.errors()[0]
        message = problem["msg"].removeprefix("Value error, ")
        if not problem["loc"]:
            return message
        field = ".".join(filter(None, [cls._group(), str(problem["loc"][0])]))
        if problem["type"] == "extra_forbidden":
            return f"unknown configuration key {field!r}: accepted are {', '.join(cls.model_fields)}"
        got = f", got {brief(problem['input'])}" if cls.model_fields[problem["loc"][0]].repr else ""  # else a secret
        return f"{field}: {message[0].lower()}{message[1:]}{got}"


class Identified(Config):
    """Everything that decides the outcome of one run.

    Its canonical JSON leaves out defaults, so that a field added later changes no id. The run's id is the hash of this
    JSON. So never change a default once there are rows: old ids would get another meaning. Add a field, or set the
    value where it is used.
    """

    def canonical_json(self) -> str:
        """Return the fields that differ from their defaults as JSON, keys sorted, without spaces."""
        return json.dumps(self.model_dump(exclude_defaults=True), sort_keys=True, separators=(",", ":"))

    @property
    def run_id(self) -> str:
        """Return the 12 hexadecimal digits that name this configuration."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()[:12]
