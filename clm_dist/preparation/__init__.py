"""Text to blocks: what `clm-dist prepare` is made of."""
