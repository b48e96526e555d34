"""Text to ids to blocks on disk, and the order in which training reads them. Knows nothing of models or processes."""
