"""The same integers everywhere: light field distances of all golden pairs and of 10,000 random ones, by every implementation.

The golden pairs are the 900 of tests/data/lfd_distance.npz, whose distances the paper's code gave. The random ones are 100 × 100 uniform descriptors. Compared are the two kernels of the processor,
torch, the Triton kernel (on a GPU where there is one, else through Triton's interpreter, which takes an eighth of a second for a pair), and the search over shards on a dask cluster of two workers,
which is asked for all neighbours of every shape and so tells every distance.

usage: bench_lfd_equality.py [--random 100] [--triton 900] [--out FILE]
--triton: most pairs of either kind for the interpreter; a GPU does all. Stops at the first difference; else prints a table and appends one JSON line to benchmarks/results.jsonl."""
import os
for name in ('OPENBLAS_NUM_THREADS', 'OMP_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.setdefault(name, '1')

import argparse, tempfile, time
from pathlib import Path

import numpy as np
import torch

if not torch.cuda.is_available(): os.environ['TRITON_INTERPRET'] = '1'   # before memkit loads Triton

from memkit.core import make_rng
from memkit.database import build_database
from memkit.lfd import lfd_distance, simd_kind
from memkit.lfd_device import device_tables, distance_pairs, kernel_for
from memkit.mesh import save_mesh

from record import RESULTS, add_line

GOLDEN = Path(__file__).resolve().parents[1]/'tests'/'data'/'lfd_distance.npz'


class Given:
    "A description that is looked up: the number of a mesh is its height."
    name, protocol = 'lfd', ''
    def __init__(self, rows): self.rows = rows
    def describe(self, V, F): return self.rows[round(V[:, 1].max()) - 1]


def stored(rows, folder):
    "A database that holds these descriptors."
    (folder/'meshes').mkdir(parents=True)
    for i in range(len(rows)): save_mesh(folder/'meshes'/f'{i:04}.off', np.array([[0, 0, 0], [1, 0, 0], [0, i + 1., 0], [0, 0, 1]]), np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]]))
    return build_database(folder/'meshes', folder/'db', Given(rows), n_jobs=1)


def by_cluster(sets, address):
    "All distances of each (a, b), as a search over shards of seven shapes finds them."
    from memkit.cluster import nearest_shards
    with tempfile.TemporaryDirectory() as home:
        for name, (a, b, _) in sets.items():
            parts = [stored(rows, Path(home)/f'{name}-{side}') for side, rows in (('query', a), ('gallery', b))]
            I, D = nearest_shards(*parts, Path(home)/f'{name}-shards', len(b), address, size=7, device='cpu')
            found = np.full((len(a), len(b)), -1)
            np.put_along_axis(found, I, D, 1)
            yield name, found


def by_device(a, b, device, kernel, most):
    "Distances of the first `most` pairs, -1 for the others."
    q, g = (torch.from_numpy(x.ravel()[:most]).to(device) for x in np.meshgrid(np.arange(len(a)), np.arange(len(b)), indexing='ij'))
    found = np.full(len(a)*len(b), -1)
    found[:len(q)] = distance_pairs(device_tables(a, device), device_tables(b, device), q, g, kernel).cpu().numpy()
    return found.reshape(len(a), len(b))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--random', type=int, default=100, help='shapes on each side')
    ap.add_argument('--triton', type=int, default=900)
    ap.add_argument('--out', type=Path, default=RESULTS)
    args = ap.parse_args()
    torch.set_num_threads(1)
    with np.load(GOLDEN) as z: golden, expected = z['descriptors'], z['distance']
    a, b = (make_rng(seed, 'equality').integers(0, 256, (args.random, 10, 10, 47), dtype=np.uint8) for seed in (0, 1))
    sets = dict(golden=(golden, golden, expected), random=(a, b, lfd_distance(a, b, 'plain')))
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    ways = {'plain loops': lambda a, b: lfd_distance(a, b, 'plain'), 'torch': lambda a, b: by_device(a, b, device, 'torch', a.shape[0]*b.shape[0])}
    if simd_kind(): ways['psadbw'] = lfd_distance
    if kernel_for(device) == 'triton': ways['triton' if device == 'cuda' else 'triton, interpreted'] = lambda a, b: by_device(a, b, device, 'triton', 10**9 if device == 'cuda' else args.triton)
    rows = {}
    def compare(way, name, found, seconds):
        done = found >= 0
        differ = int((found != sets[name][2])[done].sum())
        rows.setdefault(way, {})[name] = dict(pairs=int(done.sum()), differ=differ, cpu_s=round(seconds, 1))
        print(f'{way:20s} {name:8s} {int(done.sum()):7,} pairs, {differ} differ   {seconds:8.1f} s CPU', flush=True)
        if differ: raise SystemExit(f'{way}: other integers')
    for way, call in ways.items():
        for name, (a, b, _) in sets.items():
            began = time.process_time()
            found = call(a, b)
            compare(way, name, found, time.process_time() - began)
    try: import distributed
    except ImportError: print('no dask.distributed: pip install "memkit[cluster]"')
    else:
        with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster:
            began = time.process_time()
            for name, found in by_cluster(sets, cluster.scheduler_address):
                compare('dask, two workers', name, found, time.process_time() - began)
                began = time.process_time()
    add_line(args.out, 'lfd_equality', device=torch.cuda.get_device_name() if device == 'cuda' else 'cpu', rows=rows)


if __name__ == '__main__': main()
