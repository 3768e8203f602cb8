"""Compare this package with PyTorch on one published directory: layers, logits, gradients, text.

`run.compare` is the whole comparison and `hybrid-jax parity` its command line. PyTorch and
transformers are imported only when a comparison starts.
"""
