"""Fixtures that several parts' tests share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with real tokenizer, oracle arrays and data files, named by HYMBA_TUNE_DATA; skips where it is unset."""
    folder = os.environ.get("HYMBA_TUNE_DATA")
    if not folder:
        pytest.skip("HYMBA_TUNE_DATA is not set: this test reads the real tokenizer, oracle or data files")
    path = Path(folder)
    assert path.is_dir(), f"HYMBA_TUNE_DATA={folder} is not a folder"
    return path
