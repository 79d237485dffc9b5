"""Processes of this machine, told apart even when the kernel gives a number out again."""

from __future__ import annotations

from pathlib import Path


def process_start(pid: int) -> str | None:
    """Return the kernel's start time of a living process, which tells it from a later one with the same number."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # A zombie was killed and waits for its parent to look, which in a container may never happen.
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return None


def descendants(pid: int) -> set[int]:
    """Return the numbers of all processes that a process started, directly or not, and that still exist."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue  # ended while we looked
        children.setdefault(parent, []).append(int(stat.parent.name))
    found: set[int] = set()
    queue = list(children.get(pid, ()))
    while queue:
        current = queue.pop()
        found.add(current)
        queue += children.get(current, [])
    return found
