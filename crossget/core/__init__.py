"""Applies a method to a model: adapters, attaching, recognising attention in blocks, and the state of their tokens."""
