"""M-FAC's algorithms in NumPy, as published: recurrences over the rows, in any precision."""

import numpy as np


def static_inverse(G, damping, x):
    """Apply the inverse by vectors `v_i = F_{i-1}^-1 g_i`,
    built one after another (the static algorithm).
    """
    m, v, q = len(G), [], []
    for g in G:
        u = g / damping
        for vk, qk in zip(v, q, strict=True):
            u = u - vk * (vk @ g) / qk
        v.append(u)
        q.append(m + g @ u)
    result = x / damping
    for vi, qi in zip(v, q, strict=True):
        result = result - vi * (vi @ x) / qi
    return result


def dynamic_inverse(G, damping, x):
    """Apply the inverse by the matrices D and B, which come from inner products alone (the
    dynamic algorithm).
    """
    m, dtype = len(G), G.dtype
    S = G @ G.T
    U = m * np.eye(m, dtype=dtype) + S / dtype.type(damping)
    for k in range(m):  # elimination without pivots
        U[k + 1 :, k:] -= np.outer(U[k + 1 :, k] / U[k, k], U[k, k:])
    D = np.triu(U - m * np.eye(m, dtype=dtype))
    q = m + np.diag(D)
    B = np.zeros((m, m), dtype)
    for i in range(m):
        B[i, i] = 1 / damping
        for k in range(i):
            B[i] -= D[k, i] / q[k] * B[k]
    p = G @ x / dtype.type(damping)
    for i in range(m):
        p[i + 1 :] -= D[i, i + 1 :] * p[i] / q[i]
    return x / dtype.type(damping) - G.T @ (B.T @ (p / q))
