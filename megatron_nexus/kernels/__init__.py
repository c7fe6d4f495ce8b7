"""Kernels: faster forms of what torch computes, each with the test that compares it with torch."""
