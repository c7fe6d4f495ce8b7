"""Comparison of two runs tensor by tensor: recordings of a few steps, and the first difference of two."""
