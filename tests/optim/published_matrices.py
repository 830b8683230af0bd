"""NumPy float64 transcriptions of published updates of matrices, as references for the tests.

Every matrix is a kernel `[in, out]`: L, P, Q_L, d_L belong to its in-side, R, Q, Q_R, d_R to its
out-side. Most functions take the gradients of all steps, which do not depend on the parameters, and
return the list of directions U_t: before learning rate and weight decay, to be subtracted. What the
papers or programs leave open is decided in comments that begin with `Choice:`.
"""

import numpy as np

PSEUDO_INVERSE_CUTOFF = 1e-12  # of the largest eigenvalue or singular value


def _float64(arrays):
    """The arrays of all steps in float64; None stays None."""
    return [None if x is None else np.asarray(x, dtype=np.float64) for x in arrays]


def _power(a, power, cutoff=0.0):
    """a^power of a symmetric matrix; eigenvalues up to `cutoff` of the largest count as absent."""
    w, q = np.linalg.eigh((a + a.T) / 2)
    present = w > cutoff * w[-1]
    return (q * np.where(present, np.where(present, w, 1.0) ** power, 0.0)) @ q.T


def _norm(x):
    """The Frobenius norm."""
    return np.sqrt(np.sum(x * x))


def _rescaled(x, norm):
    """The matrix x with this Frobenius norm; a zero matrix stays zero."""
    return x * (norm / _norm(x)) if _norm(x) > 0 else x


def polar(x):
    """The polar factor U V' of x = U diag(s) V', by SVD.

    Choice: singular values of zero have no direction in it (a partial isometry), so polar(0) = 0.
    """
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return (u * (s > PSEUDO_INVERSE_CUTOFF * s[0])) @ vt


# --- Shampoo --------------------------------------------------------------------------------------


def _shampoo_root(statistic, power, epsilon, trace_scaling):
    """statistic^-power, as DistShampoo's path by eigenvalues has it."""
    if power == 0:  # 0 leaves this axis alone
        return np.eye(len(statistic))
    if trace_scaling:
        # Choice: before epsilon is added.
        statistic = statistic / np.sqrt(np.trace(statistic))
    if epsilon == 0:
        # Choice: epsilon 0 is the mode with pseudo-inverses, which demands it.
        return _power(statistic, -power, PSEUDO_INVERSE_CUTOFF)
    w, q = np.linalg.eigh(statistic + epsilon * np.eye(len(statistic)))  # A + eps I
    if w[0] < epsilon:
        w = w - w[0] + epsilon  # shift all by -lambda_min + eps
    return (q * w**-power) @ q.T


def shampoo(
    gradients,
    *,
    b1,
    b2,
    exponent,
    epsilon,
    every,
    graft,
    graft_eps,
    start,
    b3=None,
    graft_b2=None,
    bias_correction=True,
    trace_scaling=False,
    first_step=1,
):
    """Shampoo with DistShampoo's options.

    `exponent` is p, or a pair for the in-side and the out-side; `b2` = 1 sums with weight 1.
    `graft` is None, "sgd" or "adam"; steps t < `start` are the grafted step itself. `first_step` is
    the t of the first step where t is compared with `every` and `start`.
    """
    gradients = _float64(gradients)
    powers = exponent if isinstance(exponent, tuple) else (exponent, exponent)
    # Choice: b3 = b1 unless stated, which makes the filtered gradient the new M.
    b3 = b1 if b3 is None else b3
    # Choice: the graft's second moment decays as the statistics do, unless stated.
    graft_b2 = b2 if graft_b2 is None else graft_b2
    weight, graft_weight = 1 - b2 if b2 < 1 else 1.0, 1 - graft_b2 if graft_b2 < 1 else 1.0
    left, right, m, v, updates = 0.0, 0.0, np.zeros_like(gradients[0]), 0.0, []
    for n, g in enumerate(gradients, start=1):
        # Choice: t counts from 1 (first_step), as in the bias corrections, which always do.
        t = n - 1 + first_step
        corrected = lambda b, n=n: 1 - b**n if bias_correction and b < 1 else 1.0
        left = b2 * left + weight * g @ g.T  # L = b2 L + (1-b2) G G'
        right = b2 * right + weight * g.T @ g  # R = b2 R + (1-b2) G' G
        if t >= start and (t % every == 0 or t == start or n == 1):
            # Choice: a first step from `start` on computes roots too, whatever its t.
            root_l = _shampoo_root(left / corrected(b2), powers[0], epsilon, trace_scaling)
            root_r = _shampoo_root(right / corrected(b2), powers[1], epsilon, trace_scaling)
        filtered = b3 * m + (1 - b3) * g  # b3 M + (1-b3) G, of the old M
        if bias_correction:
            filtered = filtered / (1 - b3 * b1 ** (n - 1))
        m = b1 * m + (1 - b1) * g  # M = b1 M + (1-b1) G
        v = graft_b2 * v + graft_weight * g**2
        match graft:
            case "adam":
                # The filtered gradient is shared: only the second moment is grafted.
                grafted = filtered / (np.sqrt(v / corrected(graft_b2)) + graft_eps)
            case "sgd" | None:
                # Choice: without a graft, steps before `start` are the filtered gradient.
                grafted = filtered
        if t < start:
            updates.append(grafted)
            continue
        u = root_l @ filtered @ root_r  # L^-p M R^-p
        if graft is not None:
            u = u * _norm(grafted) / (_norm(u) + 1e-16)  # U |U_graft| / (|U| + 1e-16)
        updates.append(u)
    return updates


# --- SOAP and KL ----------------------------------------------------------------------------------


def _first_basis(statistic):
    """Eigenvectors of the statistic, by descending eigenvalues."""
    return np.linalg.eigh(statistic)[1][:, ::-1]


def soap(
    gradients, *, b1, b2, shampoo_beta, eps, every, max_dim, first_bases=(None, None), flip=None
):
    """SOAP with bias correction; the first call only starts the bases.

    A negative `shampoo_beta` means b2. The first G G' of a tall matrix is singular, and U depends
    on which eigenvectors stand for its null space: `first_bases` sets the pair (Q_L, Q_R) instead
    (None: by eigh). `flip` maps every new basis to one with other signs, which U does not see.
    """
    gradients = _float64(gradients)
    beta = b2 if shampoo_beta < 0 else shampoo_beta
    flip = flip or (lambda q: q)
    shape = gradients[0].shape
    has_basis = [size <= max_dim for size in shape]
    m, v, t = np.zeros(shape), np.zeros(shape), 0
    statistics, bases, updates = None, None, []
    for g in gradients:
        outer = [g @ g.T, g.T @ g]
        if bases is None:  # first call: no update, and t stays 0
            statistics = [(1 - beta) * x for x in outer]  # L = (1-b) G G', R = (1-b) G' G
            bases = [np.eye(size) for size in shape]
            for side in range(2):
                if has_basis[side]:
                    first = first_bases[side]
                    first = _first_basis(statistics[side]) if first is None else first
                    bases[side] = flip(first)
            updates.append(np.zeros(shape))
            continue
        t += 1
        ql, qr = bases
        rotated = ql.T @ g @ qr  # g = Q_L' G Q_R
        m = b1 * m + (1 - b1) * rotated  # m = b1 m + (1-b1) g
        v = b2 * v + (1 - b2) * rotated**2  # v = b2 v + (1-b2) g*g
        direction = ql @ (m / (np.sqrt(v) + eps)) @ qr.T  # N = Q_L [m/(sqrt(v)+eps)] Q_R'
        updates.append(np.sqrt(1 - b2**t) / (1 - b1**t) * direction)
        original = ql @ m @ qr.T  # m in the original space, by the old bases
        statistics = [
            beta * x + (1 - beta) * new for x, new in zip(statistics, outer, strict=True)
        ]  # L = b L + (1-b) G G', R likewise
        if t % every == 0:
            for side in range(2):
                if has_basis[side]:
                    a, q = statistics[side], bases[side]
                    order = np.argsort(-np.diag(q.T @ a @ q), kind="stable")
                    v = np.take(v, order, axis=side)  # v permuted, never rotated
                    bases[side] = flip(np.linalg.qr(a @ q[:, order])[0])  # Q = qr(L Q[:,o])
        m = bases[0].T @ original @ bases[1]  # m rotated into the new bases
    return updates


class _KLFactors:
    """L and R with their bases and eigenvalues, whitened by each other."""

    def __init__(self, g, *, b, init_factor, clamp, first_bases):
        self.b = b
        self.floor = 0.0 if clamp is None else clamp**-2.0  # d^-1/2 <= clamp, and stored so
        self.dl, self.dr = (np.full(size, max(init_factor, self.floor)) for size in g.shape)
        # Choice: the first call applies the same formula, from zero statistics and old factors of
        # init_factor times the identity, whatever their basis; the eigenvalues stay there.
        self.ql, self.qr = (np.eye(size) for size in g.shape)
        self.left, self.right = (np.zeros((size, size)) for size in g.shape)
        self.update_statistics(g)
        # Choice: the first bases are those of eigh, descending as SOAP's.
        self.ql, self.qr = (
            _first_basis(a) if q is None else q
            for a, q in zip((self.left, self.right), first_bases, strict=True)
        )

    def update_statistics(self, g):
        """L and R, each whitened by the old factor of the other side (Jacobi)."""
        num_in, num_out = g.shape
        wr = self.qr * self.dr**-0.5  # W_R = Q_R diag(d_R^-1/2)
        wl = self.ql * self.dl**-0.5
        new_l = (g @ wr) @ (g @ wr).T / num_out  # (G W_R)(G W_R)' / out
        new_r = (g.T @ wl) @ (g.T @ wl).T / num_in  # (G' W_L)(G' W_L)' / in
        self.left = self.b * self.left + (1 - self.b) * new_l
        self.right = self.b * self.right + (1 - self.b) * new_r

    def update_eigenvalues(self, g):
        """d_L and d_R in the bases, each whitened by the old one of the other side."""
        rotated = self.ql.T @ g @ self.qr  # g = Q_L' G Q_R
        new_l = np.mean((rotated * self.dr**-0.5) ** 2, axis=1)  # mean_cols((g d_R^-1/2)^2)
        new_r = np.mean((rotated.T * self.dl**-0.5) ** 2, axis=1)
        self.dl = np.maximum(self.b * self.dl + (1 - self.b) * new_l, self.floor)
        self.dr = np.maximum(self.b * self.dr + (1 - self.b) * new_r, self.floor)

    def refresh(self, fix_gauge):
        """Q = qr(L Q) without a sort, after tr L / in = tr R / out if asked for."""
        if fix_gauge:
            scale = np.sqrt(
                np.trace(self.right) / len(self.right) / (np.trace(self.left) / len(self.left))
            )
            self.left, self.dl = self.left * scale, self.dl * scale
            self.right, self.dr = self.right / scale, self.dr / scale
        self.ql = np.linalg.qr(self.left @ self.ql)[0]
        self.qr = np.linalg.qr(self.right @ self.qr)[0]


def _kl(
    gradients,
    init,
    step,
    rotate,
    *,
    b2,
    every,
    init_factor,
    clamp,
    first_bases=(None, None),
    fix_gauge=False,
):
    """The loop that both KL methods share: U by `step` from the factors as they were, then these.

    `init(shape)` is the first state of the method, which `rotate` takes from old bases to new ones.
    """
    gradients = _float64(gradients)
    options = {"b": b2, "init_factor": init_factor, "clamp": clamp, "first_bases": first_bases}
    factors = _KLFactors(gradients[0], **options)
    # The first call starts the factors and moves nothing; t counts from the second, as SOAP's.
    # Choice: it leaves the momentum alone.
    state, updates = init(gradients[0].shape), [np.zeros_like(gradients[0])]
    for t, g in enumerate(gradients[1:], start=1):
        state, u = step(state, g, factors)
        updates.append(u)
        # Choice: the factors follow U, since the current G is not in its own preconditioner;
        # L and R before d_L and d_R, all from the old bases and eigenvalues.
        old = factors.ql, factors.qr
        factors.update_statistics(g)
        factors.update_eigenvalues(g)
        if t % every == 0:
            factors.refresh(fix_gauge)
            state = rotate(state, old, (factors.ql, factors.qr))
    return updates


def kl_shampoo(gradients, *, b1, eps, **options):
    """KL-Shampoo, two-sided.

    The other keywords are those of both methods: `b2`, of the statistics and of v; `every`;
    `init_factor`, where the eigenvalues start; `clamp`, the limit of d^-1/2, None for no limit;
    `first_bases` as in `soap`; `fix_gauge`, whether a refresh sets tr L / in = tr R / out, which
    changes no U where no clamp acts.
    """

    def step(m, g, factors):
        m = b1 * m + (1 - b1) * g  # M = b1 M + (1-b1) G, in the original space
        # Choice: M has no bias correction.
        rotated = factors.ql.T @ m @ factors.qr
        # Q_L [ (Q_L' M Q_R) / (sqrt(d_L d_R') + eps) ] Q_R'
        scaled = rotated / (np.sqrt(np.outer(factors.dl, factors.dr)) + eps)
        return m, factors.ql @ scaled @ factors.qr.T

    return _kl(gradients, np.zeros, step, lambda m, old, new: m, **options)


def kl_soap(gradients, *, b1, eps, **options):
    """KL-SOAP: SOAP's two moments in KL-Shampoo's bases, without bias correction.

    Keywords as in `kl_shampoo`.
    """
    b2 = options["b2"]

    def step(state, g, factors):
        m, v = state
        rotated = factors.ql.T @ g @ factors.qr
        m = b1 * m + (1 - b1) * rotated
        v = b2 * v + (1 - b2) * rotated**2
        return (m, v), factors.ql @ (m / (np.sqrt(v) + eps)) @ factors.qr.T

    def rotate(state, old, new):
        m, v = state  # v is not permuted, since nothing is sorted
        original = old[0] @ m @ old[1].T
        return new[0].T @ original @ new[1], v

    return _kl(gradients, lambda shape: (np.zeros(shape), np.zeros(shape)), step, rotate, **options)


def kl_fixed_point(gradients, *, b, num_steps, divide=True):
    """(L, R) with L = mean(G R^-1 G') / out, R = mean(G' L^-1 G) / in over a set of gradients,
    by damped Jacobi steps from the identity; `divide` False leaves the divisions out.
    """
    g = np.stack(_float64(gradients))
    num_in, num_out = g.shape[1:]
    left, right = np.eye(num_in), np.eye(num_out)
    for _ in range(num_steps):
        mean_l = np.mean(g @ np.linalg.inv(right) @ g.transpose(0, 2, 1), axis=0)
        mean_r = np.mean(g.transpose(0, 2, 1) @ np.linalg.inv(left) @ g, axis=0)
        left = b * left + (1 - b) * mean_l / (num_out if divide else 1)
        right = b * right + (1 - b) * mean_r / (num_in if divide else 1)
    return left, right


# --- one side, and polar factors ------------------------------------------------------------------


def asgo(gradients, *, b1, b2, eps):
    """ASGO, with the root by eigh; eps = 0 takes the pseudo-inverse root."""
    gradients = _float64(gradients)
    num_in, num_out = gradients[0].shape
    # Choice: a square matrix has its in-side preconditioned.
    in_side = num_in <= num_out
    m, v, updates = 0.0, 0.0, []
    cutoff = 0.0 if eps > 0 else PSEUDO_INVERSE_CUTOFF
    for g in gradients:
        m = b1 * m + (1 - b1) * g  # M = b1 M + (1-b1) G, no bias correction
        v = b2 * v + (1 - b2) * (g @ g.T if in_side else g.T @ g)  # V = b2 V + (1-b2) G G'
        root = _power(v + eps * np.eye(len(v)), -0.5, cutoff)  # (V + eps I)^-1/2
        u = root @ m if in_side else m @ root  # V^-1/2 M
        updates.append(_rescaled(u, 0.2 * np.sqrt(num_in * num_out)))  # .2 sqrt(mn) U / |U|
    return updates


def newton_schulz(x, coefficients, num_steps, eps=1e-8):
    """Newton-Schulz steps to the polar factor; `coefficients` is one triple, or one for each step.

    None is the polar factor by SVD.
    """
    if coefficients is None:
        return polar(x)
    coefficients = np.asarray(coefficients, dtype=np.float64)
    coefficients = np.broadcast_to(coefficients, (num_steps, 3))
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x  # the wide orientation, with the small product X X'
    # Choice: eps is added to the norm.
    x = x / (_norm(x) + eps)
    for a, b, c in coefficients:
        xx = x @ x.T
        x = a * x + (b * xx + c * xx @ xx) @ x  # X = a X + (b A + c A^2) X, A = X X'
    return x.T if tall else x


def _muon_scale(shape, consistent_rms):
    """sqrt(max(1, out/in)), or r sqrt(max(in, out))."""
    num_in, num_out = shape
    if consistent_rms is None:
        return np.sqrt(max(1.0, num_out / num_in))
    return consistent_rms * np.sqrt(max(num_in, num_out))


def _muon_mix(mu, g, b, t, nesterov):
    """optax's bias-corrected momentum, or Nesterov mix; t counts from 0."""
    if not nesterov:
        return mu / (1 - b ** (t + 1))
    # b mu / (1 - b^{t+2}) + (1-b) g / (1 - b^{t+1})
    return b * mu / (1 - b ** (t + 2)) + (1 - b) * g / (1 - b ** (t + 1))


def muon(gradients, *, b, nesterov, coefficients, num_steps, consistent_rms, eps=1e-8):
    """Muon as optax has it; `coefficients` None takes polar factors by SVD."""
    gradients = _float64(gradients)
    mu, updates = 0.0, []
    for t, g in enumerate(gradients):
        mu = b * mu + (1 - b) * g  # mu = b mu + (1-b) g
        direction = newton_schulz(_muon_mix(mu, g, b, t, nesterov), coefficients, num_steps, eps)
        updates.append(_muon_scale(g.shape, consistent_rms) * direction)
    return updates


def newton_muon(
    gradients,
    inputs,
    *,
    b,
    decay,
    every,
    damping,
    init=1e-3,
    nesterov=True,
    bias_correction=True,
    coefficients=None,
    num_steps=5,
    consistent_rms=None,
):
    """Newton-Muon; `inputs` are the activations [tokens, in] of each step, one batch for a step."""
    gradients, inputs = _float64(gradients), _float64(inputs)
    num_in = gradients[0].shape[0]
    a, inverse = init * np.eye(num_in), np.eye(num_in)  # A starts at 1e-3 I
    total, count = np.zeros((num_in, num_in)), 0
    m, updates = 0.0, []
    for t, (g, x) in enumerate(zip(gradients, inputs, strict=True)):
        total, count = total + x.T @ x / len(x), count + 1  # K += a'a / tokens ; count += 1
        if (t + 1) % every == 0:
            a = decay * a + (1 - decay) * total / count  # A = .95 A + .05 K/count
            r = damping * np.trace(a) / num_in + 1e-8  # r = .2 tr(A)/in + 1e-8
            inverse = np.linalg.inv(a + r * np.eye(num_in))
            total, count = np.zeros_like(total), 0
        # Choice: a step that refreshes uses the new inverse, which is listed first.
        preconditioned = inverse @ g  # G~ = (A + rI)^-1 G, the identity before the first refresh
        m = b * m + (1 - b) * preconditioned  # M = .95 M + .05 G~
        # Choice: the mix of optax's Muon, so that A = I is Muon exactly; without bias correction
        # it is b M + (1-b) G~.
        if bias_correction:
            mix = _muon_mix(m, preconditioned, b, t, nesterov)
        else:
            mix = b * m + (1 - b) * preconditioned if nesterov else m
        direction = newton_schulz(mix, coefficients, num_steps)
        updates.append(_muon_scale(g.shape, consistent_rms) * direction)
    return updates


def fismo_factors(p, q, g, *, c, mu):
    """(P, Q) after one alternation, P first (Gauss-Seidel), each of trace its size."""
    m, n = g.shape
    normalized = lambda x: (x + x.T) / 2 * len(x) / np.trace(x)  # sym(Pt * m / tr(Pt))
    # L = G Q^-1 G' / n + mu tr(P)/m I ;  Pt = c P + (1-c) L
    left = g @ np.linalg.inv(q) @ g.T / n + mu * np.trace(p) / m * np.eye(m)
    p = normalized(c * p + (1 - c) * left)
    # R = G' P^-1 G / m + mu tr(Q)/n I, of the new P ;  Qt = c Q + (1-c) R
    right = g.T @ np.linalg.inv(p) @ g / m + mu * np.trace(q) / n * np.eye(n)
    q = normalized(c * q + (1 - c) * right)
    return p, q


def fismo(gradients, *, b, c, mu, every):
    """FISMO with the polar factor by SVD, from P = Q = I."""
    gradients = _float64(gradients)
    p, q = (np.eye(size) for size in gradients[0].shape)
    m, updates = 0.0, []
    for t, g in enumerate(gradients):
        # Choice: t counts from 0, so the first step refreshes; a refresh takes that step's G alone.
        if t % every == 0:
            p, q = fismo_factors(p, q, g, c=c, mu=mu)
        root_p, root_q = _power(p, -0.5), _power(q, -0.5)
        m = b * m + (1 - b) * root_p @ g @ root_q  # M = b M + (1-b) P^-1/2 G Q^-1/2
        updates.append(root_p @ polar(m) @ root_q)  # P^-1/2 Polar(M) Q^-1/2
    return updates


# --- MKOR -----------------------------------------------------------------------------------------


def sherman_morrison(inverse, x, decay):
    """(c L + (1-c) x x')^-1 from L^-1."""
    y = inverse @ x
    # (1/c) [ L^-1 - (1-c) L^-1 x x' L^-1 / (c + (1-c) x' L^-1 x) ]
    return (inverse - (1 - decay) * np.outer(y, y) / (decay + (1 - decay) * x @ y)) / decay


def sherman_morrison_reference(inverse, x, decay):
    """(M^-1 + x x')^-1 with M = c L^-1 + (1-c) I, which MKOR's program computes."""
    mixed = decay * inverse + (1 - decay) * np.eye(len(x))
    y = mixed @ x
    return mixed - np.outer(y, y) / (1 + x @ y)  # M - M x x' M / (1 + x' M x)


def _mkor(gradients, inputs, cotangents, rank_one, dense, *, every, rescale, threshold, zeta):
    """The loop of both variants: the directions, and the pairs of dense matrices (L, R)."""
    steps = zip(*map(_float64, (gradients, inputs, cotangents)), strict=True)
    inverses = [np.eye(size) for size in np.shape(gradients[0])]
    matrices = [np.eye(size) for size in np.shape(gradients[0])]
    updates, pairs = [], []
    for t, (g, a, b) in enumerate(steps):
        # Choice: t counts from 0, so the first step refreshes, before it preconditions.
        if t % every == 0:
            for side, x in enumerate((a.mean(axis=0), b.mean(axis=0))):  # abar, gbar
                inverses[side] = rank_one(inverses[side], x)
                matrices[side] = dense(matrices[side], x)
                # Choice: the stabilizer looks at the largest entry, after the rank-one update.
                if threshold is not None and np.max(np.abs(inverses[side])) > threshold:
                    mixed = zeta * inverses[side] + (1 - zeta) * np.eye(len(x))
                    inverses[side], matrices[side] = mixed, np.linalg.inv(mixed)
        u = inverses[0] @ g @ inverses[1]  # L^-1 G R^-1
        updates.append(_rescaled(u, _norm(g)) if rescale else u)  # U |G| / |U|
        pairs.append(tuple(matrices))
    return updates, pairs


def mkor(gradients, inputs, cotangents, *, decay, every, rescale=True, threshold=None, zeta=0.9):
    """MKOR by exact Sherman-Morrison: (directions, pairs of dense matrices (L, R) at each step).

    `inputs` are [tokens, in], `cotangents` [tokens, out] for each step. The dense matrices are
    running averages of their own, which the inverses do not see; with a `threshold` for the
    stabilizer they are inverted anew where it acts.
    """
    return _mkor(
        gradients,
        inputs,
        cotangents,
        lambda inverse, x: sherman_morrison(inverse, x, decay),
        lambda a, x: decay * a + (1 - decay) * np.outer(x, x),  # L = c L + (1-c) x x'
        every=every,
        rescale=rescale,
        threshold=threshold,
        zeta=zeta,
    )


def mkor_reference(
    gradients, inputs, cotangents, *, decay, every, rescale=True, threshold=None, zeta=0.9
):
    """MKOR as the released program updates its inverses, in the form of `mkor`."""

    def dense(a, x):  # (c L^-1 + (1-c) I)^-1 + x x'
        mixed = decay * np.linalg.inv(a) + (1 - decay) * np.eye(len(x))
        return np.linalg.inv(mixed) + np.outer(x, x)

    return _mkor(
        gradients,
        inputs,
        cotangents,
        lambda inverse, x: sherman_morrison_reference(inverse, x, decay),
        dense,
        every=every,
        rescale=rescale,
        threshold=threshold,
        zeta=zeta,
    )


# --- PSGD -----------------------------------------------------------------------------------------


def _lipschitz(previous, ell, beta):
    """L = max(ell, 0.9 L + 0.1 ell); beta 0 is ell itself."""
    return max(ell, beta * previous + (1 - beta) * ell)


def psgd_dense(hs, vs, *, step, beta=0.9, init=1.0):
    """The list of Q after each pair h = Hv, v; P = Q'Q tends to |H|^-1. EQ, upper triangular."""
    hs, vs = _float64(hs), _float64(vs)
    q, lipschitz, path = init * np.eye(len(hs[0])), 0.0, []
    for h, v in zip(hs, vs, strict=True):
        a = q @ h  # a = Q h
        b = np.linalg.solve(q.T, v)  # b = Q^-T v
        lipschitz = _lipschitz(lipschitz, a @ a + b @ b, beta)  # ell = |a|^2 + |b|^2
        q = q - step / lipschitz * np.triu(np.outer(a, a) - np.outer(b, b)) @ q
        path.append(q)
    return path


def psgd_diagonal(hs, vs, *, step, beta=0.0, init=1.0):
    """The list of diagonals q after each pair h = Hv, v."""
    hs, vs = _float64(hs), _float64(vs)
    q, lipschitz, path = init * np.ones_like(hs[0]), 0.0, []
    for h, v in zip(hs, vs, strict=True):
        a, b = (q * h) ** 2, (v / q) ** 2
        # Choice: no running maximum (beta 0), as this formula shows none.
        lipschitz = _lipschitz(lipschitz, np.max(a + b), beta)
        q = q * (1 - step / lipschitz * (a - b))  # q (1 - mu ((qh)^2 - (v/q)^2) / max(...))
        path.append(q)
    return path


def _spectral_norm(a, norm):
    """The spectral norm of a symmetric matrix, or its lower bound from the largest row."""
    if norm == "exact":
        return np.linalg.norm(a, 2)
    # Choice: "power" takes the row of largest norm, one power step, and |A x| / |x|.
    x = a @ a[np.argmax(np.sum(a * a, axis=1))]
    return np.linalg.norm(a @ x) / np.linalg.norm(x)


def psgd_kron_fit(
    factors, h, v, *, step, norm="exact", diagonal=(False, False), beta=0.0, lipschitz=(0.0, 0.0)
):
    """((Q1, Q2), lipschitz) after a pair of matrices h, v; both sides from the old ones."""
    q1, q2 = factors
    a = q1 @ h @ q2.T  # A = Q1 H Q2'
    bt = np.linalg.solve(q2.T, v.T) @ np.linalg.inv(q1)  # Bt = Q2^-T V' Q1^-1
    terms = [(a @ a.T, bt.T @ bt), (a.T @ a, bt @ bt.T)]
    new_factors, new_lipschitz = [], []
    for q, (plus, minus), is_diagonal, previous in zip(
        factors, terms, diagonal, lipschitz, strict=True
    ):
        if is_diagonal:
            difference = np.diag(np.diag(plus - minus))
            ell = np.max(np.diag(plus + minus))  # a diagonal side divides by max|.|
        else:
            difference = np.triu(plus - minus)
            ell = _spectral_norm(plus + minus, norm)
        new_lipschitz.append(_lipschitz(previous, ell, beta))
        # Q - mu triu( (A A' - Bt'Bt) / |A A' + Bt'Bt| ) Q
        new_factors.append(q - step / new_lipschitz[-1] * difference @ q)
    return tuple(new_factors), tuple(new_lipschitz)


def psgd_kron(
    gradients,
    probes,
    *,
    step,
    b1=0.9,
    norm="exact",
    noise=2.0**-11.5,
    fit="momentum",
    max_size=8192,
    scale=1.0,
    rms_clip=1.1,
    beta=0.0,
    balance_at=(),
):
    """PSGD-Kron that whitens momentum, or gradients with `fit` "gradient".

    `noise` is relative to the mean of |m|, by default the root of float32's epsilon.
    `probes` are the V_t; a step whose probe is None does not fit. `norm` is "exact" or "power",
    `rms_clip` None for no clip, and `balance_at` the steps, from 0, that balance before they fit.
    """
    gradients, probes = _float64(gradients), _float64(probes)
    shape = gradients[0].shape
    diagonal = tuple(size == 1 or size > max_size for size in shape)
    factors = tuple(np.sqrt(scale) * np.eye(size) for size in shape)  # scale^(1/k) I
    lipschitz, m, updates = (0.0, 0.0), 0.0, []
    for t, (g, v) in enumerate(zip(gradients, probes, strict=True)):
        m = b1 * m + (1 - b1) * g
        corrected = m / (1 - b1 ** (t + 1))
        if t in balance_at:
            largest = [np.max(np.abs(q)) for q in factors]
            mean = np.sqrt(largest[0] * largest[1])  # gmean_j(max|Q_j|) / max|Q_i|
            factors = tuple(q * mean / x for q, x in zip(factors, largest, strict=True))
        if v is not None:
            target = corrected if fit == "momentum" else g
            h = target + noise * np.mean(np.abs(target)) * v  # m + sqrt(eps32) mean|m| Vr
            options = {"step": step, "norm": norm, "diagonal": diagonal, "beta": beta}
            factors, lipschitz = psgd_kron_fit(factors, h, v, lipschitz=lipschitz, **options)
        # Choice: U has the factors that this step fitted.
        q1, q2 = factors
        u = q1.T @ q1 @ corrected @ q2.T @ q2  # (prod Q_i'Q_i) m
        if rms_clip is not None:
            u = u / max(1.0, np.sqrt(np.mean(u * u)) / rms_clip)  # U / max(1, rms(U)/1.1)
        updates.append(u)
    return updates


def psgd_schedule(num_steps):
    """Whether each step fits, by psgd_jax's deterministic counter."""
    counter, fits = 0, []
    for t in range(num_steps):
        probability = np.clip(np.exp(-0.001 * (t - 500)), 0.03, 1.0)
        # Choice: the counter counts this step, and starts from 0 again after a fit.
        counter += 1
        fits.append(bool(counter >= 1 / probability))
        counter = 0 if fits[-1] else counter
    return fits


# --- self-scaled Broyden --------------------------------------------------------------------------


def broyden_inverse_update(inverse, s, y, b, theta, tau):
    """H+ of the self-scaled Broyden family, b = s.H^-1 s / y.s: H+ y = s for any theta, tau."""
    rho, hy = 1 / (y @ s), inverse @ y
    yhy = y @ hy
    a = max(b * rho * yhy - 1, 0.0)  # a = b h - 1, not below 0, which only rounding can do
    sigma = 1 + a * theta
    phi = (1 - theta) / sigma
    v = rho * s - hy / yhy
    # (H - Hy (Hy)' / y.Hy + phi y.Hy v v') / tau + rho s s'
    scaled = inverse - np.outer(hy, hy) / yhy + phi * yhy * np.outer(v, v)
    return scaled / tau + rho * np.outer(s, s)


def broyden_direct_update(b, s, y, theta, tau):
    """B+ = H+^-1 of the same theta and tau."""
    rho, bs = 1 / (y @ s), b @ s
    sbs = s @ bs
    w = rho * y - bs / sbs
    # tau (B - Bs (Bs)' / s.Bs + theta s.Bs w w') + rho y y'
    return tau * (b - np.outer(bs, bs) / sbs + theta * sbs * np.outer(w, w)) + rho * np.outer(y, y)


def ssbroyden_scales(inverse, s, y, g, alpha, *, kind, initial):
    """(b, theta, tau) of "ssbroyden" or "ssbfgs"; `initial` at the first update of H."""
    rho = 1 / (y @ s)
    h = rho * (y @ inverse @ y)  # h = y.Hy rho
    b = -alpha * rho * (s @ g)  # b = -alpha rho s.g_k
    a = max(b * h - 1, 0.0)  # a = b h - 1 >= 0
    c = np.sqrt(np.abs(a / (1 + a)))
    rm = min(1.0, h * (1 - c))
    match kind:
        case "ssbfgs":
            theta = 0.0
        case "ssbroyden":
            theta = min(1 / rm, (1 - b) / b)
            # Choice: at a = 0 the other bound is left out, which is its limit: it falls to minus
            # infinity for h < 1, and is 0, below the positive (1-b)/b, for h > 1.
            if a > 0:
                theta = max((rm - 1) / a, theta)
    sigma = 1 + a * theta
    size = len(s)
    # Choice: q = 1 in one dimension, where a = 0 and sigma = 1.
    q = sigma ** (-1 / (size - 1)) if size > 1 else 1.0
    bound = min(1.0, 1 / b)
    if initial:
        # Choice: both kinds scale the initial matrix so.
        return b, theta, h / sigma
    if kind == "ssbfgs":
        return b, theta, bound
    return b, theta, bound * min(q, 1 / theta) if theta > 0 else min(bound * q, sigma)


def ssbroyden(fun, grad, x0, steps, *, kind, initial_scaling=True):
    """The iterates x_0, x_1, ... and the matrices H_0 = I, H_1, ... of step lengths `steps`.

    A step may be a number, or a line search `alpha = step(fun, x, p, g)`. `initial_scaling` False
    gives the first update the tau of all others.
    """
    x = np.asarray(x0, dtype=np.float64)
    inverse, g, initial = np.eye(len(x)), grad(x), initial_scaling
    iterates, inverses = [x], [inverse]
    for step in steps:
        p = -inverse @ g
        alpha = step(fun, x, p, g) if callable(step) else step
        s = alpha * p
        new_g = grad(x + s)
        y = new_g - g
        if y @ s > 0:  # otherwise H stays: no positive definite matrix has H y = s
            # Choice: the first update is the first that is not skipped.
            scales = ssbroyden_scales(inverse, s, y, g, alpha, kind=kind, initial=initial)
            inverse, initial = broyden_inverse_update(inverse, s, y, *scales), False
        x, g = x + s, new_g
        iterates.append(x)
        inverses.append(inverse)
    return iterates, inverses
