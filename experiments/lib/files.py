"""Result files, and the environment they come from.

Each run leaves one JSON file `{"run", "command", "environment", "result", "seconds"}`; everything that is reported is
rebuilt from these files.
"""

import base64
import hashlib
import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from crossget.core import files
from experiments.lib.statistics import Values

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ROOT / "experiments"
# What is measured with: result files may change while a grid is worked through.
CODE = ("crossget", "integrations", "experiments/*.py")

Json = dict[str, Any]


def git(*arguments: str) -> str | None:
    """Return what git says about this repository, or None where there is no git, no repository or no commit."""
    try:
        answer = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def source_digest() -> str:
    """Return a SHA-256 over the library's source, which names the code also where it is not committed yet."""
    digest = hashlib.sha256()
    for folder in ("crossget", "integrations"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def environment(device: str = "cpu") -> Json:
    """Return what a result depends on beside its run: versions, machine, commit.

    Args:
        device: where the model runs.

    Returns:
        `crossget.measure.speed.environment` and `commit` (None: not in a repository, or nothing committed), `dirty`
        (whether the code differs from that commit; None: no repository) and `source_sha256`.
    """
    import crossget
    from crossget.measure.environment import environment as machine

    changes = git("status", "--porcelain", "--", *CODE)
    return {
        "crossget": crossget.__version__,
        **machine(device),
        "commit": git("rev-parse", "--verify", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "source_sha256": source_digest(),
    }


def short_name(environment: Mapping[str, Any]) -> str:
    """Return a processor's or a GPU's name without the words that all of them have, and what tells two of them apart.

    Args:
        environment: of a result file; older ones do not tell a processor's instructions.
    """
    name = " ".join(environment["device"].replace("(R)", "").replace("Processor", "").split())
    instructions = environment.get("instructions")
    return f"{name} ({', '.join(instructions)})" if instructions else name


def measured_on(environment: Mapping[str, Any]) -> str:
    """Return what a table of times says of a result file's environment: device, threads of a CPU, torch."""
    threads = "" if environment["cuda"] else f", {environment['threads']} threads"
    return f"{short_name(environment)}{threads}, torch {environment['torch']}"


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def pack(values: Values) -> str:
    """Return one number per item as text that is short enough for a result file: base64 of float16, low byte first."""
    return base64.b64encode(np.asarray(values, dtype="<f2").tobytes()).decode()


def unpack(text: str) -> Values:
    """Return the numbers that `pack` wrote, to three digits."""
    return np.frombuffer(base64.b64decode(text), dtype="<f2").astype(np.float64)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all: an interrupted run must not leave half a result behind."""
    files.write_text(file, json.dumps(content, indent=1) + "\n")


def read_json(file: Path) -> Json:
    """Return the content of one result file."""
    return files.read_json(file)


def read_results(folder: Path) -> list[Json]:
    """Return the content of all result files in a folder and its subfolders, sorted by path."""
    return [read_json(file) for file in sorted(folder.rglob("*.json"))]


def check_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse names that are not known.

    Raises:
        ValueError: some are not.
    """
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"unknown {what} {unknown}; there are {sorted(known)}")
