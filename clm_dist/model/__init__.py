"""A causal language model by name or from scratch, its loss, and text from it. Knows nothing of data or processes."""
