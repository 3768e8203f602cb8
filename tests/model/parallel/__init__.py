"""Tests of the ops on arrays that are split over devices."""
