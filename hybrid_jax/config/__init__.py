"""What to build: frozen values that check themselves. Nothing here imports jax."""
