"""How fast: programs that time reducers beside the dense model in one run."""
