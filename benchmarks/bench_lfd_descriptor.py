"""CPU seconds of the light field descriptor per mesh on one core, beside the reference program's.

The reference's figures (public C extractor, gcc -O2, Mesa 22.3.6 llvmpipe, minimum of at least 4 runs) were measured on another day on a 2-core AMD EPYC
(Zen 4 class) virtual machine under load; the meshes there have the same make and number of faces but other random numbers. Ratios are to be read with that in mind.

usage: bench_lfd_descriptor.py [--repeat 5] [--only NAME ...] [--out FILE]
Prints a table and appends one JSON line to benchmarks/results.jsonl."""
import os
for name in ('OPENBLAS_NUM_THREADS', 'OMP_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.setdefault(name, '1')   # before numpy: waiting threads count as CPU time

import argparse
import time
from pathlib import Path

import numpy as np
import trimesh
from skimage.measure import marching_cubes

from memkit.contour import contour
from memkit.core import make_rng
from memkit.lfd import describe_views, lfd_descriptor
from memkit.region import art_coefficients, view_shapes
from memkit.render import render_silhouettes

from record import RESULTS, add_line

REFERENCE = {'blob 1k': .37, 'blob 10k': .77, 'blob 50k': 2.67, 'blob 200k': 6.2, 'scatter': 3.1, 'hedgehog': 1.2}   # CPU seconds
MACHINE = '2 vCPU AMD EPYC, Debian 12, gcc 12.2 -O2, Mesa 22.3.6 llvmpipe'


def blob(faces):
    "Seven metaballs, marching cubes on a grid fine enough for about so many faces."
    rng = make_rng(2, 'bench-blob')
    centres, weights = rng.uniform(-.55, .55, (7, 3)), rng.uniform(.05, .16, 7)
    def mesh(n):
        axis = np.linspace(-1.4, 1.4, n)
        grid = np.stack(np.meshgrid(axis, axis, axis, indexing='ij'), -1)
        field = sum(w/(((grid - c)**2).sum(-1) + 1e-3) for w, c in zip(weights, centres))
        V, F = marching_cubes(field, 1.)[:2]
        return V.astype(np.float64), F.astype(np.int64)
    n = 32
    for _ in range(3): n = max(8, round(n*(faces/len(mesh(n)[1]))**.5))     # faces grow with the square of the resolution
    return mesh(n)


def joined(parts):
    m = trimesh.util.concatenate(parts)
    return np.array(m.vertices), np.array(m.faces)


def scatter():
    "Fourteen small spheres of 144 faces, apart: in most views the outline needs the bounding box to be joined."
    rng = make_rng(5, 'bench-scatter')
    ball = grid_sphere(12, 6)
    return joined([trimesh.Trimesh(ball[0]*.08*s + rng.uniform(-1, 1, 3), ball[1], process=False) for s in rng.uniform(.4, 1.4, 14)])


def hedgehog():
    "A sphere of 576 faces and forty thin spikes of four faces."
    rng = make_rng(3, 'bench-hedgehog')
    V, F = grid_sphere(24, 12)
    parts = [trimesh.Trimesh(V*.25, F, process=False)]
    for d in rng.normal(size=(40, 3)):
        d /= np.linalg.norm(d)
        a = np.cross(d, [.1, .9, .3]); a /= np.linalg.norm(a)
        b = np.cross(d, a)
        base = np.array([np.cos(t)*a + np.sin(t)*b for t in (0, 2.1, 4.2)])*.02 + d*.225
        parts.append(trimesh.Trimesh(np.vstack([base, d*(.25 + .75*rng.uniform(.3, 1))]), [[0, 1, 3], [1, 2, 3], [2, 0, 3], [0, 2, 1]], process=False))
    return joined(parts)


def grid_sphere(n, m):
    "2 n m faces on a grid of longitude and latitude; those at the poles are degenerate."
    u, v = np.meshgrid(np.arange(n)*2*np.pi/n, np.linspace(0, np.pi, m + 1), indexing='ij')
    V = np.stack([np.sin(v)*np.cos(u), np.cos(v), np.sin(v)*np.sin(u)], -1).reshape(-1, 3)
    i, j = np.meshgrid(np.arange(n), np.arange(m), indexing='ij')
    a, b = i*(m + 1) + j, (i + 1) % n*(m + 1) + j
    return V, np.concatenate([np.stack([a, b, b + 1], -1).reshape(-1, 3), np.stack([a, b + 1, a + 1], -1).reshape(-1, 3)])


def cpu(f, repeat):
    "Smallest CPU time of `repeat` calls after one that compiles, and the last result."
    result, times = f(), []
    for _ in range(repeat):
        t = time.process_time()
        result = f()
        times.append(time.process_time() - t)
    return min(times), result


def main():
    meshes = {'blob 1k': lambda: blob(1_000), 'blob 10k': lambda: blob(10_148), 'blob 50k': lambda: blob(50_252), 'blob 200k': lambda: blob(201_132),
              'scatter': scatter, 'hedgehog': hedgehog}
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--repeat', type=int, default=5)
    p.add_argument('--only', nargs='*', choices=meshes, default=list(meshes))
    p.add_argument('--out', type=Path, default=RESULTS)
    o = p.parse_args()
    rows = {}
    print(f'{"mesh":10s} {"faces":>8s} {"descriptor":>11s} {"render":>8s} {"region":>8s} {"contour":>8s} {"joined":>7s} {"reference":>10s} {"ratio":>6s}   (CPU seconds, one core)')
    for name in o.only:
        V, F = meshes[name]()
        total, _ = cpu(lambda: lfd_descriptor(V, F), o.repeat)
        render, masks = cpu(lambda: render_silhouettes(V, F), o.repeat)
        flat = masks.reshape(100, 256, 256)
        shapes = view_shapes(flat)
        region, _ = cpu(lambda: art_coefficients(flat, view_shapes(flat), np.repeat(shapes.reach.reshape(10, 10).max(1), 10)), o.repeat)
        outline, levels = cpu(lambda: [contour(m)[1] for m in flat], o.repeat)
        rows[name] = dict(faces=len(F), descriptor=round(total, 4), render=round(render, 4), region=round(region, 4), contour=round(outline, 4),
                          views_joined=int(np.count_nonzero(levels)), empty=describe_views(masks)[1], reference=REFERENCE[name], ratio=round(REFERENCE[name]/total, 1))
        r = rows[name]
        print(f'{name:10s} {len(F):8d} {total:11.3f} {render:8.3f} {region:8.3f} {outline:8.3f} {r["views_joined"]:7d} {REFERENCE[name]:10.2f} {r["ratio"]:5.1f}x')
    add_line(o.out, 'lfd_descriptor', repeat=o.repeat, threads=os.environ['OPENBLAS_NUM_THREADS'], cpu_seconds=rows, reference_machine=MACHINE)


if __name__ == '__main__':
    main()
