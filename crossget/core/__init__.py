"""What puts a method into a model: adapters, attaching, watching blocks, and the state of their tokens."""
