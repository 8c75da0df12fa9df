"""Other processes, as Linux shows them."""

from pathlib import Path


def processes_below(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return list(map(int, children.read_text().split())) if children.exists() else []


def is_running(pid: int) -> bool:
    """Whether there is such a process and it has not ended; nobody may have asked how it ended."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
