"""One SwiGLU per group of consecutive rows: the experts of a mixture as one op."""
