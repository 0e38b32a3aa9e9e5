"""The fixture of tests that try both kinds of metadata."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import columns


@pytest.fixture
def metadata(request: pytest.FixtureRequest) -> Iterator[str]:
    """What is added to the name of a fault: nothing for ``"plain"``, which is the default.

    With ``"columns"``, this process and the jobs that it begins save with an index, and read it part by part.
    """
    if getattr(request, "param", "plain") == "plain":
        yield ""
        return
    with columns.in_columns():
        yield ", metadata in columns"
