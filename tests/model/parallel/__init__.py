"""Ops on arrays split over eight simulated devices equal those on one."""
