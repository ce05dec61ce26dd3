"""Descriptors of a folder of meshes with one process and with two: how the work scales over cores.

The meshes are written once from the built-in families; each number of processes describes all of them into an empty database, in turn, several times, and the best of each is compared.

usage: bench_scaling.py [--shapes 120] [--resolution 96] [--jobs 1 2] [--repeat 3] [--out FILE]
Prints a table and appends one JSON line to benchmarks/results.jsonl. Needs as many free cores as the largest number of jobs."""
import argparse, os, tempfile, time
from pathlib import Path

from memkit.database import build_database
from memkit.mesh import save_mesh
from memkit.shapes import shape_set

from record import RESULTS, add_line


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--shapes', type=int, default=120)
    ap.add_argument('--resolution', type=int, default=96)
    ap.add_argument('--jobs', type=int, nargs='+', default=[1, 2])
    ap.add_argument('--repeat', type=int, default=3)
    ap.add_argument('--out', type=Path, default=RESULTS)
    args, load = ap.parse_args(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for i, shape in enumerate(shape_set(args.shapes, seed=0)): save_mesh(folder/'meshes'/f'{i:04d}.ply', *shape.mesh(args.resolution))
        seconds = {n: [] for n in args.jobs}
        build_database(folder/'meshes', folder/'warm', n_jobs=1)   # compiled code and file cache are warm for all
        for r in range(args.repeat):
            for n in args.jobs:
                start = time.perf_counter()
                done = build_database(folder/'meshes', folder/f'{r}-{n}', n_jobs=n)
                seconds[n].append(time.perf_counter() - start)
                assert not done.failures
    best = {n: min(s) for n, s in seconds.items()}
    rows = [dict(jobs=n, seconds=round(s, 2), meshes_per_s=round(args.shapes/s, 2), speedup=round(best[args.jobs[0]]/s, 2)) for n, s in best.items()]
    for row in rows: print('  '.join(f'{k} {v}' for k, v in row.items()))
    add_line(args.out, 'scaling', shapes=args.shapes, resolution=args.resolution, repeat=args.repeat, load=load, rows=rows)


if __name__ == '__main__': main()
