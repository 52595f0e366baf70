"""What published models cost, without their weights: the table in docs/measuring.md."""
