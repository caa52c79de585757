"""`NgramCache` in plain Python: a dictionary of counts for every context, and the mixtures as they are defined."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator

MOST_TOTAL = 65535


class Reference:
    """`score` one token at a time; `evidence` [(total, distinct, count)] of its contexts, the shortest first."""

    def __init__(
        self, orders=(2, 3, 4, 5, 6, 7), mixing="adaptive", a=64.0, d=0.7, boundary=None, reset=False, threshold=0.8
    ):
        self.lengths = [order - 1 for order in orders]
        self.mixing, self.a, self.d, self.boundary, self.reset = mixing, a, d, boundary, reset
        self.threshold = threshold
        self.counts: dict[tuple, Counter] = defaultdict(Counter)
        self.best: dict[tuple, int] = {}
        self.past: list[int] = []
        self.weights: dict[tuple, list[float]] = defaultdict(lambda: [0.3, 0.0])  # weight, times learned
        self.trust = 0.5

    def contexts(self) -> Iterator[tuple]:
        """Of 1, 2, ... tokens, back to a boundary and no further."""
        for length in range(1, min(max(self.lengths), len(self.past)) + 1):
            yield tuple(self.past[-length:])
            if self.past[-length] == self.boundary:
                return

    def evidence(self, token: int) -> list[tuple[int, int, int, int]]:
        found = []
        for context in self.contexts():
            seen = self.counts.get(context)
            if seen and len(context) in self.lengths:
                found.append((len(context), seen.total(), len(seen), seen[token]))
        return found

    def chain(self, base: float, token: int) -> list[float]:
        """The base's probability and those of the levels above it."""
        p = [base]
        for length, n, t, c in self.evidence(token):
            if self.mixing == "dirichlet":
                p.append((c + self.a * p[-1]) / (n + self.a))
            elif self.mixing == "pyp":
                p.append((max(c - self.d, 0) + (self.a + self.d * t) * p[-1]) / (n + self.a))
            else:
                weight = self.weights[self.bucket(length, n, t)][0]
                p.append(weight * c / n + (1 - weight) * p[-1])
        return p

    @staticmethod
    def bucket(length: int, n: int, t: int) -> tuple[int, int, int]:
        power = n.bit_length() - 1
        size = n if n < 4 else min(2 * power + (n >> (power - 1) & 1), 12)
        return length, size, 0 if t == 1 else 1 + (7 * t - 1) // n

    def probability(self, base: float, token: int) -> float:
        p = self.chain(base, token)[-1]
        return self.trust * p + (1 - self.trust) * base if self.mixing == "adaptive" else p

    def hint(self) -> tuple[int, bool]:
        """The most frequent successor of the whole context, and whether it is frequent enough."""
        (length,) = self.lengths
        context = next((each for each in self.contexts() if len(each) == length), None)
        if context not in self.counts:
            return 0, False
        best, seen = self.best[context], self.counts[context]
        return best, seen[best] >= self.threshold * seen.total()

    def score(self, token: int, base: float) -> float:
        p = self.probability(base, token)
        if self.mixing == "adaptive":
            self.learn(base, token)
        self.update(token)
        return math.log(p)

    def learn(self, base: float, token: int) -> None:
        p, evidence = self.chain(base, token), self.evidence(token)
        if not evidence:
            return
        share = 1.0
        for (length, n, t, c), mixed in zip(reversed(evidence), reversed(p), strict=False):
            weight = self.weights[self.bucket(length, n, t)]
            posterior = weight[0] * c / n / mixed
            weight[0] += share * max(0.01, 1 / (weight[1] + 4)) * (posterior - weight[0])
            weight[0] = min(max(weight[0], 1e-6), 1 - 1e-6)
            weight[1] += share
            share *= 1 - posterior
        trust = self.trust * p[-1]
        self.trust = min(max(trust / (trust + (1 - self.trust) * base), 1e-5), 1 - 1e-5)

    def update(self, token: int) -> None:
        for context in self.contexts():
            seen = self.counts[context]
            if seen.total() < MOST_TOTAL:
                seen[token] += 1
            if seen[token] > seen[self.best.setdefault(context, token)]:
                self.best[context] = token
        self.past.append(token)
        if self.reset and token == self.boundary:
            self.counts.clear()
            self.best.clear()
            self.past = [token]
