"""The checkpoints of the authors of CrossGET: loading them, and converting LLaVA folders."""
