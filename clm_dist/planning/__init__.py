"""What is known before a GPU is held: whether a model fits, and settings of DeepSpeed, resolved and checked."""
