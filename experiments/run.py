"""Measure a study: `python -m experiments.run STUDY ...`; `--help` behind the name lists its options."""

import sys
from collections.abc import Sequence

from experiments.studies import STUDIES, load_study


def main(arguments: Sequence[str]) -> int:
    """Run the study that the first argument names, with the others as its options; return the number of runs measured.

    Raises:
        SystemExit: there is no such study, or an option is wrong.
    """
    import tyro

    if not arguments or arguments[0] not in STUDIES:
        given = arguments[0] if arguments else "nothing"
        raise SystemExit(f"got {given}; expected one of the studies {', '.join(STUDIES)}, and its options")
    study = load_study(arguments[0])
    description = sys.modules[study.load.__module__].__doc__
    options = tyro.cli(
        study.options, args=list(arguments[1:]), prog=f"python -m experiments.run {study.name}", description=description
    )
    return study.run(options)


if __name__ == "__main__":
    print(f"{main(sys.argv[1:])} runs measured")
