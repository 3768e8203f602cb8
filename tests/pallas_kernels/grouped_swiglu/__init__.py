"""Tests of the experts as one op."""
