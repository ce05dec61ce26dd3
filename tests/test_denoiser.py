"""From latents to a model folder: recipes against the released table, resume, conditions of every kind, what the run folder holds."""
import itertools
import json

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('diffusers')

from memkit.conditions import make_conditioner
from memkit.core import InputError
from memkit.denoiser import RECIPES, LatentPairs, denoiser_loss, export_model, make_denoiser, make_recipe, shape_conditions, train_denoiser
from memkit.dit import DiT
from memkit.generate import ShapePipeline
from memkit.runs import TrainConfig, checkpoints, load_checkpoint, read_metrics
from memkit.vecset import VecSet


pytestmark = pytest.mark.usefixtures('one_thread')


class Toy:
    "Twelve latent sets of two classes with captions."
    labels, captions, z_scale = ['mug', 'chair']*6, dict(sentence=[f'a {c} number {i}' for i, c in enumerate(['mug', 'chair']*6)]), 0.5
    ids = [f's{i}' for i in range(12)]
    def __len__(self): return 12
    def sample(self, i, seed): return dict(x_1=torch.randn(4, 8, generator=torch.Generator().manual_seed(i)), index=torch.tensor(i))


def toy(**train):
    return make_recipe('copying', dit=dict(hidden_size=32, depth=2, num_heads=2), condition=dict(kind='class', dim=8),
                       train=dict(dict(steps=20, batch_size=4, lr=1e-2, warmup=5, save_every=5, log_every=1, sample_every=0, tensorboard=False), **train))


def go(out, recipe=None, conditioner=None, **more): return train_denoiser(Toy(), conditioner, out, recipe or toy(), verbose=False, **more)


# specs: width, depth, heads, experts in the last blocks, accumulation, validation, condition, parameters of the released transformer
RELEASED = dict(small=(512, 12, 3, 1, 19_999, 'text', 80_941_600), baseline=(1024, 12, 3, 2, 4999, 'text', 310_780_960), lvis16=(1024, 12, 3, 2, 4999, 'class', 310_780_960),
                image=(1024, 12, 3, 2, 2999, 'image', 310_780_960), large=(2048, 16, 3, 2, 1099, 'text', 1_477_369_888), imagegen=(1024, 12, 3, 2, 4999, 'text', 310_748_176))


@pytest.mark.parametrize('name', RELEASED)
def test_released_recipes(name):
    r, (width, depth, moe, accumulate, every, kind, parameters) = make_recipe(name), RELEASED[name]
    with torch.device('meta'): dit = DiT(**r['dit'])
    assert sum(p.numel() for p in dit.parameters()) == parameters
    assert (r['dit']['hidden_size'], r['dit']['depth'], r['dit']['num_moe_layers'], r['dit']['num_heads'], r['dit']['context_dim']) == (width, depth, moe, 16, 512)
    c = TrainConfig(**r['train'])
    assert (c.steps, c.batch_size, c.accumulate, c.valid_every, c.valid_batches, c.sample_every) == (500_000, 512, accumulate, every, 4, 5000)
    assert (c.lr, c.warmup, c.schedule, c.betas, c.eps, c.weight_decay, c.clip, c.precision, c.ema, c.compile) == (1e-4, 500, 'cosine', (.9, .99), 1e-6, .01, 1., 'bf16', 0., True)
    assert (r['condition']['kind'], r['p_uncond'], r['max_shapes']) == (kind, 0.1, 51_200)
    assert r['groups'] == ([dict(match='conditioner.', lr_scale=0.1, weight_decay=0.05)] if name == 'lvis16' else [])


def test_micro_batches_leave_the_weight_of_the_balancing_gradient(tmp_path):
    "The gradient of one step with a balancing weight that drowns the rest: the same in one, two and four micro-batches, up to the shares of experts, which are counted in each."
    def norm(accumulate):
        recipe = toy(steps=1, batch_size=8, clip=0., accumulate=accumulate)
        return go(tmp_path/str(accumulate), recipe | dict(dit=recipe['dit'] | dict(num_moe_layers=1, balance=1e4))).history[0]['grad_norm']
    once = norm(1)
    assert once > 100 and all(.8 < norm(n)/once < 1.25 for n in (2, 4))
    assert {n: make_recipe(n)['dit']['balance'] for n in ('small', 'baseline')} == dict(small=.01, baseline=.02)   # as the released loop adds them up


def test_a_recipe_is_not_changed_by_its_use():
    before = json.dumps(RECIPES)
    make_recipe('lvis16', dit=dict(depth=2), train=dict(steps=1))['groups'].append('x')
    assert json.dumps(RECIPES) == before


def test_conditions_are_dropped_by_seed_and_only_in_training():
    told = []
    class Spy(torch.nn.Module):
        def forward(self, x, t, condition=None, drop=None): told.append(drop); return x
    batch = dict(x_1=torch.zeros(400, 4, 8), seed=torch.arange(400), condition=torch.zeros(400, dtype=torch.int64))
    spy = Spy().train()
    denoiser_loss(spy, batch); denoiser_loss(spy, batch); denoiser_loss(spy.eval(), batch)
    assert torch.equal(told[0], told[1]) and 20 <= int(told[0].sum()) <= 60 and told[2] is None
    one = denoiser_loss(spy, {k: v[7:8] for k, v in batch.items()})
    assert torch.equal(one, denoiser_loss(spy, {k: v[7:8].clone() for k, v in batch.items()})) and not torch.equal(one, denoiser_loss(spy, {k: v[8:9] for k, v in batch.items()}))


@pytest.mark.parametrize('condition', ['none', dict(kind='class', dim=8), dict(kind='bytes', dim=8, width=16, depth=1, heads=2, max_bytes=64)])
def test_a_run_becomes_a_model_that_generates(tmp_path, condition):
    vecset = VecSet(dim=32, depth=1, num_latents=4, latent_dim=8, num_inputs=32, dim_head=16)
    result = go(tmp_path/'run', toy(steps=4, ema=0.5), condition, vecset=vecset, valid=Toy())
    assert result.finished and 'valid_loss' not in result.history[0]
    p = ShapePipeline.from_pretrained(tmp_path/'run')
    assert (p.config.z_scale, p.config.n_tokens, p.dit.config.in_channels) == (0.5, 4, 8)
    averaged = load_checkpoint(tmp_path/'run').ema
    assert all(torch.equal(v, averaged[f'dit.{k}']) for k, v in p.dit.state_dict().items())
    if p.conditioner is not None:
        assert all(torch.equal(v, averaged[f'conditioner.{k}']) for k, v in p.conditioner.state_dict().items())
    given = dict(none=[None, None], bytes=['a mug', 'a chair'])[condition if isinstance(condition, str) else 'bytes'] if condition == 'none' or condition['kind'] == 'bytes' else ['mug', 'chair']
    out = p(given if p.conditioner is not None else None, [0, 1], output='latents', n_steps=3, guidance_scale=2.)
    assert out.latents.shape == (2, 4, 8) and torch.isfinite(out.latents).all()
    assert {k: torch.equal(v, vecset.state_dict()[k]) for k, v in p.vecset.state_dict().items()} == dict.fromkeys(vecset.state_dict(), True)


def test_a_broken_run_resumes_to_the_same_model(tmp_path, monkeypatch):
    import memkit.denoiser as m
    whole = go(tmp_path/'whole')
    calls, loss = itertools.count(1), m.denoiser_loss
    def cut(*a, **k):
        if next(calls) == 13: raise KeyboardInterrupt
        return loss(*a, **k)
    monkeypatch.setattr(m, 'denoiser_loss', cut)
    with pytest.raises(KeyboardInterrupt): go(tmp_path/'run')
    assert not (tmp_path/'run'/'model_index.json').exists() and checkpoints(tmp_path/'run')[-1].name == 'step_0000010'
    monkeypatch.setattr(m, 'denoiser_loss', loss)
    again = go(tmp_path/'run')
    assert whole.curve().tolist() == again.curve().tolist() and [r['step'] for r in read_metrics(tmp_path/'run')] == list(range(1, 21))
    a, b = (ShapePipeline.from_pretrained(tmp_path/n).fingerprint() for n in ('whole', 'run'))
    assert a == b


def test_what_a_run_was_made_of_is_compared(tmp_path):
    go(tmp_path/'run', toy(steps=2))
    class Other(Toy): ids = [f't{i}' for i in range(12)]
    with pytest.raises(InputError, match='latents.ids'): train_denoiser(Other(), None, tmp_path/'run', toy(steps=2), verbose=False)
    with pytest.raises(InputError, match='condition'): go(tmp_path/'run', toy(steps=2), 'none')
    with pytest.raises(InputError, match='p_uncond: 0.1 then, 0.5 now'): go(tmp_path/'run', toy(steps=2) | dict(p_uncond=0.5))
    merged = json.loads((tmp_path/'run'/'config.json').read_text())
    assert merged['condition']['names'] == ['chair', 'mug'] and merged['latents']['z_scale'] == 0.5 and merged['dit']['hidden_size'] == 32


def test_class_table_learns_at_its_own_rate(tmp_path):
    recipe = toy(steps=1, warmup=0, weight_decay=0., clip=0.) | dict(groups=[dict(match='conditioner.', lr_scale=0.1, weight_decay=0.)], p_uncond=0.)
    first = make_denoiser(recipe, 8, labels=Toy.labels, seed=0)
    go(tmp_path/'run', recipe)
    after = load_checkpoint(tmp_path/'run').model
    step = lambda name: (after[name] - first.state_dict()[name]).abs().max().item()
    table = 'conditioner.embedder.embedding.weight'
    assert np.isclose(step(table), 1e-3, rtol=0.02) and np.isclose(step('dit.final_layer.linear.bias'), 1e-2, rtol=0.02)
    assert torch.equal(after[table][2], first.state_dict()[table][2])      # the null row: no sample lost its class


def test_limits_of_a_recipe(tmp_path):
    with pytest.raises(InputError, match='12 latents with 0 captions'): LatentPairs(Toy(), c := make_conditioner(dict(kind='bytes', dim=8, width=16)), shape_conditions(Toy(), c, 'paragraph'))
    with pytest.raises(InputError, match='not a run of train_denoiser'):
        from memkit.train import train
        train(torch.nn.Linear(8, 8), lambda m, b: m(b['x_1']).mean(), Toy(), TrainConfig(steps=1, batch_size=4, tensorboard=False), tmp_path/'other', verbose=False)
        export_model(tmp_path/'other')
