"""The transformer: operations per token of the released sizes; a training step, a guided sampling step and a layer of experts, each against the plain way, in one session.

On a CPU (256 tokens, batch 8, width 256, 6 blocks, 77 condition tokens of width 512; AdamW, clipping; single precision, and bfloat16 beside it with --bf16, which pays on processors that have it):
  train            memkit's step against the same network with boolean masks for its experts, as the released code has them in training
  class condition  a step with a condition of one token, with the short-cut and with attention to that token
  guided step      16 forward passes with the condition's keys and values computed at each step, and once per run
  experts          one layer, forward and backward and forward alone: memkit, boolean masks, the grouped product, all experts on all tokens
All variants of a row take turns, so that a busy neighbour slows them alike; their results are compared before anything is timed. Ratios are medians over rounds; above 1 means that memkit is faster.

On a GPU (--device cuda): a training step of the Baseline at 64 x 1024 tokens in bfloat16, plain and compiled: seconds, achieved operations per second, share of the device's peak (MFU)
and of the floor at 790 TF/s. Where 64 samples do not fit, they are split into micro-batches.

usage: bench_dit.py [--device cpu|cuda] [--rounds 5] [--threads 1] [--bf16] [--peak TFLOPS] [--out FILE]
Prints a table and appends one JSON line to benchmarks/results.jsonl."""
import argparse, os, time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from memkit.dit import DIT_SIZES, CrossAttention, DiT
from memkit import experts
from memkit.experts import MoE
from memkit.flow import draw_noise, flow_loss, guide

from record import RESULTS, add_line

PEAKS = {'H100': 989, 'H200': 989, 'A100': 312, 'L40': 181, '4090': 165} # dense bfloat16, TF/s


def masks(self, x):
    "A layer of experts with a boolean mask per expert over duplicated rows."
    flat = x.flatten(0, 1)
    _, weights, chosen = self.route(flat)
    rows, which = flat.repeat_interleave(self.top_k, 0), chosen.flatten()
    y, out = self.shared_experts(flat), None
    for e, expert in enumerate(self.experts):
        made = expert(rows[which == e])
        out = rows.new_empty(rows.shape, dtype=made.dtype) if out is None else out
        out[which == e] = made
    y = y + (out.unflatten(0, (-1, self.top_k))*weights[..., None].to(out.dtype)).sum(1)
    if self.training and torch.is_grad_enabled():
        y = experts._AddGradient.apply(y, experts.balance_term(self.route(flat)[0], (which[:, None] == torch.arange(len(self.experts))).sum(0)), self.balance)
    return y.view_as(x)


def dense(self, x):
    "Every expert on every token."
    _, weights, chosen = self.route(x.flatten(0, 1))
    full = torch.zeros(len(chosen), len(self.experts)).scatter(1, chosen, weights)
    y = self.shared_experts(x.flatten(0, 1))
    for e, expert in enumerate(self.experts): y = y + expert(x.flatten(0, 1))*full[:, e:e + 1]
    return y.view_as(x)


@contextmanager
def grouped():
    with mock.patch.object(experts, '_on_device', lambda x: True): yield


def attend_anyway():
    "Attention to a condition of one token instead of the short-cut."
    return mock.patch.object(CrossAttention, 'prepare', lambda self, context: self.keys_values(context))


def way(forward): return mock.patch.object(MoE, 'forward', forward)


def clocked(jobs, rounds):
    "Every job once per round: job -> (rounds, 2) wall and CPU seconds."
    clocks = {k: [] for k in jobs}
    for r in range(rounds + 1):
        for k, f in jobs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            f()
            if r: clocks[k].append((time.perf_counter() - wall, time.process_time() - cpu)) # the first round warms up
    return {k: np.array(v) for k, v in clocks.items()}


def within(manager, f):
    def call():
        with manager(): return f()
    return call


def make_step(model, batch, context, bf16=False):
    "One training step of a copy of the model, and the loss it reports."
    model = DiT.from_config(model.config).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, betas=(.9, .99), eps=1e-6, weight_decay=.01)
    seeds = torch.arange(len(batch))
    def step():
        optimizer.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=bf16): loss = flow_loss(model, batch, seeds, context)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        return loss.item()
    return step


def operations():
    "Multiplications and additions of a forward pass per token, the token of the time counted."
    out = {}
    for name in 'SBL':
        with torch.device('meta'), torch.no_grad():
            model = DiT(**DIT_SIZES[name]).eval()
            for kind, s in dict(text=77, **{'class': 1}).items():
                with FlopCounterMode(display=False) as counter: model(torch.empty(1, 1024, 32), torch.empty(1), torch.empty(1, s, 512))
                out[f'{name} {kind}'] = counter.get_total_flops()
    return out


def same(a, b, eps=1e-5): assert (a - b).abs().max() <= eps*b.abs().max(), f'results differ by {(a - b).abs().max():.1e}'


def on_cpu(o):
    torch.manual_seed(0)
    model = DiT(**DIT_SIZES['mini'])
    x, t, text, null, label = torch.randn(8, 256, 32), torch.rand(8), torch.randn(8, 77, 512), torch.randn(1, 77, 512), torch.randn(8, 1, 512)
    with torch.no_grad():
        want, model = model(x, t, text), model.eval()
        with way(masks): same(model(x, t, text), want)
        with grouped(): same(model(x, t, text), want)
        want = model(x, t, label)
        with attend_anyway(): same(model(x, t, label), want)
        steps = {name: guide(model, text, null, 5., cache) for name, cache in (('at each step', None), ('cached', model.cache_context))}
        same(steps['cached'](x, t), steps['at each step'](x, t))
    quiet = lambda f: within(torch.no_grad, f)
    layer, rows = MoE(256), torch.randn(8, 257, 256, requires_grad=True) # in a network what comes before needs a gradient too
    def both(): layer.zero_grad(); layer(rows).square().mean().backward()
    alone = quiet(lambda: layer(rows))
    ways = dict(memkit=lambda f: f, masks=lambda f: within(lambda: way(masks), f), grouped=lambda f: within(grouped, f), dense=lambda f: within(lambda: way(dense), f))
    groups = {'train': {'memkit': make_step(model, x, text), 'masks': within(lambda: way(masks), make_step(model, x, text))},
              'class condition': {'memkit': make_step(model, x, label), 'attention': within(attend_anyway, make_step(model, x, label))},
              'class condition, forward': {'memkit': quiet(lambda: model(x, t, label)), 'attention': quiet(within(attend_anyway, lambda: model(x, t, label)))},
              'guided step': {'memkit': quiet(lambda: steps['cached'](x, t)), 'at each step': quiet(lambda: steps['at each step'](x, t))},
              'experts': {k: w(both) for k, w in ways.items()}, 'experts, forward': {k: w(alone) for k, w in ways.items()}}
    if o.bf16: groups['train, bfloat16'] = {'memkit': make_step(model, x, text, True), 'single precision': make_step(model, x, text)}
    seconds, ratios = {}, {}
    for group, jobs in groups.items():
        clocks = clocked(jobs, o.rounds)
        for k, v in clocks.items(): seconds[f'{group}: {k}'] = dict(zip(('wall', 'cpu'), v.min(0).round(4).tolist()), median_cpu=round(float(np.median(v[:, 1])), 4))
        for k in list(jobs)[1:]: ratios[f'{group}: {k} / memkit'] = dict(zip(('wall', 'cpu'), np.median(clocks[k]/clocks['memkit'], 0).round(2).tolist()))
    with torch.device('meta'), torch.no_grad(), FlopCounterMode(display=False) as counter: DiT(**DIT_SIZES['mini'])(torch.empty(8, 256, 32), torch.empty(8), torch.empty(8, 77, 512))
    flops = 3*counter.get_total_flops() # the CPU's own attention kernel is not counted by PyTorch; on the meta device it is
    rate = flops/seconds['train: memkit']['wall']/1e9
    print(f'load {os.getloadavg()[0]:.1f}, {o.threads} threads, {o.rounds} rounds')
    for k, v in seconds.items(): print(f"{k:40s} {v['wall']:8.3f} s wall (best) {v['cpu']:8.3f} s CPU (best) {v['median_cpu']:8.3f} s CPU (median)")
    for k, v in ratios.items(): print(f"{k:40s} wall {v['wall']:5.2f}   CPU {v['cpu']:5.2f}")
    print(f'a training step counts {flops/1e9:.1f} GF: {rate:.1f} GF/s, {1/seconds["train: memkit"]["wall"]:.2f} steps/s')
    return dict(threads=o.threads, rounds=o.rounds, seconds=seconds, ratios_median=ratios, train_gflop=round(flops/1e9, 1), train_gflops_per_s=round(rate, 1))


def on_gpu(o):
    name = torch.cuda.get_device_name()
    peak = o.peak or next((v for k, v in PEAKS.items() if k in name), None)
    with torch.device('meta'), torch.no_grad(), FlopCounterMode(display=False) as counter:
        DiT(**DIT_SIZES['B'])(torch.empty(1, 1024, 32), torch.empty(1), torch.empty(1, 77, 512))
    work, rows = 3*64*counter.get_total_flops(), {}
    for kind in ('plain', 'compiled'):
        micro = 64
        while micro:
            try: rows[kind] = time_gpu(kind == 'compiled', micro, o.rounds) | dict(micro_batch=micro); break
            except torch.cuda.OutOfMemoryError: micro //= 2
            finally: torch.cuda.empty_cache()
        if kind not in rows: raise SystemExit(f'{name}: not even one sample of the Baseline fits')
        s = rows[kind]['seconds']
        rows[kind] |= dict(tflops=round(work/s/1e12, 1), of_floor=round(.133/s, 3), mfu=peak and round(work/s/1e12/peak, 3))
        print(f'{name}, Baseline, 64 x 1024 tokens, bfloat16, {kind}, micro-batch {rows[kind]["micro_batch"]}: {s:.3f} s a step, {rows[kind]["tflops"]} TF/s, MFU {rows[kind]["mfu"]} of '
              f'{peak} TF/s, {rows[kind]["of_floor"]} of the floor of 0.133 s, {rows[kind]["gib"]} GiB')
    return dict(device=name, peak_tflops=peak, train_tflop=round(work/1e12, 1), gpu=rows)


def time_gpu(compiled, micro, rounds):
    "Median seconds of a training step of 64 samples and the memory it takes."
    torch.manual_seed(0)
    model = DiT(**DIT_SIZES['B']).cuda().train()
    call = torch.compile(model, fullgraph=True) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, betas=(.9, .99), eps=1e-6, weight_decay=.01, fused=True)
    x, context, seeds = draw_noise(range(64), (1024, 32), 'cuda'), torch.randn(64, 77, 512, device='cuda'), torch.arange(64)
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(rounds + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(0, 64, micro):
            with torch.autocast('cuda', torch.bfloat16): loss = flow_loss(call, x[i:i + micro], seeds[i:i + micro], context[i:i + micro])
            (loss*micro/64).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return dict(seconds=round(float(np.median(seconds[3:])), 4), gib=round(torch.cuda.max_memory_allocated()/2**30, 1), loss=round(loss.item(), 4))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--bf16', action='store_true')
    p.add_argument('--peak', type=float, help='dense bfloat16 peak of the GPU in TF/s, where it is not known')
    p.add_argument('--out', type=Path, default=RESULTS)
    o = p.parse_args()
    torch.set_num_threads(o.threads)
    if o.device == 'cuda' and not torch.cuda.is_available(): raise SystemExit('no CUDA device here')
    counted = operations()
    for k, v in counted.items(): print(f'{k:10s} {v/1025e6:8.1f} MF per token, {v/1e9:8.1f} GF per sample')
    add_line(o.out, 'dit', forward_mflop_per_token={k: round(v/1025e6, 1) for k, v in counted.items()},
             forward_gflop_per_sample={k: round(v/1e9, 1) for k, v in counted.items()}, **(on_gpu(o) if o.device == 'cuda' else on_cpu(o)))


if __name__ == '__main__':
    main()
