"""What a test that takes another sample for every commit needs."""

from __future__ import annotations

import random
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path


def commit() -> str:
    """The commit that is tested; a fixed text outside of a clone."""
    try:
        return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "no commit"


def sample_cases(names: Iterable[str], size: int) -> set[str]:
    """The names of the cases that are run: of each parametrised test at most `size`, other ones for every commit."""
    cases: dict[str, list[str]] = defaultdict(list)
    for name in names:
        cases[name.partition("[")[0]].append(name)
    chosen = random.Random(commit())
    return {name for of_test in cases.values() for name in chosen.sample(sorted(of_test), min(size, len(of_test)))}
