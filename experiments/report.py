"""Write pages and figures from the result files, and results.csv: `python -m experiments.report [STUDY ...]`.

Without a name all pages are written. results.csv always holds the results of all studies.
"""

import sys
from collections.abc import Sequence

from crossget.core.files import write_text
from experiments.lib import summary
from experiments.studies import PAGES, load_page


def main(names: Sequence[str]) -> None:
    """Write the pages of the named studies, or of all, and results.csv.

    Raises:
        SystemExit: a name is unknown.
    """
    unknown = sorted(set(names) - set(PAGES))
    if unknown:
        raise SystemExit(f"unknown studies {unknown}; pages are written of {', '.join(PAGES)}")
    for name in names or PAGES:
        load_page(name).write()
    write_text(summary.FILE, summary.table())


if __name__ == "__main__":
    main(sys.argv[1:])
