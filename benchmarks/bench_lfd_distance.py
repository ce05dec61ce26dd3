"""Light field distances: pairs per CPU second on one core, of the two kernels, of the pruned search, and of the paper's way of computing them.

The paper's code (torch; for each of the 47 codes a lookup in a table of differences over all view pairs of a block of targets, then for each of the 60 alignments
an index_select of one side and the sum of a diagonal) is re-implemented here from its description in a few lines, and checked to give the same integers.
The rounds are interleaved, so that all rows share whatever else the machine was doing; the best round of each counts.
The floor: a pair is 10,000 comparisons of 47 weighted codes, 64 bytes with the doubled ones, so 20,000 byte-difference instructions of 32 bytes; one a cycle at 3 GHz makes 150,000 pairs a second.
Beside it the memory speed of one core (a copy of 256 MB), which bounds whoever writes the comparisons out.

usage: bench_lfd_distance.py [--shapes 760] [--queries 100] [--repeat 5] [--cached FILE.npy] [--out FILE]
Describing the shapes takes minutes the first time; the descriptors are kept in memkit's cache. Prints a table and appends one JSON line to benchmarks/results.jsonl."""
import os
for name in ('OPENBLAS_NUM_THREADS', 'OMP_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.setdefault(name, '1')   # before numpy: waiting threads count as CPU time

import argparse, time
from pathlib import Path

import numpy as np

from memkit.core import atomic_path, cache_home, progress
from memkit.lfd import lfd_alignments, lfd_descriptor, lfd_distance, simd_kind
from memkit.retrieval import nearest

from record import RESULTS, add_line

FLOOR = 3e9/20_000   # pairs a second


def copy_speed(repeat, megabytes=256):
    "Bytes read and written a second of one core by a plain copy."
    a = np.ones(megabytes << 20, np.uint8)
    b, best = a.copy(), np.inf
    for _ in range(repeat):
        began = time.perf_counter()
        b[:] = a
        best = min(best, time.perf_counter() - began)
    return 2*len(a)/best


def described(n):
    "`n` shapes of the built-in data set, described once."
    file = cache_home('bench')/f'lfd-shapes-{n}.npy'
    if not file.exists():
        from memkit.shapes import shape_set
        rows = [lfd_descriptor(*s.mesh(32)) for s in progress(shape_set(n, seed=0), 'describing', unit='mesh')]
        with atomic_path(file) as tmp, open(tmp, 'wb') as f: np.save(f, np.stack(rows))
    return np.load(file)


def torch_distance(device='cpu'):
    "The paper's algorithm: one query against a block of targets."
    try: import torch
    except ImportError: return None
    torch.set_num_threads(1)
    codes = torch.arange(256, device=device)
    table = (codes[:, None] - codes).abs().to(torch.int32).ravel()
    alignments = torch.from_numpy(lfd_alignments()).to(device)
    weight = [1]*35 + [2]*11 + [1]

    @torch.inference_mode()
    def one_query(q, targets):
        a, b = (torch.from_numpy(x).to(device).long() for x in (q, targets))
        cost = torch.zeros((len(b), 10, 10, 10, 10), dtype=torch.int32, device=device) # target, set and view of the query, set and view of the target
        for c, w in enumerate(weight):
            pair = (a[None, :, :, None, None, c]*256) + b[:, None, None, :, :, c]
            cost += w*table[pair]
        least = torch.full((len(b),), 2**31 - 1, dtype=torch.int64, device=device)
        for p in alignments:
            sums = cost.index_select(2, p).diagonal(dim1=2, dim2=4).sum(-1)
            least = torch.minimum(least, sums.flatten(1).amin(1))
        return least.cpu().numpy()

    return lambda Q, G: np.stack([np.concatenate([one_query(q, G[j:j + 256]) for j in range(0, len(G), 256)]) for q in Q])


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--shapes', type=int, default=760)
    ap.add_argument('--queries', type=int, default=100)
    ap.add_argument('--repeat', type=int, default=5)
    ap.add_argument('--cached', help='a .npy of descriptors (n,10,10,47) instead of the built-in shapes; the last --queries of them are the queries')
    ap.add_argument('--out', type=Path, default=RESULTS)
    args = ap.parse_args()
    d = np.load(args.cached) if args.cached else described(args.shapes + args.queries)
    G, Q = d[:-args.queries], d[-args.queries:]
    D, saved = lfd_distance(Q, G), {}

    def search(k):
        index, distance, saved[k] = nearest(Q, G, k=k, n_jobs=1, stats=True)
        return index, distance

    few, paper = (Q[:4], G[:256]), torch_distance()
    runs = {'plain loops': (lambda: lfd_distance(Q[:20], G, kernel='plain'), 20*len(G))}
    if simd_kind(): runs['psadbw'] = lambda: lfd_distance(Q, G), len(Q)*len(G)
    runs |= {'nearest, k=1': (lambda: search(1), len(Q)*len(G)), 'nearest, k=10': (lambda: search(10), len(Q)*len(G))}
    if paper:
        assert (paper(*few) == lfd_distance(*few)).all()
        runs["paper's way, torch"] = lambda: paper(*few), few[0].shape[0]*few[1].shape[0]
    for call, _ in runs.values(): call()                      # compile
    for k in (1, 10):                                         # and check
        order = np.argsort(D, axis=1, kind='stable')[:, :k]
        assert all((x == y).all() for x, y in zip(search(k), (order, np.take_along_axis(D, order, 1))))
    speed = {name: [] for name in runs}
    for _ in range(args.repeat):
        for name, (call, pairs) in runs.items():
            began = time.process_time()
            call()
            speed[name].append(pairs/(time.process_time() - began))
    base = max(speed.get("paper's way, torch", [np.nan]))
    print(f'{len(Q)} queries, {len(G)} shapes ({args.cached or "memkit.shapes"}); pairs per CPU second, one core, best of {args.repeat} (median)')
    for name, s in speed.items(): print(f'{name:20s} {max(s):12,.0f} ({np.median(s):,.0f})   {max(s)/base:8.1f} × torch')
    for k, stats in saved.items(): print(f'k={k}: {stats}')
    fastest = max(speed.get('psadbw', speed['plain loops']))
    print(f'{fastest/FLOOR:.0%} of the floor of {FLOOR:,.0f} pairs a second; memory copied at {(bytes_per_s := copy_speed(args.repeat))/1e9:.1f} GB/s')
    add_line(args.out, 'lfd_distance', source='file' if args.cached else 'memkit.shapes', shapes=len(G), queries=len(Q), repeat=args.repeat, threads=1,
        pairs_per_cpu_s={n: dict(best=round(max(s)), median=round(float(np.median(s)))) for n, s in speed.items()},
        ratio_to_torch={n: round(max(s)/base, 1) for n, s in speed.items()} if paper else None, search={f'k={k}': vars(s) for k, s in saved.items()},
        floor_pairs_per_s=FLOOR, share_of_floor=round(fastest/FLOOR, 3), memory_gb_per_s=round(bytes_per_s/1e9, 2))


if __name__ == '__main__': main()
