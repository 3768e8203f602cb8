"""`python -m hybrid_jax.cli` is `hybrid-jax`."""

import sys

from hybrid_jax.cli import main

sys.exit(main())
