"""Decoding an autoencoder: trunk once per shape against the original's trunk per chunk, and coarse-to-fine against dense marching cubes.

1. The full-size network (424 M parameters, random weights) at the corners of a grid of 64 cells (65³ = 274,625 points) in chunks of 50,000, as the paper's code cuts them. The original's
   way is written out here: `trunk`, then keys and values, then the queries, for every chunk anew. Both ways run once, in full, in this process; the values are compared bit by bit.
2. A tiny network, trained here for a moment on one built-in shape, meshed at 128: queries and CPU seconds of both modes of `sdf_to_mesh`, and the cells with a sign change that
   coarse-to-fine misses.

usage: bench_decode.py [--device cpu|cuda] [--size released] [--grid 64] [--steps 400] [--threads 1] [--out FILE]
Prints a table and appends one JSON line to benchmarks/results.jsonl. About 4 CPU minutes at the default size.
On a GPU the values of both ways are compared in the same way; seconds are then those until the device is done."""
import os
for name in ('OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.setdefault(name, '1')

import argparse, time
from pathlib import Path

import numpy as np
import torch

from memkit.core import make_rng
from memkit.prepare import shape_samples
from memkit.sdf import empty_grid, mixed_signs, sample_adaptive, sdf_to_mesh
from memkit.shapes import sample_shape
from memkit.vecset import VECSET_SIZES, VecSet, vecset_loss

from record import RESULTS, add_line

CHUNK = 50_000   # of the paper's code


def timed(run):
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    out = run()
    wait()
    return out, dict(wall=round(time.perf_counter() - wall, 2), cpu=round(time.process_time() - cpu, 2))


def per_chunk(net, latents, queries): return torch.cat([net.ask(net.keys_values(latents), part) for part in queries.split(CHUNK, 1)], 1)


def big(size, cells, device):
    "Trunk once against trunk per chunk, at the corners of a grid."
    net = VecSet(**VECSET_SIZES[size]).eval().requires_grad_(False)
    axis = torch.linspace(-1.01, 1.01, cells + 1)
    queries = torch.stack(torch.meshgrid(axis, axis, axis, indexing='ij'), -1).reshape(1, -1, 3)
    latents = torch.from_numpy(make_rng(0, 'latents').standard_normal((1, net.config.num_latents, net.config.latent_dim)).astype('f'))
    torch.nn.init.normal_(net.to_outputs[1].weight, std=.05, generator=torch.Generator().manual_seed(0))   # a zero layer would make any two ways agree
    net, queries, latents = (x.to(device) for x in (net, queries, latents))
    with torch.inference_mode():
        net.ask(net.keys_values(latents), queries[:, :1000])   # first touch of the weights
        once, ours = timed(lambda: net.decode(latents, queries, chunk=CHUNK))
        _, trunk = timed(lambda: net.keys_values(latents))
        anew, theirs = timed(lambda: per_chunk(net, latents, queries))
        free = net.decode(latents, queries[:, :20_000])        # another size of chunk
    return dict(size=size, parameters=sum(p.numel() for p in net.parameters()), queries=queries.shape[1], chunks=-(-queries.shape[1]//CHUNK), once=ours, trunk=trunk, per_chunk=theirs,
                ratio={k: round(theirs[k]/ours[k], 2) for k in ours}, largest_difference=float((once - anew).abs().max()), identical=bool(torch.equal(once, anew)),
                largest_difference_other_chunk=float((free - once[:, :20_000]).abs().max()), largest_value=float(once.abs().max()))


def small(steps, device, resolution=128):
    "A network overfit to one shape: queries of dense and coarse-to-fine marching cubes."
    shape, rng = sample_shape('teapot', 0), make_rng(0, 'bench')
    data = {k: torch.from_numpy(np.asarray(v)).to(device) for k, v in shape_samples(shape, 0, 40_000, 20_000, 4096, resolution=64).items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = VecSet(**VECSET_SIZES['tiny']).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    pick = lambda kind, n: dict(zip((f'{kind}_points', f'{kind}_sdf'), (data[k][i][None] for i in [torch.from_numpy(rng.integers(0, len(data[f'{kind}_sdf']), n)).to(device)] for k in (f'{kind}_points', f'{kind}_sdf'))))
    for step in range(steps):
        batch = dict(points=data['surface_points'][None, :net.config.num_inputs], **pick('vol', 512), **pick('near', 512))
        vecset_loss(net, batch, eikonal=0.)[0].backward()
        optimizer.step(); optimizer.zero_grad()
    net.eval()
    with torch.inference_mode(): field = net.field(net.encode(data['surface_points'][None, :net.config.num_inputs])[0])
    asked = dict(n=0)
    def counted(points): asked['n'] += len(points); return field(points)
    out, meshes = dict(steps=steps, resolution=resolution), {}
    for mode in ('dense', 'adaptive'):
        asked['n'] = 0
        meshes[mode], spent = timed(lambda: sdf_to_mesh(counted, resolution, mode=mode))
        out[mode] = dict(queries=asked['n'], faces=len(meshes[mode][1]), **spent)
    dense = empty_grid(resolution, 1.01)
    dense.ask(field, np.ones_like(dense.known), 1 << 16)
    cells = mixed_signs(dense)
    missed = cells & ~mixed_signs(sample_adaptive(field, resolution))
    return out | dict(query_ratio=round(out['dense']['queries']/out['adaptive']['queries'], 1), cells=int(cells.sum()), missed=int(missed.sum()))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    ap.add_argument('--size', default='released', choices=list(VECSET_SIZES))
    ap.add_argument('--grid', type=int, default=64, help='cells along each axis')
    ap.add_argument('--steps', type=int, default=400, help='of training the tiny network')
    ap.add_argument('--threads', type=int, default=1)
    ap.add_argument('--out', type=Path, default=RESULTS)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    if args.device == 'cuda' and not torch.cuda.is_available(): raise SystemExit('no CUDA device here')
    load = os.getloadavg()[0] if hasattr(os, 'getloadavg') else None
    tiny, full = small(args.steps, args.device), big(args.size, args.grid, args.device)
    print(f'{args.size}: {full["queries"]:,} queries in {full["chunks"]} chunks, {args.threads} thread(s), load {load:.1f} at the start' if load is not None else args.size)
    for name in ('per_chunk', 'once', 'trunk'): print(f'  {name:10s} wall {full[name]["wall"]:8.1f} s   CPU {full[name]["cpu"]:8.1f} s')
    print(f'  ratio: wall {full["ratio"]["wall"]}, CPU {full["ratio"]["cpu"]}; identical values: {full["identical"]}; in other chunks {full["largest_difference_other_chunk"]:.1e} of {full["largest_value"]:.2f}')
    for mode in ('dense', 'adaptive'): print(f'tiny at {tiny["resolution"]}, {mode:9s} {tiny[mode]["queries"]:10,} queries   CPU {tiny[mode]["cpu"]:6.2f} s   {tiny[mode]["faces"]:,} faces')
    print(f'  {tiny["query_ratio"]} times fewer queries, {tiny["missed"]} of {tiny["cells"]} cells missed')
    add_line(args.out, 'decode', device=torch.cuda.get_device_name() if args.device == 'cuda' else 'cpu', threads=args.threads, load=load, full=full, tiny=tiny)


if __name__ == '__main__': main()
