"""Tests of grouped_matmul: one contract, one subclass an implementation."""
