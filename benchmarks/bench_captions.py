"""Batching in captioning: replies and vectors of a tiny model of the real class, one by one and in batches sorted by length.

The model is a Qwen3 with random weights (memkit.tiny_models), so what is measured is the machinery around it: padding, batching, decoding. A large model on a processor gains less, on an accelerator
usually more. What batching can save is the fixed cost of a call; of the embedding, the seconds inside the model are recorded by themselves, since in batches they are nearly all arithmetic, most of
it attention over the longest captions, and bound the ratio from above. Each side has the same prompts, of 20 to 400 characters, and must give the same words; the ratio is of CPU time, median over rounds in which both take turns.

usage: bench_captions.py [--rows 256] [--batch 32] [--tokens 24] [--repeat 3] [--out FILE]
Prints a table and appends one JSON line to benchmarks/results.jsonl."""
import os
for name in ('OPENBLAS_NUM_THREADS', 'OMP_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.setdefault(name, '1')   # before numpy and torch: waiting threads count as CPU time
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import argparse, tempfile, time
from pathlib import Path

import numpy as np

from memkit.core import make_rng
from memkit.language import Prompt
from memkit.local_models import LocalModel
from memkit.shapes import shape_set
from memkit.tiny_models import tiny_text_model

from record import RESULTS, add_line


def prompts_of(n):
    "Questions whose lengths differ as captions of all three levels do."
    rng = make_rng(0, 'bench-captions')
    return [Prompt(str(i), s.caption(('phrase', 'sentence', 'paragraph')[int(rng.integers(3))]), 'Keep it or drop it.') for i, s in enumerate(shape_set(n, seed=1))]


def clocked(model):
    "Counts the processor seconds inside a model."
    inner, spent = model.forward, [0.]
    def forward(*args, **kwargs):
        began = time.process_time()
        out = inner(*args, **kwargs)
        spent[0] += time.process_time() - began
        return out
    model.forward = forward
    return spent


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rows', type=int, default=256)
    p.add_argument('--batch', type=int, default=32)
    p.add_argument('--tokens', type=int, default=24)
    p.add_argument('--repeat', type=int, default=3)
    p.add_argument('--out', type=Path, default=RESULTS)
    o = p.parse_args()
    prompts, jobs, inside = prompts_of(o.rows), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        tiny_text_model(folder)
        for name, size in (('one by one', 1), (f'batches of {o.batch}', o.batch)):
            writer, reader = (LocalModel(folder, task, device='cpu', batch_size=size, max_new_tokens=o.tokens) for task in ('text', 'embedding'))
            writer.generate(prompts[:2]); reader.embed([q.user for q in prompts[:2]])   # first calls set things up
            inside[name] = clocked(reader.model)
            jobs[name] = {'generate': (lambda w=writer: [r.text for r in w.generate(prompts)], writer), 'embed': (lambda r=reader: r.embed([q.user for q in prompts]), reader)}
        clocks, said = {}, {}
        for _ in range(o.repeat):
            for name, tasks in jobs.items():
                for task, (f, backend) in tasks.items():
                    backend.meter = type(backend.meter)()
                    wall, cpu = time.perf_counter(), time.process_time()
                    said[name, task] = f()
                    clocks.setdefault((name, task), []).append((time.perf_counter() - wall, time.process_time() - cpu, backend.meter.record()))
    alone, together = jobs
    assert said[alone, 'generate'] == said[together, 'generate'], 'batching changed the words'
    assert np.allclose(said[alone, 'embed'], said[together, 'embed'], atol=1e-5), 'batching changed the vectors'
    rows, ratios = {}, {}
    for (name, task), c in clocks.items():
        best = min(c, key=lambda x: x[1])
        rows[f'{task}, {name}'] = dict(wall=round(best[0], 3), cpu=round(best[1], 3), rows_per_s=best[2]['rows_per_s'], tokens_per_s=best[2]['tokens_per_s'])
        print(f'{task:9s} {name:14s} {best[0]:7.2f} s wall {best[1]:7.2f} s CPU {best[2]["rows_per_s"]:9.1f} rows/s {best[2]["tokens_per_s"]:9.0f} tokens/s')
    inside = {name: round(spent[0]/o.repeat, 4) for name, spent in inside.items()}
    print('embed, mean s CPU inside the model: ' + '; '.join(f'{name} {s}' for name, s in inside.items()))
    for task in ('generate', 'embed'): ratios[task] = round(float(np.median([a[1]/b[1] for a, b in zip(clocks[alone, task], clocks[together, task])])), 1)
    print('; '.join(f'{task}: {r} times as fast' for task, r in ratios.items()))
    add_line(o.out, 'captions', rows=o.rows, batch=o.batch, new_tokens=o.tokens, repeat=o.repeat, measured=rows, cpu_ratio=ratios, embed_cpu_inside_the_model=inside)


if __name__ == '__main__': main()
