"""Image-text retrieval: fine-tuning with the missing control, and the table of the paper."""
