"""The page of multiply-adds of published models."""

from pathlib import Path

from experiments.flops.run import RESULTS, table
from experiments.lib.study import Page

PAGE = Page(Path(__file__).parent / "RESULTS.md", RESULTS, table)
