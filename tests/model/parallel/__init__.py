"""Ops on arrays that are split over eight simulated devices."""
