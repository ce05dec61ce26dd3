"""What the tiny autoencoder reaches: trained by `train_vecset` on built-in shapes, IoU of each with its shape at points it has not seen.

usage: bench_autoencoder.py [--shapes 48] [--steps N] [--latents 16] [--channels 16] [--categories a,b,...] [--folder DIR] [--threads 2] [--out FILE]
With --folder an interrupted run goes on where it stopped (CPU seconds are then those of the last part alone, and said to be). Prints a table, appends one JSON line to
benchmarks/results.jsonl. The default takes about five minutes of two quiet cores."""
import os
for name in ('OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.setdefault(name, '1')

import argparse, contextlib, json, tempfile, time
from pathlib import Path

import numpy as np
import torch

from memkit.autoencoder import ShapeSamples, make_recipe, reconstruction_iou, train_vecset
from memkit.core import provenance
from memkit.runs import checkpoints
from memkit.shapes import shape_set


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--shapes', type=int, default=48)
    ap.add_argument('--steps', type=int, default=None, help="default: the recipe's")
    ap.add_argument('--latents', type=int, default=None)
    ap.add_argument('--channels', type=int, default=None)
    ap.add_argument('--categories', default=None, help='names with commas; default: all')
    ap.add_argument('--folder', type=Path, default=None)
    ap.add_argument('--threads', type=int, default=2)
    ap.add_argument('--out', type=Path, default=Path(__file__).with_name('results.jsonl'))
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    sizes = {k: v for k, v in dict(num_latents=args.latents, latent_dim=args.channels).items() if v}
    changes = dict(sizes=sizes) | (dict(steps=args.steps) if args.steps else {})
    recipe, load = make_recipe('tiny', **changes), os.getloadavg()[0] if hasattr(os, 'getloadavg') else None
    shapes = shape_set(args.shapes, categories=args.categories and args.categories.split(','))
    cpu, wall = time.process_time(), time.perf_counter()
    data = ShapeSamples(shapes, **recipe['data'])
    for i in range(len(data)): data.arrays(i)
    pool, cpu = time.process_time() - cpu, time.process_time()
    with contextlib.nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as folder:
        resumed = bool(checkpoints(folder))
        vecset, result = train_vecset(data, folder, tensorboard=False, verbose=False, **changes)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    iou = reconstruction_iou(vecset, data)
    by = {c: round(float(np.mean([v for v, s in zip(iou, shapes) if s.category == c])), 3) for c in dict.fromkeys(s.category for s in shapes)}
    last = {k: round(v, 4) for k, v in result.history[-1].items() if k in ('vol', 'near', 'contrast')}
    record = dict(shapes=len(shapes), recipe=recipe, parameters=sum(p.numel() for p in vecset.parameters()), threads=args.threads, load=load, resumed=resumed, cpu_s=round(cpu), pool_cpu_s=round(pool),
                  wall_s=round(wall), loss=last, iou=dict(mean=round(float(iou.mean()), 4), median=round(float(np.median(iou)), 4), min=round(float(iou.min()), 4), share_above_085=round(float((iou >= .85).mean()), 3)), by_category=by)
    print(f'{len(shapes)} shapes, {recipe["train"]["steps"]} steps: CPU {cpu:.0f} s{" since the last interruption" if resumed else ""}, wall {wall:.0f} s, {args.threads} thread(s); loss {last}')
    print(f'IoU mean {iou.mean():.3f}, median {np.median(iou):.3f}, min {iou.min():.3f}; at least 0.85: {(iou >= .85).mean():.0%}')
    print('  '.join(f'{c} {v:.2f}' for c, v in by.items()))
    with open(args.out, 'a') as f: f.write(json.dumps(provenance(benchmark='autoencoder', **record)) + '\n')


if __name__ == '__main__': main()
