"""Bytes, rates and durations in a form for people."""

from __future__ import annotations

__all__ = ["format_bytes", "format_duration", "format_rate"]

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def format_bytes(count: float) -> str:
    """``"0 B"``, ``"999 B"``, ``"1.5 kB"``, ``"12.4 GB"``: a kB of 1,000 bytes, as disks count."""
    number, prefix = float(count), 0
    while abs(number) >= 999.5 and prefix < len(_PREFIXES) - 1:
        number /= 1000
        prefix += 1
    if prefix == 0:
        return f"{number:.0f} B"
    # 99.95 would come out as 100.0
    return f"{number:.{0 if abs(number) >= 99.95 else 1}f} {_PREFIXES[prefix]}B"


def format_rate(count: float, seconds: float) -> str:
    """``"3.9 GB/s"``; ``"-"`` where no time has passed."""
    return f"{format_bytes(count / seconds)}/s" if seconds > 0 else "-"


def format_duration(seconds: float) -> str:
    """``"12 ms"``, ``"3.2 s"``, ``"1 min 05 s"``, ``"2 h 03 min"``, ``"3 d 04 h"``."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02} h"
