"""The language in which a model asks its tool.

A request is the last three lines of the assistant's turn; any prose may stand before them:

    ```sql
    FIND <attribute> FOR <name>
    ```

The attribute is one word without blanks; the name is all the rest of the line, whatever it holds. Nothing follows
the closing fence. Everything else is malformed.
"""

import re
from typing import NamedTuple


class Request(NamedTuple):
    """One attribute of one person."""

    attribute: str
    name: str


def format_request(attribute: str, name: str) -> str:
    """Return the fenced block that asks for `attribute` of `name`; `parse_request` reads it back."""
    return f"```sql\nFIND {attribute} FOR {name}\n```"


def parse_request(turn: str) -> Request | None:
    """Return the request that ends an assistant's turn, or None if the turn does not end in a well-formed one."""
    match turn.rsplit("\n", 3)[-3:]:  # a turn may be long
        case ["```sql", line, "```"] if found := re.fullmatch(r"FIND (\S+) FOR (.+)", line):
            return Request(*found.groups())
    return None
