"""How long a TPU kernel takes, read without a TPU from the instructions the TPU compiler schedules.

What is modelled: every bundle (what a core issues in one cycle), as often as the kernel's own loops
and branches issue it, by running its scalar instructions (`execute.py`): the loop over the grid,
inner loops, `pl.when`, the window pipeline's bookkeeping and its first and last passes. So the
overhead of a grid step is in the count as far as it is instructions. Bytes are those of the DMAs
the kernel starts: a window fetched again counts again, and padding counts; an operand that XLA puts
into VMEM beforehand is XLA's. Both cores of a megacore chip are run, each with its share of the
grid; the busier one counts, their bytes add up. The time is the larger of cycles over the clock and
bytes over the HBM bandwidth, plus the compiler's own estimate (`estimated_cycles`) for what XLA
does around the kernels. Cycles are bundles, or, in a stretch without branches that gives a matrix
unit more than it can do meanwhile, what that unit needs: schedules can be denser than units are
fast.

What is not: waiting. Copies and arithmetic overlap perfectly; the latency of a copy, before the
first step and after the last, is free; HBM reaches its nominal bandwidth and the clock does not
drop. Other stalls (a result not ready, weights pushed into a matrix unit faster than it takes them,
banks of VMEM, instruction fetch) are not seen. So a prediction is a lower bound: good for comparing
two kernels and for saying which of the two limits binds; only a chip gives a time. Where a branch
or a copy depends on data, the region counts as issued and the copy as made if its size is known;
`unresolved` says how often.
"""

from hybrid_jax.targets.schedule.dump import schedule_of
from hybrid_jax.targets.schedule.predict import KernelSchedule, Report

__all__ = ["KernelSchedule", "Report", "schedule_of"]
