"""Vocabularies: what published tensors are called and where each lies in our parameter tree."""
