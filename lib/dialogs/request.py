"""The language in which a model asks its tool: `FIND attribute FOR name`."""

import re
from typing import NamedTuple


class Request(NamedTuple):
    """One attribute of one person."""

    attribute: str
    name: str


def format_request(attribute: str, name: str) -> str:
    """The fenced block that asks for `attribute` of `name`; `parse_request` reads it back."""
    return f"```sql\nFIND {attribute} FOR {name}\n```"


def parse_request(turn: str) -> Request | None:
    """The request that ends an assistant's turn, or None if the turn does not end in a well-formed one."""
    match = re.fullmatch(r"FIND (\S+) FOR (.+)", _fenced_line(turn, "sql"))
    return Request(*match.groups()) if match else None


def _fenced_line(turn: str, language: str) -> str:
    """The one line in the fenced block that ends `turn`; "" if it does not end in such a block."""
    match turn.split("\n")[-3:]:
        case [opening, line, "```"] if opening == f"```{language}":
            return line
    return ""
