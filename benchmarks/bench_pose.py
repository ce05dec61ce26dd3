"""Pose-refined light field distance on real meshes: are turned copies told from new shapes, and what does it cost.

20 classes of real meshes (MEMKIT_REAL_MESHES, default ../shared/real): files 0 to 2 of each are the training set, file 3 is held out. Generated sets: copies of the files 0 turned
arbitrarily, the same with 0.5 % vertex noise. For each: auc (a copy is nearer to its nearest training shape than a held-out shape to its own) plain and refined, median distances, and
CPU seconds per query on top of the descriptor, files read included, in one process. Then the same for other numbers of candidates and of starts.

usage: bench_pose.py [--quick] [--meshes DIR] [--out FILE]
Prints a table and appends one JSON line to benchmarks/results.jsonl."""
import os
for name in ('OPENBLAS_NUM_THREADS', 'OMP_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.setdefault(name, '1')   # before numpy: waiting threads count as CPU time

import argparse, sys, tempfile, time
from pathlib import Path

import numpy as np

from memkit.core import make_rng, progress
from memkit.lfd import lfd_descriptor
from memkit.mesh import find_meshes, load_mesh, save_mesh
from memkit.pose import nearest_pose
from memkit.retrieval import nearest

from record import RESULTS, add_line


def random_rotation(rng):
    q = rng.normal(size=4); w, x, y, z = q/np.linalg.norm(q)
    return np.array([[1 - 2*(y*y + z*z), 2*(x*y - w*z), 2*(x*z + w*y)], [2*(x*y + w*z), 1 - 2*(x*x + z*z), 2*(y*z - w*x)], [2*(x*z - w*y), 2*(y*z + w*x), 1 - 2*(x*x + y*y)]])


def auc(d_gen, d_test): return float(np.mean((d_gen[:, None] < d_test) + .5*(d_gen[:, None] == d_test)))


def make_sets(real, folder):
    "name → files; the copies are written to `folder`."
    sets = dict(train=[], test=[], turned=[], noisy=[])
    for name, path in find_meshes(real).items():
        if name[-1] in '012': sets['train'].append(path)
        if name[-1] == '3': sets['test'].append(path)
        if name[-1] == '0':
            (V, F), rng = load_mesh(path), make_rng(0, path.stem)
            W = V @ random_rotation(rng).T
            sets['turned'].append(save_mesh(folder/'turned'/path.name, W, F))
            sets['noisy'].append(save_mesh(folder/'noisy'/path.name, W + rng.normal(size=V.shape)*.005*np.ptp(W[F.ravel()], axis=0).max(), F))
    return sets


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--meshes', type=Path, default=Path(os.environ.get('MEMKIT_REAL_MESHES') or Path(__file__).resolve().parents[2]/'shared'/'real'))
    ap.add_argument('--quick', action='store_true', help='the default setting only')
    ap.add_argument('--out', type=Path, default=RESULTS)
    args = ap.parse_args()
    if not any(args.meshes.glob('*.off')): return print(f'bench_pose: skipped, no real meshes in {args.meshes.name}/; set MEMKIT_REAL_MESHES to a folder of OFF files', file=sys.stderr)
    with tempfile.TemporaryDirectory() as tmp:
        sets = make_sets(args.meshes, Path(tmp))
        d = {name: np.array([lfd_descriptor(*load_mesh(p)) for p in progress(files, f'describing {name}', unit='mesh')]) for name, files in sets.items()}
        queries = ('turned', 'noisy', 'test')
        plain = {name: nearest(d[name], d['train'], n_jobs=1)[1][:, 0] for name in queries}
        nearest_pose(sets['test'][:1], sets['train'], d['test'][:1], d['train'], n_jobs=1)   # compile
        settings, rows = [(3, 5)] if args.quick else [(3, 5), (1, 5), (2, 5), (5, 5), (3, 1), (3, 2), (3, 10)], []
        for candidates, starts in settings:
            posed, spent = {}, {}
            for name in queries:
                began = time.process_time()
                posed[name] = nearest_pose(sets[name], sets['train'], d[name], d['train'], candidates=candidates, n_starts=starts, n_jobs=1)[1][:, 0]
                spent[name] = round((time.process_time() - began)/len(sets[name]), 3)
                assert (posed[name] <= plain[name]).all()
            rows.append(dict(candidates=candidates, n_starts=starts, auc={n: round(auc(posed[n], posed['test']), 4) for n in queries[:2]},
                median={n: float(np.median(x)) for n, x in posed.items()}, zero=int((posed['turned'] == 0).sum()), cpu_s_per_query=spent))
            print(f'candidates {candidates}, starts {starts:2d}: auc turned {rows[-1]["auc"]["turned"]:.4f}, noisy {rows[-1]["auc"]["noisy"]:.4f}; medians {rows[-1]["median"]}; '
                  f'{rows[-1]["zero"]} of {len(posed["turned"])} copies at 0; {np.mean(list(spent.values())):.2f} CPU s per query', flush=True)
    base = dict(auc={n: round(auc(plain[n], plain['test']), 4) for n in queries[:2]}, median={n: float(np.median(x)) for n, x in plain.items()})
    print(f'plain: {base}')
    add_line(args.out, 'pose', train=len(sets['train']), test=len(sets['test']), plain=base, posed=rows)


if __name__ == '__main__': main()
