"""Tests of lightning attention: one contract that every implementation inherits."""
