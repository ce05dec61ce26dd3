"""Descriptors drawn on a device, against the processor's in the same run: meshes per second, and where the device's time goes.

usage: bench_lfd_batch.py [--device cuda] [--faces 10000 200000] [--meshes 64] [--out FILE]
The meshes are built-in shapes, remeshed until they have about that many triangles. Prints a table and appends one JSON line to benchmarks/results.jsonl."""
import argparse, time
from pathlib import Path

import numpy as np
import torch

from memkit.lfd import lfd_descriptor
from memkit.lfd_batch import art_views, draw_silhouettes, lfd_descriptors, measure_views
from memkit.shapes import shape_set

from record import RESULTS, add_line


def meshes(n, faces):
    "Shapes whose faces are split into four, at random, until there are enough."
    for s in shape_set(n, seed=5):
        V, F = s.mesh(48)
        while len(F) < faces:
            part = F[:(faces - len(F) + 2)//3 or 1]
            mid = [(V[part[:, i]] + V[part[:, (i + 1) % 3]])/2 for i in range(3)]
            a, b, c = (len(V) + i*len(part) + np.arange(len(part)) for i in range(3))
            V = np.concatenate([V, *mid])
            F = np.concatenate([F[len(part):], *(np.stack(t, 1) for t in ((part[:, 0], a, c), (a, part[:, 1], b), (c, b, part[:, 2]), (a, b, c)))])
        yield V, F[:max(faces, len(F))]


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--device', default='cuda')
    ap.add_argument('--faces', type=int, nargs='+', default=[10_000, 200_000])
    ap.add_argument('--meshes', type=int, default=64)
    ap.add_argument('--out', type=Path, default=RESULTS)
    args = ap.parse_args()
    wait, rows = (torch.cuda.synchronize if args.device.startswith('cuda') else lambda: None), []
    for faces in args.faces:
        few = list(meshes(args.meshes, faces))
        next(iter(lfd_descriptors(few[:1], args.device))); lfd_descriptor(*few[0])       # compile, warm up
        began = time.perf_counter(); found = list(lfd_descriptors(few, args.device)); wait(); on_device = time.perf_counter() - began
        began = time.perf_counter(); plain = [lfd_descriptor(*m) for m in few[:8]]; processor = (time.perf_counter() - began)/8
        differ, spent = sum(int((a != b).sum()) for a, b in zip(found, plain)), dict(draw=0., measure=0., art=0.)
        for V, F in few[:8]:
            marks = [time.perf_counter()]
            masks = draw_silhouettes(V, F, args.device); wait(); marks.append(time.perf_counter())
            shapes = measure_views(masks); wait(); marks.append(time.perf_counter())
            art_views(masks, shapes, np.full(100, shapes.reach.max())); wait(); marks.append(time.perf_counter())
            for k, s in zip(spent, np.diff(marks)): spent[k] += s/8
        rows.append(dict(faces=faces, meshes_per_s=round(len(few)/on_device, 2), processor_core_meshes_per_s=round(1/processor, 2), ratio=round(processor*len(few)/on_device, 2),
                         bytes_that_differ=differ, seconds_a_mesh={k: round(s, 5) for k, s in spent.items()}))
        print(rows[-1])
    name = torch.cuda.get_device_name(args.device) if args.device.startswith('cuda') else args.device
    add_line(args.out, 'lfd_batch', device=name, meshes=args.meshes, rows=rows)


if __name__ == '__main__': main()
