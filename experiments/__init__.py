"""Programs that measure crossget; not installed, run from the repository root."""
