"""Measure the real steps, in turn with their peer, and compare results before timing."""
