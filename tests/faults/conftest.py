"""One corpus and one undisturbed run for all tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.runs import Home, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of small shards."""
    folder = tmp_path_factory.mktemp("corpus") / "shards"
    write_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, dict[str, Any]]:
    """Return the home and the summary of a run that nobody disturbed."""
    home = Home(tmp_path_factory.mktemp("undisturbed"), corpus)
    return home, home.run()
