"""Time Z_U and the whole report (Z_U, auc, interval, p-values, power, verdict) from arrays against the released formula, which calls scipy's mannwhitneyu, in one session.

The ratios are medians over rounds in which all take turns, of wall and of CPU time; above 1 means that memkit is faster. Note what is compared:
the released formula gives Z_U alone. Each value is checked against it before anything is written.

usage: bench_zu.py [--n 100000] [--cells 20] [--repeat 15] [--out FILE]
Prints a table and appends one JSON line to benchmarks/results.jsonl."""
import argparse
import os
import time
from pathlib import Path

import numpy as np
from scipy.stats import mannwhitneyu

from memkit.cells import c_t
from memkit.core import make_rng
from memkit.zu import verdict, z_u, zu_report

from record import RESULTS, add_line


def released(d_gen, d_test):
    "Z_U as the paper's code computes it."
    m, n = len(d_gen), len(d_test)
    u = mannwhitneyu(d_gen, d_test, alternative='less').statistic
    return (u - n*m/2 + 0.5)/np.sqrt(n*m*(n + m + 1)/12)


def released_cells(d_gen, d_test, cells_gen, cells_test, k):
    "C_T as a loop of the same formula over cells, each of them holding shapes of both sides."
    z = [released(d_gen[cells_gen == c], d_test[cells_test == c]) for c in range(k)]
    return np.bincount(cells_test, minlength=k)/len(d_test) @ z


def clocked(jobs, rounds):
    "Every job once per round, so that a busy neighbour slows all alike: job → (rounds, 2) wall and CPU seconds."
    clocks = {k: [] for k in jobs}
    for _ in range(rounds):
        for k, f in jobs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            f()
            clocks[k].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {k: np.array(v) for k, v in clocks.items()}


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--n', type=int, default=100_000)
    p.add_argument('--cells', type=int, default=20)
    p.add_argument('--repeat', type=int, default=15)
    p.add_argument('--out', type=Path, default=RESULTS)
    o = p.parse_args()
    rng = make_rng(0, 'bench-zu')
    gen, test = rng.gamma(4, 0.99, o.n), rng.gamma(4, 1, o.n)
    where = rng.integers(0, o.cells, (2, o.n))
    report, cells = zu_report(gen, test), c_t(gen, test, *where)
    np.testing.assert_allclose((z_u(gen, test), report.z_u, cells.c_t), (released(gen, test),)*2 + (released_cells(gen, test, *where, o.cells),), rtol=1e-12)
    jobs = {'released Z_U': lambda: released(gen, test), 'z_u': lambda: z_u(gen, test), 'report': lambda: verdict(zu_report(gen, test)),
            'released C_T': lambda: released_cells(gen, test, *where, o.cells), 'c_t': lambda: c_t(gen, test, *where), 'sort of both': lambda: (np.sort(gen), np.sort(test))}
    clocks = clocked(jobs, o.repeat)
    seconds = {k: {w: round(float(v[:, i].min()), 5) for i, w in enumerate(('wall', 'cpu'))} | dict(median_wall=round(float(np.median(v[:, 0])), 5)) for k, v in clocks.items()}
    ratio = lambda slow, fast: {w: [round(float(x), 2) for x in np.percentile(clocks[slow][:, i]/clocks[fast][:, i], (50, 25, 75))] for i, w in enumerate(('wall', 'cpu'))}
    ratios = {f'{slow} / {fast}': ratio(slow, fast) for slow, fast in (('released Z_U', 'z_u'), ('released Z_U', 'report'), ('released C_T', 'c_t'))}
    print(f'n = m = {o.n}, {o.cells} cells, {o.repeat} rounds, load {os.getloadavg()[0]:.1f}')
    for k, v in seconds.items(): print(f"{k:14s} {1e3*v['wall']:8.1f} ms wall (median {1e3*v['median_wall']:.1f}) {1e3*v['cpu']:8.1f} ms CPU")
    for k, v in ratios.items(): print(f"{k:24s} wall {v['wall'][0]} ({v['wall'][1]} to {v['wall'][2]})   CPU {v['cpu'][0]} ({v['cpu'][1]} to {v['cpu'][2]})")
    add_line(o.out, 'zu', n=o.n, cells=o.cells, repeat=o.repeat, seconds=seconds, ratios_median_quartiles=ratios, z_u=report.z_u, c_t=cells.c_t)


if __name__ == '__main__':
    main()
