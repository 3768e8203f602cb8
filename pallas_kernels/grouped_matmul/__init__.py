"""One matmul per group of consecutive rows: the experts of a mixture, without padding."""
