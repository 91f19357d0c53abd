"""Distributions over the vocabulary of maximum entropy, given the mean of what tokens are."""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from phatgoose.errors import ConfigError

PENALTY = 0.1  # of the inputs' mean variance, on half the squared length of θ
TOLERANCE = 1e-5  # of the inputs' deviation: how far the mean may be from the one wanted
STEPS = 3000
TOKENS, FITTED = 16384, 64  # held in fp64 at once: of the vocabulary, of the distributions


def most_even(
    inputs: Float[Tensor, "V I"], means: Float[Tensor, "E I"], metric: Float[Tensor, "I I"]
) -> Float[Tensor, "E V"]:
    """log p_e(t) of the p_e(t) ∝ exp(θ_e · x_t) whose mean input is m_e, in fp64.

    Of all distributions with that mean it is the most even one. θ_e minimises
    log Σ_t exp(θ_e · x_t) - θ_e · m_e + λ/2 |θ_e|², with λ `PENALTY` times the mean variance of
    the inputs: the mean of few prompts says little about rare directions, so it is not met exactly.

    Conjugate gradients (Polak-Ribière+), each distribution on its own, so that what is fitted
    beside it changes nothing but rounding. A step reads the inputs twice. `metric`, the inputs'
    covariance in ordinary text, preconditions; only the time taken depends on it.

    Raises ConfigError where `STEPS` steps do not do.
    """
    inputs = inputs.detach()
    centre = inputs.mean(0, dtype=torch.float64)
    squares = sum(float((part - centre).square().sum()) for part in _parts(inputs))
    variance = squares / inputs.numel()
    penalty, tolerance = PENALTY * variance, TOLERANCE * variance**0.5
    factor = torch.linalg.cholesky(metric + penalty * torch.eye(*metric.shape).to(metric))
    groups = means.to(inputs.device).double().split(FITTED)
    found = [_fit(inputs, group, penalty, factor, tolerance) for group in groups]
    return torch.cat(found).log_softmax(1)


def _fit(
    inputs: Float[Tensor, "V I"],
    means: Float[Tensor, "E I"],
    penalty: float,
    factor: Float[Tensor, "I I"],
    tolerance: float,
) -> Float[Tensor, "E V"]:
    """The logits θ · x; `factor` is the preconditioner's, by Cholesky."""
    theta = torch.zeros_like(means)
    logits = means.new_zeros(len(means), len(inputs))
    before: tuple[Tensor, ...] = ()
    left = torch.arange(len(means), device=means.device)
    for _ in range(STEPS):
        gradient = _expected(logits[left].softmax(1), inputs) - means[left] + penalty * theta[left]
        going = gradient.abs().amax(1) > tolerance
        if not going.any():
            return logits
        left, gradient, before = left[going], gradient[going], tuple(t[going] for t in before)
        ahead = torch.cholesky_solve(gradient.T, factor).T
        direction = -ahead
        if before:
            old_gradient, old_ahead, old_direction = before
            turned = _dot(gradient, ahead - old_ahead) / _dot(old_gradient, old_ahead)
            direction = direction + turned.clamp_min(0) * old_direction
        slope = torch.cat([direction @ part.T for part in _parts(inputs)], dim=1)
        length = _step(
            logits[left],
            slope,
            _dot(penalty * theta[left] - means[left], direction),
            penalty * _dot(direction, direction),
        )
        theta[left] += length * direction
        logits[left] += length * slope
        before = (gradient, ahead, direction)
    raise ConfigError(
        f"evidence: {len(left)} of {len(means)} distributions over the tokens were not found. Were "
        "the mean prompts measured on this base? Make them again: phatgoose experts derive"
    )


def _step(
    logits: Float[Tensor, "E V"],
    slope: Float[Tensor, "E V"],
    constant: Float[Tensor, "E 1"],
    linear: Float[Tensor, "E 1"],
) -> Float[Tensor, "E 1"]:
    """How far to go: where log Σ exp(logits + s · slope) + constant s + linear s²/2 is flat.

    Newton's method, by bisection where it would leave the bracket; the function is convex.
    """
    length, low = torch.zeros_like(constant), torch.zeros_like(constant)
    high = torch.full_like(constant, float("inf"))
    enough = torch.zeros_like(constant)
    done: Bool[Tensor, "E 1"] = torch.zeros_like(constant, dtype=torch.bool)
    for attempt in range(30):
        share = (logits + length * slope).softmax(1)
        mean = _dot(share, slope)
        rise = mean + constant + linear * length
        if attempt == 0:
            enough = 0.1 * rise.abs()
        done = done | (rise.abs() <= enough)
        if done.all():
            break
        curve = (_dot(share, slope * slope) - mean * mean).clamp_min(0) + linear
        low = torch.where(rise < 0, length, low)
        high = torch.where(rise > 0, length, high)
        further = length - rise / curve
        between = torch.where(high.isinf(), 2 * low + 1, (low + high) / 2)
        inside = (further > low) & (further < high) & (further < 4 * low + 4)
        length = torch.where(done, length, torch.where(inside, further, between))
    return length


def _expected(share: Float[Tensor, "E V"], inputs: Float[Tensor, "V I"]) -> Float[Tensor, "E I"]:
    total = share.new_zeros(len(share), inputs.shape[1])
    for some, part in zip(share.split(TOKENS, dim=1), _parts(inputs), strict=True):
        total += some @ part
    return total


def _parts(inputs: Float[Tensor, "V I"]) -> Iterator[Float[Tensor, "_ I"]]:
    """The inputs in fp64, a part at a time."""
    return (part.double() for part in inputs.split(TOKENS))


def _dot(a: Float[Tensor, "E N"], b: Float[Tensor, "E N"]) -> Float[Tensor, "E 1"]:
    return (a * b).sum(1, keepdim=True)
