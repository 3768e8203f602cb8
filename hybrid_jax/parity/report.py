"""What a comparison found: as JSON of a fixed schema, and as a table to read."""

import dataclasses
from typing import Any

from hybrid_jax.parity.measure import Difference

LOGITS_TOLERANCE = 1e-4
GRADIENTS_TOLERANCE = 1e-3

# The longest published name: an expert's matrix in a layer past the ninth.
NAME_WIDTH = 58


@dataclasses.dataclass(frozen=True, kw_only=True)
class Greedy:
    """Greedy continuations of the same prompts from both sides."""

    tokens: int
    """Tokens generated a row."""
    same_tokens: int
    """Tokens before the first difference, in the row that parts first."""
    undecided: bool = False
    """Whether every row that parts does so where the reference itself cannot tell."""

    @property
    def equal(self) -> bool:
        return self.same_tokens == self.tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Every number of one comparison, the reference's side always second."""

    directory: str
    reference: str
    notes: list[str]
    """Where transformers computes something else than the model, and what was done about it."""
    shape: tuple[int, int]
    """Rows and tokens a row of the input."""
    layers: list[tuple[str, Difference]]
    logits: Difference
    top1: float
    gradients: list[tuple[str, Difference]]
    """By published tensor name, the farthest first."""
    greedy: Greedy

    @property
    def gradients_max_rel(self) -> float:
        return max((difference.max_rel for _, difference in self.gradients), default=0.0)

    @property
    def failures(self) -> list[str]:
        """In words, each check that did not hold."""
        failures = []
        if self.logits.max_rel > LOGITS_TOLERANCE:
            failures.append(f"logits {self.logits.max_rel:.2e} > {LOGITS_TOLERANCE:.0e}")
        if self.gradients_max_rel > GRADIENTS_TOLERANCE:
            worst = self.gradients[0][0]
            failures.append(
                f"gradients {self.gradients_max_rel:.2e} > {GRADIENTS_TOLERANCE:.0e} ({worst})"
            )
        if not self.greedy.equal and not self.greedy.undecided:
            failures.append(f"greedy text parts after {self.greedy.same_tokens} tokens")
        return failures

    @property
    def passed(self) -> bool:
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """The public schema; `measure` defines the numbers."""
        return {
            "passed": self.passed,
            "logits": {
                "max_rel": self.logits.max_rel,
                "mean_rel": self.logits.mean_rel,
                "cosine": self.logits.cosine,
                "top1": self.top1,
            },
            "layers": [
                {"name": name, "max_rel": difference.max_rel, "cosine": difference.cosine}
                for name, difference in self.layers
            ],
            "gradients": {"max_rel": self.gradients_max_rel},
            "greedy": {"tokens": self.greedy.tokens, "equal": self.greedy.equal},
            "reference": self.reference,
            "tolerance": {"logits": LOGITS_TOLERANCE, "gradients": GRADIENTS_TOLERANCE},
        }

    def lines(self) -> list[str]:
        """The table for a terminal."""
        rows, tokens = self.shape
        lines = [
            f"{self.directory} against {self.reference}, float32, {rows} x {tokens} random tokens",
            *(f"note: {note}" for note in self.notes),
            "",
            f"{'':{NAME_WIDTH}}{'max rel':>10}{'mean rel':>10}{'1 - cosine':>12}",
            *(_row(name, difference) for name, difference in self.layers),
            _row("logits", self.logits) + f"   top-1 agreement {self.top1:.2%}",
            "",
            f"gradients of {len(self.gradients)} tensors, the farthest:",
            *(_row(name, difference) for name, difference in self.gradients[:5]),
            "",
            self._greedy_line(),
            "",
        ]
        if self.passed:
            lines.append(
                f"passed: logits {self.logits.max_rel:.1e} (at most {LOGITS_TOLERANCE:.0e}), "
                f"gradients {self.gradients_max_rel:.1e} (at most {GRADIENTS_TOLERANCE:.0e})"
            )
        else:
            lines.append(f"FAILED: {'; '.join(self.failures)}")
        return lines

    def _greedy_line(self) -> str:
        if self.greedy.equal:
            return f"greedy: the same {self.greedy.tokens} tokens"
        line = f"greedy: the same for {self.greedy.same_tokens} of {self.greedy.tokens} tokens"
        if self.greedy.undecided:
            line += (
                "; there two tokens, or two experts before, are as good as equal, "
                "so that neither choice is wrong"
            )
        return line


def _row(name: str, difference: Difference) -> str:
    return (
        f"{name:<{NAME_WIDTH}}{difference.max_rel:>10.1e}{difference.mean_rel:>10.1e}"
        f"{1 - difference.cosine:>12.1e}"
    )
