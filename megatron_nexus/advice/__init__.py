"""Whether to grow a run: its loss extrapolated, the alternatives at equal FLOPs, a probe, a verdict."""
