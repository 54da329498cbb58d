"""What a folder holds, to be compared with what it holds later."""

from pathlib import Path


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, and the content of files."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}
