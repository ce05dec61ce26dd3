"""Time the Fréchet distance on n x d float32 features, against the released formula and against scipy's sqrtm, in one session.

The ratios are of CPU time, median over rounds in which all take turns; set OPENBLAS_NUM_THREADS=1 on a busy machine, waiting threads count as CPU time.

usage: bench_fpd.py [--n 10000] [--d 1024] [--repeat 3] [--out FILE]
Prints a table and appends one JSON line to benchmarks/results.jsonl."""
import argparse
import os
import time
from pathlib import Path

import numpy as np
from scipy.linalg import sqrtm

from memkit.core import make_rng
from memkit.fpd import frechet, frechet_distance, moments

from record import RESULTS, add_line


def features(n, d, seed):
    "Unit-length rows with a decaying spectrum, as embeddings have."
    rng = make_rng(seed, 'bench-fpd')
    x = rng.normal(size=(n, d)).astype(np.float32)*np.arange(1, d + 1, dtype=np.float32)**-.5 + .02*seed
    return x/np.linalg.norm(x, axis=1, keepdims=True)


def gaussian(x):
    "Mean and covariance (ddof=0) as most tools compute them."
    x = x.astype(np.float64)
    return x.mean(0), np.cov(x, rowvar=False, ddof=0)


def two_eigh(a, b):
    "The released formula: two full eigendecompositions, clipped at 1e-12."
    def root(C):
        w, Q = np.linalg.eigh(C)
        return (Q*np.sqrt(np.maximum(w, 1e-12))) @ Q.T
    S = root(a[1])
    M = S @ b[1] @ S
    return ((a[0] - b[0])**2).sum() + np.trace(a[1] + b[1] - 2*root((M + M.T)/2))


def scipy_sqrtm(a, b):
    "The formula of the FID packages."
    return ((a[0] - b[0])**2).sum() + np.trace(a[1] + b[1]) - 2*np.trace(sqrtm(a[1] @ b[1])).real


def interleaved(jobs, rounds):
    "Every job once per round, so that a busy neighbour slows all alike: job → (wall seconds, CPU seconds) of each round, last result."
    clocks, results = {k: [] for k in jobs}, {}
    for _ in range(rounds):
        for k, f in jobs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            results[k] = float(f())
            clocks[k].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {k: np.array(v) for k, v in clocks.items()}, results


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--n', type=int, default=10_000)
    p.add_argument('--d', type=int, default=1024)
    p.add_argument('--repeat', type=int, default=3)
    p.add_argument('--out', type=Path, default=RESULTS)
    o = p.parse_args()
    x, y = features(o.n, o.d, 0), features(o.n, o.d, 1)
    usual, states = [gaussian(v) for v in (x, y)], [moments(v) for v in (x, y)]
    jobs = {'memkit, features in': lambda: frechet_distance(x, y), 'memkit paper mode, features in': lambda: frechet_distance(x, y, 'paper'),
            'released formula, features in': lambda: two_eigh(gaussian(x), gaussian(y)), 'scipy sqrtm, features in': lambda: scipy_sqrtm(gaussian(x), gaussian(y)),
            'memkit, statistics in': lambda: frechet(*states).value, 'released formula, statistics in': lambda: two_eigh(*usual),
            'scipy sqrtm, statistics in': lambda: scipy_sqrtm(*usual)}
    clocks, values = interleaved(jobs, o.repeat)
    seconds = {k: dict(wall=round(v[:, 0].min(), 3), cpu=round(v[:, 1].min(), 3)) for k, v in clocks.items()}
    ratios = {f'{slow}, {kind} in / memkit': round(float(np.median(clocks[f'{slow}, {kind} in'][:, 1]/clocks[f'memkit, {kind} in'][:, 1])), 2)
              for kind in ('features', 'statistics') for slow in ('released formula', 'scipy sqrtm')}
    exact = frechet(*states)
    for k, v in seconds.items(): print(f"{k:34s} {v['wall']:8.3f} s wall {v['cpu']:8.3f} s CPU   {values[k]:.12f}")
    print(f'route {exact.route}, exact to {exact.bound:.1e};  CPU time: ' + ';  '.join(f'{k} = {v}' for k, v in ratios.items()))
    add_line(o.out, 'fpd', n=o.n, d=o.d, repeat=o.repeat, threads=os.environ.get('OPENBLAS_NUM_THREADS', 'default'),
             seconds=seconds, cpu_ratios=ratios, values=values, route=exact.route, bound=exact.bound)


if __name__ == '__main__':
    main()
