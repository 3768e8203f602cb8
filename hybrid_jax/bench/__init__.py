"""Measure the real steps, alternated with their peer, and check the results before the clock runs."""
