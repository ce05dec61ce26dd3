"""Coarse-to-fine extraction at 256: how many questions it saves, and whether it misses surface.

Questions: points asked of the field, dense = 257³, for built-in shapes (closed form) and real meshes (MEMKIT_REAL_MESHES, default ../shared/real; `MeshField`: exact distance, sign by winding
number), at L = 1 and L = 1.5. Built-in shapes as they are, real meshes in the unit sphere, cube of half side 1.01. By default one mesh of each class; --all takes every mesh (a quarter of an hour).
Missed: cells with both signs in the dense grid that the coarse-to-fine grid does not know wholly. Dense signs of built-in shapes come from asking every point; of closed meshes from counting the
faces, with their orientation, that lie above each grid point (the winding number, exact, without libigl).
Inexact: the same for fields that are no distances (too large by a factor, uneven, wavy), with and without the continuation pass.

usage: bench_adaptive.py [--all] [--meshes DIR] [--out FILE]
Prints tables and appends one JSON line to benchmarks/results.jsonl."""
import os
for name in ('OPENBLAS_NUM_THREADS', 'OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'IGL_NUM_THREADS'): os.environ.setdefault(name, '1')

import argparse, sys, time
from pathlib import Path
from unittest import mock

import numpy as np

from memkit.core import progress
from memkit.mesh import find_meshes, load_mesh, mesh_health, normalize_mesh
from memkit.sdf import Grid, empty_grid, MeshField, mixed_signs, over_corners, sample_adaptive
from memkit.shapes import shape_set

from record import RESULTS, add_line

N, BOUND = 256, 1.01
DENSE = (N + 1)**3


class Counted:
    def __init__(self, field): self.field, self.points = field, 0
    def __call__(self, pts): self.points += len(pts); return self.field(pts)


def remembered(field, grid):
    "The same field, computed only where a finished grid does not know it."
    def recall(pts):
        at = tuple(np.rint((pts/grid.bound + 1)*grid.n/2).astype(int).T)
        out, new = grid.values[at], ~grid.known[at]
        if new.any(): out[new] = field(pts[new])
        return out
    return recall


def both(field):
    "Points asked at L = 1.5 and at L = 1 (mostly the same points, so that the field is computed once), and the grid of the former."
    wide = Counted(field)
    grid = sample_adaptive(wide, N, BOUND, 1.5)
    narrow = Counted(remembered(field, grid))
    sample_adaptive(narrow, N, BOUND, 1.)
    return wide.points, narrow.points, grid


def dense_signs(field):
    grid = empty_grid(N, BOUND)
    grid.ask(field, np.ones_like(grid.known), 1 << 16)
    return grid


def faces_above(V, F):
    "Winding number of every grid point of a closed mesh: signed count of the faces above it; rays are moved by a millionth of a cell so that they meet no edge."
    h = 2*BOUND/N
    axis = BOUND*(2*np.arange(N + 1)/N - 1)
    x, y = axis + 1e-6*h*np.sqrt(2), axis + 1e-6*h*np.sqrt(3)
    wind = np.zeros((N + 1, N + 1, N + 2), np.int16)
    for A, B, C in V[F]:
        i = np.arange(np.searchsorted(x, min(A[0], B[0], C[0])), np.searchsorted(x, max(A[0], B[0], C[0])))
        j = np.arange(np.searchsorted(y, min(A[1], B[1], C[1])), np.searchsorted(y, max(A[1], B[1], C[1])))
        P, Q = x[i][:, None], y[j][None]
        area = (B[0] - A[0])*(C[1] - A[1]) - (B[1] - A[1])*(C[0] - A[0])
        if not len(i) or not len(j) or area == 0: continue
        weight = [((c[0] - b[0])*(Q - b[1]) - (c[1] - b[1])*(P - b[0]))/area for b, c in ((B, C), (C, A), (A, B))]
        hit = np.argwhere(np.minimum(np.minimum(*weight[:2]), weight[2]) > 0)
        z = sum(w[tuple(hit.T)]*v[2] for w, v in zip(weight, (A, B, C)))
        np.add.at(wind, (i[hit[:, 0]], j[hit[:, 1]], np.searchsorted(axis, z)), int(np.sign(area)))   # at the first grid point above the face
    return wind.sum(2, keepdims=True) - np.cumsum(wind, 2)[:, :, :-1]


def grid_of(inside):
    grid = empty_grid(N, BOUND)
    grid.values[:] = np.where(inside, -1, 1)
    return grid


def missed(truth, grid): return int((mixed_signs(truth) & ~over_corners(grid.known, np.logical_and)).sum())


def without_pass(field, lipschitz):
    with mock.patch.object(Grid, 'follow', lambda *_: 0): return sample_adaptive(field, N, BOUND, lipschitz)


INEXACT = {'2 × too large': lambda s, p: 2*s, '4 × too large': lambda s, p: 4*s, 'slope from 0.5 to 3.5': lambda s, p: s*(2 + 1.5*np.sin(9*p).prod(1)),
           'waves 0.02 high': lambda s, p: s + .02*np.sin(25*p).prod(1)}


def inexact(name, field):
    "Rows for fields that are no distances: questions, and cells missed without and with the continuation pass."
    rows = []
    for kind, change in INEXACT.items():
        wrong = lambda p: change(field(p), p)
        if kind.startswith('waves') or not rows: truth = dense_signs(wrong)     # the others have the signs of the first
        for L in (1., 1.5):
            with_pass, plain = Counted(wrong), Counted(wrong)
            after, before = sample_adaptive(with_pass, N, BOUND, L), without_pass(plain, L)
            rows.append(dict(field=f'{name}, {kind}', L=L, cells=int(mixed_signs(truth).sum()), asked=with_pass.points, without=missed(truth, before), missed=missed(truth, after),
                             extra=with_pass.points - plain.points))
            print('{field}, L = {L}: {cells} surface cells, {without} missed without the pass, {missed} with it, for {extra} of {asked} questions'.format(**rows[-1]), flush=True)
    return rows


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--meshes', type=Path, default=Path(os.environ.get('MEMKIT_REAL_MESHES') or Path(__file__).resolve().parents[2]/'shared'/'real'))
    ap.add_argument('--all', action='store_true', help='every real mesh, not one of each class')
    ap.add_argument('--out', type=Path, default=RESULTS)
    args = ap.parse_args()
    began, asked, gaps = time.process_time(), {'built-in': [], 'real': []}, {}
    for k, shape in enumerate(progress(shape_set(64, 3), 'built-in', unit='shape')):
        *points, grid = both(shape.sdf)
        asked['built-in'].append(points)
        if k < 16: gaps[f'{shape.category} {shape.seed}'] = (missed(truth := dense_signs(shape.sdf), grid), int(mixed_signs(truth).sum()))
    real = find_meshes(args.meshes) if any(args.meshes.glob('*.off')) else {}
    if not real: print(f'no real meshes in {args.meshes.name}/; set MEMKIT_REAL_MESHES to a folder of OFF files', file=sys.stderr)
    closed = 0
    for name, path in progress({n: p for n, p in real.items() if args.all or n[-1] == '0' or n in ('fish2', 'sedan3')}.items(), 'real', unit='mesh'):
        V, F = load_mesh(path)
        V, health = normalize_mesh(V, F, 'unit_sphere'), mesh_health(V, F)
        *points, grid = both(MeshField(V, F))
        if args.all or name[-1] == '0': asked['real'].append(points)
        if health.watertight and health.oriented and closed < 4:
            closed += 1
            gaps[name] = (missed(truth := grid_of(np.abs(faces_above(V, F)) > 0), grid), int(mixed_signs(truth).sum()))
    table = {}
    for name, rows in asked.items():
        if not rows: continue
        wide, narrow = (DENSE/np.array(rows)).T
        table[name] = {f'L = {L}': dict(shapes=len(rows), median_times_fewer=round(float(np.median(v)), 1), least=round(float(v.min()), 1), most=round(float(v.max()), 1)) for L, v in ((1.5, wide), (1., narrow))}
        for L, row in table[name].items(): print('{0:8} {1}: {median_times_fewer} × fewer questions than dense (median of {shapes}; {least} to {most})'.format(name, L, **row))
    if real:
        wide, narrow = (DENSE/np.array(sum(asked.values(), []))).T
        table['together'] = {'L = 1.5': round(float(np.median(wide)), 1), 'L = 1.0': round(float(np.median(narrow)), 1)}
        print('median of all:', table['together'])
    for name, (gap, cells) in gaps.items(): print(f'{name}: {gap} of {cells} surface cells missed at L = 1.5')
    rows = inexact('teapot', shape_set(16, 3)[7].sdf)
    add_line(args.out, 'adaptive', resolution=N, every_mesh=args.all, questions=table, missed={n: dict(missed=m, cells=c) for n, (m, c) in gaps.items()}, inexact=rows,
             cpu_seconds=round(time.process_time() - began))


if __name__ == '__main__': main()
