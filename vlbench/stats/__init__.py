"""Intervals, paired tests and ranks. Numpy and scipy; never torch."""
