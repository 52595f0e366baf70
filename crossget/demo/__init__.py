"""What the command line shows: methods side by side, and a page of merged patches."""
