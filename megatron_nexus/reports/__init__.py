"""Reports: one HTML page of runs and their growths, which needs no network to be viewed."""
