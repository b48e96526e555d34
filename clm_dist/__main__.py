from clm_dist.cli import entry_point

entry_point()
