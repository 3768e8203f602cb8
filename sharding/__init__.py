"""What a dimension means, and which mesh axis splits it. Knows nothing of the model."""

from sharding.axes import Axis as Axis
from sharding.axes import Logical as Logical
from sharding.mesh import MeshShape as MeshShape
from sharding.rules import Rules as Rules
