"""What is known before a model is loaded or a GPU is held: settings of DeepSpeed, resolved and checked. No torch."""
