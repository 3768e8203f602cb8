"""One matmul per group of rows."""
