"""How the examples of an endless stream are dealt out to data sets by weight."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from data_pipelines.errors import UserError


@dataclasses.dataclass(frozen=True)
class Proportions:
    """Deals an endless stream out to data sets by weight: exactly, and evenly all along.

    A period of as many places as the weights' smallest whole multiples add up to repeats; in it,
    each set has exactly its share, spread evenly.

    Attributes:
      counts: [S] places of each set in a period.
      owner: [period] the set of each place.
      rank: [period] how many earlier places of the period that set has.
    """

    counts: np.ndarray
    owner: np.ndarray
    rank: np.ndarray

    @classmethod
    def of(cls, weights: Mapping[str, object]) -> Proportions:
        """Proportions of named data sets; raises ValueError for weights that make none."""
        for name, weight in weights.items():
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not (number and math.isfinite(weight) and weight > 0):
                raise UserError(
                    f"data.mixture.{name} is {weight!r}: expected the data set's weight, a "
                    "positive number, or 0 to leave it out"
                )
        exact = [Fraction(str(weight)) for weight in weights.values()]
        unit = Fraction(
            math.gcd(*(w.numerator for w in exact)), math.lcm(*(w.denominator for w in exact))
        )
        counts = [int(w / unit) for w in exact]
        if sum(counts) > 1_000_000:
            raise UserError(
                f"data.mixture needs {sum(counts)} examples to come out exactly: "
                "choose weights with fewer digits"
            )
        owner = np.repeat(np.arange(len(counts)), counts)
        rank = np.concatenate([np.arange(c) for c in counts])
        order = np.argsort((rank + 0.5) / np.repeat(counts, counts), kind="stable")
        return cls(np.array(counts), owner[order], rank[order])

    def place(self, n: int) -> tuple[int, int]:
        """The data set of example `n`, and which one of that set's own stream it is."""
        period, i = divmod(n, len(self.owner))
        owner = self.owner[i]
        return int(owner), int(period * self.counts[owner] + self.rank[i])
