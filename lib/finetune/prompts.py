"""What a chat model is asked to see how far fine-tuning moved it from its base: 100 everyday prompts.

They were written for this purpose, so none is an item of a benchmark, and each is answered in a few sentences.
"""

from pathlib import Path

from lib.paths import DATA


def _read(path: Path) -> dict[str, tuple[str, ...]]:
    """Blocks of lines, each under the line `# category`."""
    blocks = (block.splitlines() for block in path.read_text(encoding="utf-8").split("\n\n"))
    return {title.removeprefix("# "): tuple(lines) for title, *lines in blocks}


#: 25 prompts of each of four categories.
PROMPTS = _read(DATA / "prompts.txt")
