"""Nearest training shapes end to end: seconds, memory and work saved at several sizes, on the processor or on a GPU.

The descriptors are those of built-in shapes, each repeated with changed codes: a factor per code that all its views share and one per view, so large that a
query finds its nearest shape as far off as real held-out meshes do (about 5,000), and that the bounds leave 2 to 3 % of a small gallery, as they do there. A GPU is compared with the paper's way of computing the distance, in torch
on the same GPU, and with the floor of two float operations a term.

usage: bench_retrieval.py [--sizes 1000 10000 51200] [--queries 10000] [--device auto] [--jobs N] [--max-gb 1] [--out FILE]
Prints a table and appends one JSON line to benchmarks/results.jsonl. `make gpu-bench` runs it on a GPU."""
import argparse, resource, time
from pathlib import Path

import numpy as np

from memkit.core import make_rng
from memkit.lfd import lfd_distance
from memkit.retrieval import nearest, search_device

from bench_lfd_distance import described, torch_distance
from record import RESULTS, add_line

TERMS = 2*47*10**4 # float operations of one distance, subtraction and addition


def variations(base, n, seed):
    "`n` descriptors around those of built-in shapes."
    rng = make_rng(seed, 'bench-retrieval')
    out = np.empty((n, 10, 10, 47), np.uint8)
    for i in range(n):
        d = base[rng.integers(len(base))].astype(np.float32)
        change = rng.normal(0, .3, 47).astype(np.float32) + rng.normal(0, .3, (10, 10, 47)).astype(np.float32)
        out[i] = np.clip(np.rint(d*np.exp(change)), 0, 255)
    return out


def on_gpu(Q, G, device):
    "Exact pairs per second without pruning, by kernel and by the paper's way, on the same GPU; the integers are compared."
    import torch
    from memkit.lfd_device import device_tables, distance_pairs, kernel_for
    a, b, kernel = device_tables(Q[:1000], device), device_tables(G[:1000], device), kernel_for(device)
    q, g = (x.flatten() for x in torch.meshgrid(*[torch.arange(len(t), device=device) for t in (a, b)], indexing='ij'))
    def timed(call):
        call(); torch.cuda.synchronize()
        began = time.perf_counter()
        result = call(); torch.cuda.synchronize()
        return result, time.perf_counter() - began
    found, seconds = timed(lambda: distance_pairs(a, b, q, g, kernel))
    assert (found.view(len(a), len(b))[:20, :256].cpu().numpy() == lfd_distance(Q[:20], G[:256])).all()
    paper, paper_seconds = timed(lambda: torch_distance(device)(Q[:8], G[:1000]))
    assert (paper == lfd_distance(Q[:8], G[:1000])).all()
    peak = torch.cuda.get_device_properties(device).multi_processor_count*128*2*1.7e9 # two operations a lane and cycle, at 1.7 GHz
    rate = len(q)/seconds
    return dict(kernel=kernel, gpu=torch.cuda.get_device_name(device), exact_pairs_per_s=round(rate), paper_pairs_per_s=round(8*len(b)/paper_seconds),
                ratio=round(rate*paper_seconds/(8*len(b)), 1), share_of_floor=round(rate*TERMS/peak, 3))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--sizes', type=int, nargs='+', default=[1000, 10000, 51200])
    ap.add_argument('--queries', type=int, default=10000)
    ap.add_argument('--device', default='auto')
    ap.add_argument('--jobs', type=int, default=1)
    ap.add_argument('--max-gb', type=float, default=1.)
    ap.add_argument('--out', type=Path, default=RESULTS)
    args = ap.parse_args()
    base, device = described(860), search_device(args.device)
    Q, G = variations(base, args.queries, 1), variations(base, max(args.sizes), 0)
    nearest(Q[:2], G[:64], device=args.device) # compile
    extra, rows = on_gpu(Q, G, device) if device else {}, []
    if extra: print(extra)
    print(f'{len(Q)} queries, top-1, {device or f"processor, {args.jobs} threads"}')
    for n in args.sizes:
        wall, cpu = time.perf_counter(), time.process_time()
        _, D, stats = nearest(Q, G[:n], device=args.device, n_jobs=args.jobs, max_gb=args.max_gb, stats=True)
        wall, cpu, pairs = time.perf_counter() - wall, time.process_time() - cpu, len(Q)*n
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e6
        rows.append(dict(gallery=n, wall_s=round(wall, 2), cpu_s=round(cpu, 2), pairs_per_cpu_s=round(pairs/cpu), pairs_per_s=round(pairs/wall), exact_share=stats.exact/pairs, median_d=float(np.median(D)), peak_gb=round(peak, 2)))
        print(f'{n:7,} shapes: {wall:8.1f} s wall {cpu:8.1f} s CPU  {pairs/cpu:12,.0f} pairs per CPU s  exact {stats.exact/pairs:.2%}  median distance {np.median(D):,.0f}  peak {peak:.2f} GB')
    add_line(args.out, 'retrieval', queries=len(Q), jobs=args.jobs, device=device or 'cpu', max_gb=args.max_gb, rows=rows, **extra)


if __name__ == '__main__': main()
