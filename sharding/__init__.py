"""What a dimension means, and (later) which mesh axis splits it. Knows nothing of the model."""

from sharding.axes import Logical as Logical
