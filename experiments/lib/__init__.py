"""What the studies share: the harness, result files, statistics, tables, data and the training loop."""
