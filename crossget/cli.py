"""The command line. Every command is one function below; what it computes lives elsewhere."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import Any

TOUR = """\
CrossGET and ToMe-style token reduction for backbones of timm and open_clip, by name. A tour:

  crossget demo                            dense, ToMe-style and CrossGET side by side, and a picture of what was merged
  crossget models --filter '*dino*'        which backbones can be reduced, and why the others cannot
  crossget flops ViT-B-16 --r 16           multiply-adds by module, dense and reduced; no memory, no weights
  crossget bench vit_base_patch16_224      speed as a ratio to dense, measured on this machine
  crossget doctor vit_base_patch16_224     does it attach exactly, take effect, and come off without a trace?

In Python: crossget.attach(model, crossget.CrossGET(r=16)).
"""

R_HELP = "tokens to remove in each block: a number (16), one per block (16,16,8,...), or a share of what enters (10%%)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; those of the process if None.

    Returns:
        The exit code: 0, 1 where a check failed, 2 where what was asked for cannot be done.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        return int(options.command(options))
    except BrokenPipeError:  # `crossget models | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        if options.traceback:
            raise
        print(f"crossget: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def demo(options: argparse.Namespace) -> int:
    """Dense, ToMe-style and CrossGET side by side on photographs: a table, and a picture of what was merged."""
    from crossget.demo import Options, run

    names = [f.name for f in dataclasses.fields(Options)]
    found = run(Options(**{name: getattr(options, name) for name in names}), say=_say)
    print(found.table())
    for path in (options.out, options.json):
        if path is not None:
            _say(f"wrote {path}")
    return 0


def models(options: argparse.Namespace) -> int:
    """Which backbones can be reduced, and why the others cannot."""
    rows = [row for row in _progress(_matrix(options.host, options.filter)) if options.all or row["supported"]]
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    return 0


def flops(options: argparse.Namespace) -> int:
    """Multiply-adds by module, dense and reduced, counted on the meta device."""
    import crossget
    from crossget.hosts import make

    backbone = make(options.model, device="meta")
    reducers = _reducers(options)
    with crossget.attach(backbone.model, reducers["CrossGET"]):
        report = crossget.count_flops(backbone.model, backbone.made_up(options.batch, text=backbone.reads_text))
    print(report.to_json() if options.json else report.table(options.depth))
    return 0


def bench(options: argparse.Namespace) -> int:
    """Speed of dense, ToMe-style and CrossGET on made-up inputs and random weights."""
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Check on one backbone that attaching is exact, takes effect and leaves no trace."""
    import crossget
    from crossget.hosts import make

    backbone = make(options.model, pretrained="none", device=options.device)
    diagnosis = crossget.doctor(backbone.model, backbone.made_up(2, text=backbone.reads_text))
    print(diagnosis)
    return 0 if diagnosis.ok else 1
