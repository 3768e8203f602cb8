"""What Python prints goes to standard error, for Gloo's threads write to standard output.

Two of them write at once, in pieces, and then no line is surely theirs or surely a program's.
"""

import sys

sys.stdout = sys.stderr
