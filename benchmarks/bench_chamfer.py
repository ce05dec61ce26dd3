"""All-pairs Chamfer distance: memkit's compiled search against a loop over scipy's cKDTree, one core, in the same session.

Both are exact and are checked to give the same numbers. The loop builds each tree once, as anyone would; memkit's figure includes its leaves.
The shapes are the built-in data set, scaled into the unit sphere, with independent uniform surface points. The tree loop is timed on a part of the pairs
(--pairs) and both are reported per pair, in rounds that alternate, so that they share whatever else the machine was doing; the median ratio counts.

usage: bench_chamfer.py [--shapes 100] [--points 2048] [--pairs 1000] [--repeat 3] [--out FILE]
Prints a table and appends one JSON line to benchmarks/results.jsonl."""
import os
for name in ('OPENBLAS_NUM_THREADS', 'OMP_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.setdefault(name, '1')   # before numpy: waiting threads count as CPU time

import argparse, time
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

from memkit.core import progress
from memkit.mesh import normalize_mesh
from memkit.points import sample_surface
from memkit.pointsets import chamfer_distance
from memkit.shapes import shape_set

from record import RESULTS, add_line


def tree_loop(A, B):
    "What a reader would write."
    ta, tb = [cKDTree(x) for x in A], [cKDTree(x) for x in B]
    return np.array([[(tb[j].query(A[i])[0]**2).mean() + (ta[i].query(B[j])[0]**2).mean() for j in range(len(B))] for i in range(len(A))])


def timed(call):
    wall, cpu = time.perf_counter(), time.process_time()
    out = call()
    return out, time.perf_counter() - wall, time.process_time() - cpu


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--shapes', type=int, default=100, help='per stack')
    ap.add_argument('--points', type=int, default=2048)
    ap.add_argument('--pairs', type=int, default=1000, help='pairs of the tree loop per round')
    ap.add_argument('--repeat', type=int, default=3)
    ap.add_argument('--out', type=Path, default=RESULTS)
    args = ap.parse_args()
    meshes = [s.mesh(24) for s in progress(shape_set(2*args.shapes, seed=0), 'meshing', unit='mesh')]
    P = np.stack([sample_surface(normalize_mesh(V, F, 'unit_sphere'), F, args.points, seed=i)[0] for i, (V, F) in enumerate(meshes)]).astype(np.float64)
    A, B = P[:args.shapes], P[args.shapes:]
    rows = max(1, args.pairs//args.shapes)
    chamfer_distance(A[:1], B[:1])                                                   # compile
    n, rounds, worst = args.shapes**2, [], 0.
    for r in range(args.repeat):
        ours, wall, cpu = timed(lambda: chamfer_distance(A, B)) if r == 0 else timed(lambda: chamfer_distance(A[:rows], B))
        pairs = ours.size
        trees, wall_t, cpu_t = timed(lambda: tree_loop(A[:rows], B))
        worst = max(worst, np.abs(ours[:rows] - trees).max())
        if r == 0: whole = dict(wall=round(wall, 2), cpu=round(cpu, 2))
        rounds.append([1e3*wall/pairs, 1e3*cpu/pairs, 1e3*wall_t/trees.size, 1e3*cpu_t/trees.size])
    assert worst < 1e-12, worst
    w, c, wt, ct = np.median(rounds, axis=0)
    ratio = float(np.median([row[3]/row[1] for row in rounds]))
    print(f'{args.shapes} × {args.shapes} shapes, {args.points} points; ms per pair, CPU (wall), median of {args.repeat}')
    print(f'memkit chamfer_distance  {c:7.3f} ({w:.3f})   all {n} pairs in {whole["cpu"]} s CPU, {whole["wall"]} s wall\ncKDTree loop             {ct:7.3f} ({wt:.3f})   {ratio:.2f} × memkit')
    add_line(args.out, 'chamfer', shapes=args.shapes, points=args.points, tree_pairs=rows*args.shapes, repeat=args.repeat, threads=1,
             all_pairs_seconds=whole, ms_per_pair={'memkit': dict(cpu=round(c, 4), wall=round(w, 4)), 'cKDTree loop': dict(cpu=round(ct, 4), wall=round(wt, 4))}, cpu_ratio=round(ratio, 2), largest_difference=worst)


if __name__ == '__main__': main()
