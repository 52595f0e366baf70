"""Faster today: what merging costs a model that nothing is trained on, at equal multiply-adds."""
