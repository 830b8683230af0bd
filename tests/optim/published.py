"""NumPy float64 transcriptions of published updates, as references for the tests."""

import numpy as np


def _copy(tree):
    """A float64 copy of a dict of arrays."""
    return {name: np.array(x, dtype=np.float64) for name, x in tree.items()}


def _zeros(tree):
    """A dict of float64 zeros of the same shapes."""
    return {name: np.zeros(np.shape(x)) for name, x in tree.items()}


def adahessian(
    theta, gradient, hvp, probes, *, lr, b1, b2, eps, hessian_power, weight_decay, average
):
    """The list of parameters after each AdaHessian step, one step per probe."""
    theta, m, v, path = _copy(theta), _zeros(theta), _zeros(theta), []
    for t, z in enumerate(probes):
        g, hz, new = _copy(gradient(theta, t)), _copy(hvp(theta, t, z)), {}
        for name, x in theta.items():
            d = np.abs(hz[name])  # d_t = |H z|
            mean = average(name, d)  # D_t = blockmean(d_t)
            m[name] = b1 * m[name] + (1 - b1) * g[name]  # m_t = b1 m + (1-b1) g
            v[name] = b2 * v[name] + (1 - b2) * mean**2  # v_t = b2 v + (1-b2) D_t^2
            mhat = m[name] / (1 - b1 ** (t + 1))  # mhat = m_t / (1-b1^t), t counted from 1
            vhat = v[name] / (1 - b2 ** (t + 1))  # vhat = v_t / (1-b2^t), t counted from 1
            direction = mhat / (vhat ** (hessian_power / 2) + eps)  # mhat / (vhat^{k/2} + eps)
            new[name] = x - lr * (direction + weight_decay * x)  # theta - lr (direction + wd theta)
        theta = new
        path.append(_copy(theta))
    return path


def sophia(theta, gradient, curvature, num_steps, *, lr, b1, b2, gamma, eps, weight_decay, every):
    """The list of parameters after each Sophia step,
    the curvature refreshed first when t % every == 0.
    """
    theta, m, h, path = _copy(theta), _zeros(theta), _zeros(theta), []
    for t in range(num_steps):
        g, new = _copy(gradient(theta, t)), {}
        if t % every == 0:
            hhat = _copy(curvature(theta, t))
            h = {name: b2 * h[name] + (1 - b2) * hhat[name] for name in h}  # h = b2 h + (1-b2) hhat
        for name, x in theta.items():
            m[name] = b1 * m[name] + (1 - b1) * g[name]  # m = b1 m + (1-b1) g
            ratio = m[name] / np.maximum(gamma * h[name], eps)  # m / max(gamma h, eps)
            decayed = x - lr * weight_decay * x  # theta = theta - lr wd theta
            new[name] = decayed - lr * np.clip(
                ratio, -1.0, 1.0
            )  # theta = theta - lr clip(ratio, 1)
        theta = new
        path.append(_copy(theta))
    return path


def sophia_hutchinson(hvp, probes):
    """The Sophia-H curvature(theta, t): u * (H u) with u = probes[t]."""

    def curvature(theta, t):
        u, hu = probes[t], hvp(theta, t, probes[t])
        return {
            name: np.asarray(u[name]) * np.asarray(hu[name]) for name in theta
        }  # hhat = u * (H u)

    return curvature


def oasis(
    theta, gradient, hvp, probes, first_probes, *, lr, b2, alpha, momentum, max_kl, weight_decay
):
    """The parameters, and the factor of a step, after each OASIS step with a fixed rate."""
    theta, m, diagonal, path, factors = _copy(theta), _zeros(theta), {}, [], []
    for t, z in enumerate(probes):
        g, new = _copy(gradient(theta, t)), {}
        diagonal = _oasis_diagonal(theta, hvp, diagonal, t, [z] if t else [z, *first_probes], b2)
        floored = {name: np.maximum(np.abs(d), alpha) for name, d in diagonal.items()}
        length = lr**2 * sum(np.sum(g[name] ** 2 / floored[name]) for name in theta)
        factor = min(1.0, np.sqrt(max_kl / length))
        for name, x in theta.items():
            m[name] = momentum * m[name] + factor * g[name] / floored[name]
            new[name] = x - lr * (m[name] + weight_decay * x)
        theta = new
        path.append(_copy(theta))
        factors.append(factor)
    return path, factors


def oasis_auto(theta, gradient, hvp, probes, first_probes, *, b2, alpha, first_rate):
    """The parameters and the rate after each OASIS step with an adaptive rate."""
    theta, before, diagonal, path, rates = _copy(theta), None, {}, [], []
    eta, growth = first_rate, np.inf  # theta_0 = infinity
    for t, z in enumerate(probes):
        g = _copy(gradient(theta, t))
        diagonal = _oasis_diagonal(theta, hvp, diagonal, t, [z] if t else [z, *first_probes], b2)
        floored = {name: np.maximum(np.abs(d), alpha) for name, d in diagonal.items()}
        if before is not None:
            g_before = gradient(before, t)  # on the same mini-batch
            moved = sum(np.sum(floored[n] * (theta[n] - before[n]) ** 2) for n in theta)
            changed = sum(np.sum((g[n] - g_before[n]) ** 2 / floored[n]) for n in theta)
            new = min(np.sqrt(1 + growth) * eta, 0.5 * np.sqrt(moved) / np.sqrt(changed))
            growth, eta = new / eta, new
        before = theta
        theta = {name: theta[name] - eta * g[name] / floored[name] for name in theta}
        path.append(_copy(theta))
        rates.append(eta)
    return path, rates


def _oasis_diagonal(theta, hvp, diagonal, t, probes, b2):
    """D_0 is the mean over all probes; then D = b2 D + (1 - b2) z * (H z)."""
    estimates = [{n: z[n] * hz for n, hz in _copy(hvp(theta, t, z)).items()} for z in probes]
    fresh = {n: np.mean([each[n] for each in estimates], axis=0) for n in theta}
    return {n: b2 * diagonal[n] + (1 - b2) * fresh[n] for n in theta} if t else fresh


def sania(theta, loss, gradient, num_steps, *, metric, f_star):
    """The list of parameters after each SANIA step; `metric(name, g, t)` gives B of one leaf."""
    theta, path = _copy(theta), []
    for t in range(num_steps):
        f, g = loss(theta, t) - f_star, _copy(gradient(theta, t))
        B = {name: metric(name, g[name], t) for name in theta}
        n = sum(np.sum(g[name] ** 2 / B[name]) for name in theta)
        lam = 1.0 if n <= 2 * f else 1 - np.sqrt(1 - 2 * f / n)
        theta = {name: theta[name] - lam * g[name] / B[name] for name in theta}
        path.append(_copy(theta))
    return path


def adagrad_sqr(eps):
    """`B = max(eps, sum g^2)`, no square root."""
    total = {}

    def metric(name, g, t):
        total[name] = total.get(name, 0) + g**2
        return np.maximum(eps, total[name])

    return metric


def adam_sqr(b2, eps):
    """`B = max(eps, vhat)`, Adam's second moment without the square root."""
    v = {}

    def metric(name, g, t):
        v[name] = b2 * v.get(name, 0) + (1 - b2) * g**2
        return np.maximum(eps, v[name] / (1 - b2 ** (t + 1)))

    return metric


def spatial_mean(name, d):
    """The mean over a dense kernel's input axis or a convolution kernel's spatial axes
    (Flax layouts).
    """
    if d.ndim < 2:
        return d
    axes = 0 if d.ndim == 2 else tuple(range(d.ndim - 2))
    return np.broadcast_to(d.mean(axis=axes, keepdims=True), d.shape).copy()


def block_mean(size):
    """The average(name, d) over consecutive row-major groups of `size` entries,
    the last possibly shorter.
    """

    def average(name, d):
        flat, out = d.reshape(-1), np.empty(d.size)
        for start in range(0, d.size, size):
            out[start : start + size] = flat[start : start + size].mean()
        return out.reshape(d.shape)

    return average


def levenberg_marquardt(
    theta, loss, gradient, curvature, step, num_steps, *, damping, every, factor
):
    """The list of (theta, m, damping, rho, accepted) after each step;
    `step(g, m, damping)` gives d and the next m.

    Steps between trials have rho None.
    """
    theta, m, damping, path = np.array(theta), np.zeros_like(theta), np.float32(damping), []
    change = np.float32(factor**every)
    for t in range(num_steps):
        g, rho, accepted = gradient(theta), None, True
        d, new = step(g, m, damping)
        if t % every == 0:
            with np.errstate(invalid="ignore", over="ignore"):
                reduction = loss(theta + d) - loss(
                    theta
                )  # rho = (L(theta + d) - L(theta)) / (g.d + d'Fd / 2)
                rho = reduction / (g @ d + d @ curvature(theta) @ d / 2)
            accepted = bool(reduction < 0)  # NaN is not
            if not accepted:
                d, new, damping = np.zeros_like(d), m, damping / change
            elif rho > 3 / 4:
                damping = damping * change
            elif not rho >= 1 / 4:
                damping = damping / change
        theta, m = theta + d, new
        path.append((theta, m, damping, rho, accepted))
    return path
