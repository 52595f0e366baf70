"""Features of every patch from reduced tokens: how near they are to the dense model's."""
