"""Measure this package and its peers: counts, times and errors of the same work in the same run."""
