"""Bytes, rates and durations as people read them."""

from __future__ import annotations

import pytest

from azure_torch_ckpt._internal.units import format_bytes, format_duration, format_rate


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1_000, "1.0 kB"),
        (1_549, "1.5 kB"),
        (99_940, "99.9 kB"),
        (99_950, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (12_400_000_000, "12.4 GB"),
        (2**50, "1.1 PB"),
        (10**24, "1000000 EB"),
        (-1_500, "-1.5 kB"),
    ],
)
def test_bytes_have_three_digits_at_most_and_a_decimal_prefix(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.0123, "12 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (65, "1 min 05 s"),
        (3_599.6, "1 h 00 min"),
        (7_380, "2 h 03 min"),
        (86_400, "1 d 00 h"),
        (273_600, "3 d 04 h"),
    ],
)
def test_durations_change_their_unit_without_showing_60_of_the_smaller_one(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_a_rate_of_no_time_is_a_dash() -> None:
    assert format_rate(7_800_000_000, 2) == "3.9 GB/s"
    assert format_rate(1, 0) == "-"
