"""Regularized logistic regression to a gradient norm of 1e-10: Newton's method with gradient or
cubic regularization, with Hessians that are kept, in Krylov spaces, and others.

    python examples/newton.py                       # scikit-learn's breast cancer data
    python examples/newton.py --data a9a.t          # any LIBSVM file of two classes

Float64. Each method starts from zero and stops at the target or at its limit of steps. Seconds are
those of compiled steps; compilation is shown apart.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import print_table
from sklearn.datasets import load_breast_cancer, load_svmlight_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

import curvax

TARGET = 1e-10


def load(path):
    """Return features with a constant one, and labels 0 or 1."""
    if path is None:
        x, y = load_breast_cancer(return_X_y=True)
        x = StandardScaler().fit_transform(x)
    else:
        x, y = load_svmlight_file(path)
        x = x.toarray()
    classes = np.unique(y)
    if len(classes) != 2:
        raise SystemExit(f"{path} has {len(classes)} classes; this example needs two.")
    return np.hstack([x, np.ones((len(x), 1))]), (y == classes[1]).astype(float)


def regression(x, y, l2):
    """Return the objective `mean log-loss + l2 / 2 |w|^2` and its batch; the penalty is a head
    whose output is w.
    """
    penalty = curvax.losses.from_function(
        lambda w, _: jnp.sum(w[0] ** 2) / 2, num_terms=lambda w, _: jnp.ones(())
    )
    loss = curvax.losses.weighted_sum(
        {"fit": (1.0, curvax.losses.sigmoid_cross_entropy()), "penalty": (l2, penalty)}
    )
    model = lambda w, x: {"fit": (x @ w)[:, None], "penalty": w[None]}
    batch = (
        jnp.asarray(x),
        {"fit": jnp.asarray(y)[:, None], "penalty": curvax.Shared(jnp.zeros(1))},
    )
    return curvax.Objective(model, loss), batch


def run(name, tx, objective, batch, num_steps, extra=lambda value, grad, value_fn: {}):
    """Minimize until the gradient's norm is below the target; return a row of the table, and the
    norms.
    """
    value_fn = lambda w, **_: objective(w, batch)

    @jax.jit
    def step(w, state):
        value, grad = jax.value_and_grad(objective)(w, batch)
        updates, state = tx.update(grad, state, w, batch=batch, **extra(value, grad, value_fn))
        w = optax.apply_updates(w, updates)
        return w, state, jnp.linalg.norm(jax.grad(objective)(w, batch))

    w = jnp.zeros(batch[0].shape[1])
    state = tx.init(w)
    start = time.perf_counter()
    step = step.lower(w, state).compile()
    compiled = time.perf_counter() - start
    norms = [float(jnp.linalg.norm(jax.grad(objective)(w, batch)))]
    start = time.perf_counter()
    with tqdm(total=num_steps, desc=name, leave=False) as bar:
        while norms[-1] > TARGET and len(norms) <= num_steps:
            w, state, norm = step(w, state)
            norms.append(float(norm))
            bar.update()
    seconds = time.perf_counter() - start
    value = objective(w, batch)
    return [
        name,
        len(norms) - 1,
        f"{norms[-1]:.1e}",
        f"{seconds:.3f}",
        f"{compiled:.1f}",
        f"{value:.10f}",
    ], norms


def scikit_learn(x, y, l2, objective, batch):
    """Run scikit-learn's Newton-Cholesky on the same problem."""
    model = LogisticRegression(
        solver="newton-cholesky", C=1 / (l2 * len(x)), fit_intercept=False, tol=1e-14, max_iter=100
    )
    start = time.perf_counter()
    model.fit(x, y)
    seconds = time.perf_counter() - start
    w = jnp.asarray(model.coef_[0])
    norm = jnp.linalg.norm(jax.grad(objective)(w, batch))
    name = "scikit-learn newton-cholesky"
    return [
        name,
        int(model.n_iter_[0]),
        f"{norm:.1e}",
        f"{seconds:.3f}",
        "",
        f"{objective(w, batch):.10f}",
    ]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", help="a LIBSVM file of two classes; by default scikit-learn's breast cancer data"
    )
    parser.add_argument("--l2", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=1000, help="limit of steps for each method")
    parser.add_argument("--plot", help="save a picture of the gradient norms")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    x, y = load(args.data)
    objective, batch = regression(x, y, args.l2)
    print(f"{len(x)} examples, {x.shape[1]} parameters, l2 {args.l2}")

    line_search = lambda value, grad, value_fn: {"value": value, "grad": grad, "value_fn": value_fn}
    methods = {
        "gradient-regularized Newton": (curvax.gradient_regularized_newton(objective), {}),
        "the same, Hessian every 3 steps": (
            curvax.gradient_regularized_newton(objective, curvature_every=3),
            {},
        ),
        "cubic Newton": (curvax.cubic_newton(objective), {}),
        "cubic Newton, every 3 steps": (curvax.cubic_newton(objective, curvature_every=3), {}),
        "Krylov descent, order 5": (curvax.krylov_descent(objective, order=5), {}),
        "Krylov descent, order 15": (curvax.krylov_descent(objective, order=15), {}),
        "Newton-CG, Levenberg-Marquardt": (
            curvax.levenberg_marquardt(
                curvax.newton_cg(1.0, objective, tol=1e-8, max_steps=500),
                objective,
                damping=1.0,
                every=1,
                factor=0.1,
                bounds=(1e-12, 1e8),
                matvec_of=curvax.hvp,
            ),
            {},
        ),
        "optax L-BFGS": (optax.lbfgs(), {"extra": line_search}),
    }
    # Compiling takes most of a short run: one of each method.
    variants = ("every 3 steps", "order 5")
    if args.smoke:
        methods = {name: how for name, how in methods.items() if not name.endswith(variants)}
    rows, curves = [], {}
    for name, (tx, how) in methods.items():
        tx = tx if not how else optax.with_extra_args_support(_without_batch(tx))
        row, curves[name] = run(
            name, tx, objective, batch, 100 if args.smoke else args.steps, **how
        )
        rows.append(row)
    rows.append(scikit_learn(x, y, args.l2, objective, batch))
    header = ["method", "steps", "|gradient|", "seconds", "compilation", "loss"]
    print_table(f"to a gradient norm of {TARGET}", header, [list(map(str, row)) for row in rows])
    if args.plot:
        picture(curves, args.plot)


def _without_batch(tx):
    """Keep `batch=` from optax's line search, which hands all that it gets to the function it
    evaluates.
    """
    return optax.GradientTransformationExtraArgs(
        tx.init, lambda g, s, p, *, batch, **extra: tx.update(g, s, p, **extra)
    )


def picture(curves, path):
    """Save the norms of the gradient by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, norms in curves.items():
        ax.semilogy(norms, label=name)
    ax.set(xlabel="steps", ylabel="norm of the gradient", xscale="symlog")
    ax.legend()
    ax.figure.savefig(path)


if __name__ == "__main__":
    main()
