"""The paper's equations, line by line and weight by weight, in plain Python floats: the oracle of the fast paths."""

import math


def keep_largest(group: list[float], n: int) -> list[bool]:
    """The n largest |w| of one group; of two equal ones the earlier."""
    order = sorted(range(len(group)), key=lambda i: (-abs(group[i]), i))
    return [i in order[:n] for i in range(len(group))]


def keep(row: list[float], n: int, m: int) -> list[bool]:
    return [k for start in range(0, len(row), m) for k in keep_largest(row[start : start + m], n)]


def sign(x: float) -> float:
    return 0.0 if x == 0 else math.copysign(1.0, x)


class ReferenceAdamS:
    """Alg. 1 and Eq. 7-8 of arXiv 2509.25996, and "horizon", on a matrix given as a list of rows."""

    def __init__(self, rows, n, m, *, lr, betas, eps, lam, total_steps, mask_interval, decay, decay_end, second_moment):
        self.w = [list(map(float, row)) for row in rows]
        self.n, self.m, self.lr, self.betas, self.eps, self.lam = n, m, lr, betas, eps, lam
        self.total_steps, self.mask_interval, self.decay, self.decay_end = total_steps, mask_interval, decay, decay_end
        self.second_moment = second_moment
        self.mu = [[0.0] * len(row) for row in self.w]
        self.v = [[0.0] * len(row) for row in self.w]
        self.mask = None
        self.t = 0

    def ramp(self, t):
        if self.decay == "none":
            return 0.0
        if self.decay == "horizon":
            return min(1.0, t / (self.decay_end * self.total_steps))
        return t / self.total_steps

    def step(self, grads):
        b1, b2 = self.betas
        t = self.t
        if t % self.mask_interval == 0:
            self.mask = [keep(row, self.n, self.m) for row in self.w]
        a = self.ramp(t)
        for i, row in enumerate(self.w):
            for j, w in enumerate(row):
                g = grads[i][j]
                mu = b1 * self.mu[i][j] + (1 - b1) * g
                kept = self.mask[i][j]
                if kept:
                    mix = mu
                elif self.decay == "proportional":
                    mix = (1 - a) * mu + a * self.lam * sign(w)
                elif self.decay == "additive":
                    mix = mu + a * self.lam * sign(w)
                elif self.decay == "horizon":
                    mix = (1 - a) * mu
                else:
                    mix = mu
                v = b2 * self.v[i][j] + (1 - b2) * (g if self.second_moment == "gradient" else mix) ** 2
                mu_hat = mix / (1 - b1 ** (t + 1))
                v_hat = v / (1 - b2 ** (t + 1))
                w = w - self.lr * mu_hat / (math.sqrt(v_hat) + self.eps)
                if self.decay == "horizon" and not kept:
                    w = w * (1 - self.ramp(t + 1)) / (1 - a) if a < 1 else 0.0
                self.mu[i][j], self.v[i][j], row[j] = mu, v, w
        self.t += 1
