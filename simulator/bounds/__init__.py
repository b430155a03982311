"""Lower bounds: what no policy can undercut in this simulation."""
