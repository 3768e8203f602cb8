"""Tests of the scripts that do more than call something else."""
