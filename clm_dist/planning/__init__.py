"""What is known before a GPU is held."""
