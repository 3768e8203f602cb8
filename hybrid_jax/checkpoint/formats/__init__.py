"""Containers: how tensors lie in files, whatever they are called."""
