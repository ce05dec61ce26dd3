"""Time one training step of the denoiser against a plain equivalent of the original's, in one session: fp32 and bf16.

The equivalent is written from the description of the original: experts chosen by boolean masks, keys and values of the condition projected where they
are used, AdamW, clipping, no compilation. It has the same parameters under the same names, and its output and gradients are checked against memkit's before
anything is timed. A step is forward, backward, clipping and AdamW on a prepared batch; memkit's runs through the training loop (memkit.train), with its checks.
Each way has a process of its own, as its user would run it: in a shared one the heap that one way leaves behind decides what memory costs the other. They take turns.

usage: bench_train_step.py [--hidden 256] [--depth 6] [--tokens 256] [--batch 8] [--repeat 9] [--warm 3] [--repeat-bf16 5] [--threads 2] [--out FILE]
A processor without bf16 instructions (AVX-512 BF16, AMX) emulates them, ten to twenty times slower than fp32: the record says which it has.
Prints a table and appends one JSON line to benchmarks/results.jsonl."""
import argparse
import itertools
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from memkit.denoiser import Denoiser, denoiser_loss
from memkit.dit import DiT
from memkit.flow import draw_path
from memkit.runs import TrainConfig, kept_memory
from memkit.train import Trainer

from record import RESULTS, add_line


class Attention(nn.Module):
    "Projections, per-head RMSNorm, softmax attention."
    def __init__(self, d, heads, source):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.out_proj = nn.Linear(d, d), nn.Linear(source, d), nn.Linear(source, d), nn.Linear(d, d)
        self.q_norm, self.k_norm = nn.RMSNorm(d//heads, eps=1e-6), nn.RMSNorm(d//heads, eps=1e-6)
    def forward(self, x, context):
        q, k, v = (f(y).unflatten(2, (self.heads, -1)) for f, y in ((self.to_q, x), (self.to_k, context), (self.to_v, context)))
        q, k = (F.rms_norm(y.float(), n.normalized_shape, n.weight, n.eps).to(v.dtype) for y, n in ((q, self.q_norm), (k, self.k_norm)))
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Expert(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.net = nn.ModuleList([nn.ModuleDict(dict(proj=nn.Linear(d, 4*d))), nn.GELU(), nn.Linear(4*d, d)])
    def forward(self, x): return self.net[2](F.gelu(self.net[0]['proj'](x)))


class Balance(torch.autograd.Function):
    "Passes `y` through and gives the balancing term a gradient of one."
    @staticmethod
    def forward(ctx, y, term): ctx.like = term; return y
    @staticmethod
    def backward(ctx, g): return g, torch.ones_like(ctx.like)


class MaskedMoE(nn.Module):
    "Experts one after the other, each on the rows that a boolean mask selects."
    def __init__(self, d, n=4, k=2):
        super().__init__()
        self.k, self.gate = k, nn.Linear(d, n, bias=False)
        self.experts, self.shared_experts = nn.ModuleList(Expert(d) for _ in range(n)), Expert(d)
    def forward(self, x):
        flat = x.flatten(0, 1)
        s = self.gate(flat).softmax(-1)
        weight, chosen = s.topk(self.k, -1)
        rows, flat_chosen = flat.repeat_interleave(self.k, 0), chosen.flatten()
        y = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            mask = flat_chosen == i
            y[mask] = expert(rows[mask]).to(y.dtype)
        y = (y.view(len(flat), self.k, -1)*weight[..., None]).sum(1)
        share = F.one_hot(flat_chosen, len(self.experts)).float().mean(0)
        term = 0.01*len(self.experts)*(s.float().mean(0)*share).sum()
        return (Balance.apply(y, term) + self.shared_experts(flat)).view_as(x)


class FeedForward(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d, 4*d), nn.Linear(4*d, d)
    def forward(self, x): return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, d, heads, context_dim, skip, ff):
        super().__init__()
        for i in (1, 2, 3): setattr(self, f'norm{i}', nn.LayerNorm(d, eps=1e-6))
        self.attn1, self.attn2, self.ff = Attention(d, heads, d), Attention(d, heads, context_dim), ff
        if skip: self.skip_norm, self.skip_linear = nn.LayerNorm(d, eps=1e-6), nn.Linear(2*d, d)
    def forward(self, x, context, skip=None):
        if skip is not None: x = self.skip_norm(self.skip_linear(torch.cat([skip, x], -1)))
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Plain(nn.Module):
    "The transformer as described, without any of memkit's shortcuts."
    def __init__(self, in_channels, hidden_size, depth, num_heads, context_dim, num_moe_layers):
        super().__init__()
        d = hidden_size
        self.x_embedder = nn.Linear(in_channels, d)
        self.t_embedder = nn.ModuleDict(dict(mlp=nn.Sequential(nn.Linear(d, 4*d), nn.GELU(), nn.Linear(4*d, d))))
        self.blocks = nn.ModuleList(Block(d, num_heads, context_dim, i >= depth//2, MaskedMoE(d) if i >= depth - num_moe_layers else FeedForward(d)) for i in range(depth))
        self.final_layer = nn.ModuleDict(dict(norm_final=nn.LayerNorm(d, eps=1e-6), linear=nn.Linear(d, in_channels)))
    def forward(self, x, t, context):
        d = self.x_embedder.out_features
        angle = t[:, None]*torch.exp(-np.log(10000)*torch.arange(d//2)/(d//2))
        token = self.t_embedder['mlp'](torch.cat([angle.sin(), angle.cos()], 1))
        x, stack = torch.cat([token[:, None], self.x_embedder(x)], 1), []
        for i, block in enumerate(self.blocks):
            x = block(x, context, stack.pop() if i >= len(self.blocks)//2 else None)
            if i < len(self.blocks)//2: stack.append(x)
        return self.final_layer['linear'](self.final_layer['norm_final'](x))[:, 1:]


class Context(nn.Module):
    "Hands a prepared context on: the place of a frozen text encoder."
    def forward(self, context, drop=None): return context


def plain_loss(model, batch):
    t, x_0 = draw_path(batch['seed'], batch['x_1'].shape[1:])
    x_1, w = batch['x_1'], t[:, None, None]
    return (model(w*x_1 + (1 - w)*x_0, t, batch['condition']).float() - (x_1 - x_0)).square().mean()


def plain_steps(model, batch, bf16):
    "The original's loop, reduced to what computes."
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.01)
    while True:
        optimizer.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=bf16): loss = plain_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        yield loss.item()


def memkit_steps(dit, batch, bf16, folder):
    "memkit's loop on one batch."
    config = TrainConfig(batch_size=len(batch['x_1']), precision='bf16' if bf16 else 'no', tensorboard=False)
    trainer = Trainer(Denoiser(dit, Context()), lambda m, b: denoiser_loss(m, b, p_uncond=0.), range(1), config, folder)
    trainer.wrap()
    trainer.model.train()
    with kept_memory():
        while True: yield trainer.advance(itertools.repeat(batch))['loss']


def prepared(o):
    "Options, first weights and the batch: the same in every process."
    torch.set_num_threads(o.threads)
    torch.manual_seed(0)
    options = dict(in_channels=32, hidden_size=o.hidden, depth=o.depth, num_heads=o.heads, context_dim=512, num_moe_layers=o.depth//2)
    return options, DiT(**options).state_dict(), dict(x_1=torch.randn(o.batch, o.tokens, 32), condition=torch.randn(o.batch, o.context, 512), seed=torch.arange(o.batch))


def fresh(kind, options, weights):
    model = kind(**options)
    model.load_state_dict(weights)
    return model


def work(pipe, o, kind, home):
    "The process of one way: a step at each request; answers wall seconds, CPU seconds of user and system, page faults."
    options, weights, batch = prepared(o)
    bf16 = kind.endswith('bf16')
    steps = plain_steps(fresh(Plain, options, weights).train(), batch, bf16) if kind.startswith('plain') else memkit_steps(fresh(DiT, options, weights), batch, bf16, home)
    while pipe.recv():
        wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        next(steps)
        wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_SELF)
        pipe.send((wall, *(getattr(after, k) - getattr(before, k) for k in ('ru_utime', 'ru_stime', 'ru_minflt'))))


def same_results(o):
    "Losses and gradients of both ways agree; the floating-point operations of a step."
    options, weights, batch = prepared(o)
    ours, theirs = fresh(DiT, options, weights), fresh(Plain, options, weights)
    a = denoiser_loss(Denoiser(ours, Context()).train(), batch, p_uncond=0.)
    with FlopCounterMode(display=False) as counter:
        b = plain_loss(theirs.train(), batch)
        b.backward()
    a.backward()
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters(): torch.testing.assert_close(p.grad, grads[name], rtol=1e-3, atol=1e-5, msg=lambda m: f'{name}: {m}')
    return counter.get_total_flops(), sum(v.numel() for v in weights.values())


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in dict(hidden=256, depth=6, heads=4, tokens=256, batch=8, context=77, repeat=9, warm=3, repeat_bf16=5, threads=2).items(): p.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    p.add_argument('--out', type=Path, default=RESULTS)
    o = p.parse_args()
    flops, numbers = same_results(o)
    spawn, kinds = multiprocessing.get_context('spawn'), ['plain fp32', 'memkit fp32', 'plain bf16', 'memkit bf16']
    kinds = kinds[:4 if o.repeat_bf16 else 2]
    clocks = {k: [] for k in kinds}
    with tempfile.TemporaryDirectory() as home:
        pipes, processes = {}, []
        for k in kinds:
            pipes[k], theirs = spawn.Pipe()
            processes.append(spawn.Process(target=work, args=(theirs, o, k, Path(home)/k), daemon=True))
            processes[-1].start()
        for i in range(o.warm + o.repeat):
            for k, pipe in pipes.items():
                if 'bf16' in k and i >= o.warm + o.repeat_bf16: continue
                pipe.send(True)
                clock = pipe.recv()
                if i >= o.warm: clocks[k].append(clock)
        for pipe in pipes.values(): pipe.send(False)
        for process in processes: process.join()
    clocks = {k: np.array(v) for k, v in clocks.items()}
    clocks = {k: np.column_stack([v[:, 0], v[:, 1] + v[:, 2], v[:, 2:]]) for k, v in clocks.items()}
    seconds = {k: dict(best_wall=round(float(v[:, 0].min()), 3), median_wall=round(float(np.median(v[:, 0])), 3), best_cpu=round(float(v[:, 1].min()), 3), median_system=round(float(np.median(v[:, 2])), 3),
                       median_faults=int(np.median(v[:, 3])), steps_per_s=round(1/float(v[:, 0].min()), 3), gflop_per_s=round(flops/float(v[:, 0].min())/1e9, 1)) for k, v in clocks.items()}
    ratio = {kind: {w: [round(float(x), 2) for x in np.percentile(clocks[f'plain {kind}'][:, i]/clocks[f'memkit {kind}'][:, i], (50, 25, 75))] for i, w in enumerate(('wall', 'cpu'))}
             for kind in ('fp32', 'bf16')[:len(kinds)//2]}
    print(f'{numbers:,} parameters, {flops/1e9:.0f} GFLOP a step, {o.repeat} rounds, {o.threads} threads, load {os.getloadavg()[0]:.1f}')
    for k, v in seconds.items(): print(f"{k:12s} {v['best_wall']:7.3f} s wall (median {v['median_wall']:.3f}) {v['best_cpu']:7.3f} s CPU, {v['median_system']:.3f} of them in the system, {v['median_faults']:,} page faults   {v['steps_per_s']:.2f} steps/s   {v['gflop_per_s']:.0f} GFLOP/s")
    for k, v in ratio.items(): print(f"plain / memkit {k}: wall {v['wall'][0]} ({v['wall'][1]} to {v['wall'][2]}), CPU {v['cpu'][0]} ({v['cpu'][1]} to {v['cpu'][2]})")
    flags = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').exists() else ''
    add_line(o.out, 'train_step', bf16_instructions=[k for k in ('avx512_bf16', 'amx_bf16') if k in flags], hidden=o.hidden, depth=o.depth, tokens=o.tokens, batch=o.batch, context=o.context, repeat=o.repeat, threads=o.threads,
             gflop_per_step=round(flops/1e9, 1), seconds=seconds, ratios_median_quartiles=ratio)


if __name__ == '__main__':
    main()
