"""Bytes, seconds and counts in words."""


def in_words(count: int) -> str:
    """Return bytes in words: 1536 -> "1.5 kB". Units are powers of 1000, as disks are sold."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def time_in_words(seconds: float) -> str:
    """Return seconds in words: 5400 -> "1.5 h"; shorter times in minutes or seconds."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            count = seconds / size
            return f"{count:,.0f} {unit}" if count >= 100 else f"{count:.1f} {unit}"
    return f"{seconds:.1f} s"


def counted(count: int, noun: str) -> str:
    """Return a count in words: "1 stage", "1,204 stages"."""
    return f"{count:,} {noun}" + "s" * (count != 1)
