"""Plan a step on chips that are not here: compile it, and read what it will take.

What is modelled: a device executes its program in the order the compiler scheduled it. Every
operation takes the compiler's own estimate (TPU), every Pallas kernel the time of its instruction
schedule, and what has neither a roofline time. Collectives take their bytes over the links they
use; they run beside what the program schedules between their start and their end, and beside
nothing else; two on the same links share them. Loops repeat their body, and a body does not overlap
with the next.
"""
