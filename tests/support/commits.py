"""What a test that takes another sample for every commit needs."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str:
    """The commit that is tested; a fixed text outside of a clone."""
    try:
        return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "no commit"
