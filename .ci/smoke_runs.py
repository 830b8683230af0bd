"""Run scripts with --smoke, two at a time, each in a process of its own; fail if one of them does.

The processes are forked from one that has imported what all of them need, which takes as long as
some of the runs.
"""

import contextlib
import io
import multiprocessing
import os
import runpy
import sys
import time
import traceback

IMPORTS = ["jax", "flax.linen", "optax", "sklearn.datasets", "matplotlib.pyplot", "tqdm"]


def run(script: str) -> tuple[str, float, str]:
    """Return the script, its seconds, and what it printed if it failed."""
    sys.argv = [script, "--smoke"]
    sys.path.insert(0, os.path.dirname(script))
    printed, failed, start = io.StringIO(), False, time.monotonic()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            failed = bool(end.code)
            print(end.code)
        except BaseException:
            failed = True
            traceback.print_exc()
    return script, time.monotonic() - start, printed.getvalue() if failed else ""


def main() -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    num_failed = 0
    with context.Pool(2, maxtasksperchild=1) as pool:
        for script, seconds, printed in pool.imap_unordered(run, sys.argv[1:], chunksize=1):
            print(f"== {script} --smoke: {seconds:.0f} s {'FAILED' if printed else ''}", flush=True)
            print(printed, end="", flush=True)
            num_failed += bool(printed)
    sys.exit(num_failed)


if __name__ == "__main__":
    main()
