"""Write the reference's training data, llava_v1_5_mix67k.json: `python -m experiments.llava.make_mix67k --help`.

It is every tenth sample of LLaVA-1.5's instruction data, llava_v1_5_mix665k.json.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from crossget.core.files import write_text


@dataclass(frozen=True)
class Options:
    """Where from and where to."""

    source: Path
    """llava_v1_5_mix665k.json."""
    out: Path
    """llava_v1_5_mix67k.json; its folder is there."""
    every: int = 10
    """Keep the first of so many samples."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every={self.every}: expected 1 or more")


def main(options: Options) -> None:
    if not options.source.is_file():
        raise FileNotFoundError(f"there is no file {options.source}")
    samples = json.loads(options.source.read_text(encoding="utf-8"))
    if not isinstance(samples, list):
        raise ValueError(f"{options.source}: expected a JSON list of samples, got a {type(samples).__name__}")
    kept = samples[:: options.every]
    write_text(options.out, json.dumps(kept))
    print(f"{len(kept):,} of {len(samples):,} samples: {options.out}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
