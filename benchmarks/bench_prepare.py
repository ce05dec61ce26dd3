"""A folder of meshes made ready for training: how many succeed, seconds a mesh, and how many signs of the distances are wrong.

`prepare` runs over all meshes into a temporary folder, with points and pictures as training wants them. Then the signs of closed meshes are checked in another way than they were made:
memkit takes the winding number of the mesh as a whole, after turning its faces one way; here each connected part is taken by itself, and a point is inside where three rays from it, by
majority, meet an odd number of its faces, whichever way they look. Half of the points asked lie in space, half near the surface.

usage: bench_prepare.py [FOLDER] [--points 250000] [--views 12] [--checked 2000] [--jobs 1] [--out FILE]
FOLDER: meshes; default MEMKIT_REAL_MESHES, else ../shared/real beside the checkout. Prints a table and appends one JSON line to benchmarks/results.jsonl; without a folder of meshes it only says so."""
import os
for name in ('OPENBLAS_NUM_THREADS', 'OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'IGL_NUM_THREADS'): os.environ.setdefault(name, '1')

import argparse, tempfile, time
from pathlib import Path

import numpy as np
from numba import njit
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from memkit.core import progress
from memkit.mesh import find_meshes, load_mesh
from memkit.prepare import Recipe, prepare

from record import RESULTS, add_line


RAYS = np.array([[.36, .48, .8], [-.6, .64, -.48], [.28, -.96, .0421]])   # towards nothing special


@njit(cache=True)
def crossings(A, B, C, part, n_parts, points, ray):
    "(q, parts): how many faces of each part a ray from each point meets."
    out = np.zeros((len(points), n_parts), np.int64)
    for f in range(len(A)):
        e, g = B[f] - A[f], C[f] - A[f]
        h = np.cross(ray, g)
        det = e[0]*h[0] + e[1]*h[1] + e[2]*h[2]
        if abs(det) < 1e-14: continue
        for i in range(len(points)):
            sx, sy, sz = points[i, 0] - A[f, 0], points[i, 1] - A[f, 1], points[i, 2] - A[f, 2]
            u = (sx*h[0] + sy*h[1] + sz*h[2])/det
            if u <= 0 or u >= 1: continue
            qx, qy, qz = sy*e[2] - sz*e[1], sz*e[0] - sx*e[2], sx*e[1] - sy*e[0]
            v = (qx*ray[0] + qy*ray[1] + qz*ray[2])/det
            if v > 0 and u + v < 1 and (qx*g[0] + qy*g[1] + qz*g[2])/det > 0: out[i, part[f]] += 1
    return out


def inside(V, F, points):
    "Which points lie inside any connected part of a closed mesh: an odd number of crossings, as most of three rays have it."
    place = np.unique(V, axis=0, return_inverse=True)[1].reshape(-1)[F]   # corners in one place are one
    links = coo_matrix((np.ones(2*len(F)), (place[:, [0, 0]].ravel(), place[:, [1, 2]].ravel())), shape=(place.max() + 1,)*2)
    _, part = np.unique(connected_components(links, directed=False)[1][place[:, 0]], return_inverse=True)
    odd = sum(crossings(V[F[:, 0]], V[F[:, 1]], V[F[:, 2]], part.reshape(-1), part.max() + 1, points, ray) % 2 for ray in RAYS)
    return (odd >= 2).any(1)


def wrong_signs(made, paths, checked):
    "id → wrong signs among `checked` points, of closed meshes."
    wrong = {}
    for k in progress([k for k in made.ids if made.records[k]['health']['watertight']], 'checking', unit='mesh'):
        (V, F), a, half = load_mesh(paths[k]), made.load(k), checked//2
        points, sdf = (np.concatenate([a[f'vol_{x}'][:half], a[f'near_{x}'][-half//2:], a[f'near_{x}'][:half//2]]) for x in ('points', 'sdf'))
        wrong[k] = int((inside((V - a['shifts'])*a['scale'], F, points.astype(float)) != (sdf < 0)).sum())
    return wrong


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('folder', type=Path, nargs='?', default=Path(os.environ.get('MEMKIT_REAL_MESHES') or Path(__file__).resolve().parents[2]/'shared'/'real'))
    ap.add_argument('--points', type=int, default=250_000, help='in space and near the surface; half as many on it')
    ap.add_argument('--views', type=int, default=12)
    ap.add_argument('--checked', type=int, default=2000, help='points of each closed mesh whose sign is checked')
    ap.add_argument('--jobs', type=int, default=1)
    ap.add_argument('--out', type=Path, default=RESULTS)
    args = ap.parse_args()
    paths = find_meshes(args.folder) if args.folder.is_dir() else {}
    if not paths: return print(f'nothing measured: no meshes in {args.folder.name}/; name a folder of them, or set MEMKIT_REAL_MESHES')
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        made = prepare(args.folder, out, Recipe(n_vol=args.points, n_near=args.points, n_surface=args.points//2, views=args.views), n_jobs=args.jobs)
        wall = time.perf_counter() - began
        print(made)
        wrong = wrong_signs(made, paths, args.checked)
    cpu = [made.records[k]['cpu_seconds'] for k in made.ids]
    bad, asked = sum(wrong.values()), args.checked*len(wrong)
    print(f'{len(made)} of {len(paths)} prepared in {wall:.0f} s with {args.jobs} process(es); CPU s a mesh: median {np.median(cpu):.2f}, slowest {max(cpu):.1f}')
    for k, why in made.failures.items(): print(f'  {k}: {why}')
    if wrong: print(f'{bad} of {asked:,} signs wrong ({bad/asked:.4%}) on {len(wrong)} closed meshes; worst mesh {max(wrong.values())/args.checked:.3%}: {max(wrong, key=wrong.get)}')
    add_line(args.out, 'prepare', meshes=len(paths), prepared=len(made), failures=made.failures, points=args.points, views=args.views, jobs=args.jobs, wall_s=round(wall, 1),
             cpu_s_a_mesh=dict(median=round(float(np.median(cpu)), 2), mean=round(float(np.mean(cpu)), 2), slowest=max(cpu)), closed=len(wrong), signs_asked=asked, signs_wrong=bad,
             worst_mesh_share=max(wrong.values())/args.checked if wrong else None)


if __name__ == '__main__': main()
