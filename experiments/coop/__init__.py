"""Prompt learning (CoOp) with reduced models, beside the control with the same extra training."""
