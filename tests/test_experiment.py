"""Experiments: planted truth at the level of records, and runs that are killed."""
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('torch')
pytest.importorskip('diffusers')

from memkit.core import InputError, Profile, load_profile
from memkit.experiment import experiment_records, notebook_steps, preset_step, record_pairs, run_experiment
from memkit.lfd import lfd_descriptor
from memkit.presets import EXPERIMENTS, base_preset, experiment_rows
from memkit.retrieval import nearest
from memkit.runs import newest_checkpoint
from memkit.shapes import replicate, shape_set
from memkit.stages import distance_record
from memkit.steps import Step, all_steps, run_step, step_done, step_summary

ROOT = Path(__file__).resolve().parents[1]
TOY = dict(load_profile('smoke').values, train_shapes=4, n_test=4, n_gen=3, steps=8, batch_size=4, hidden=16, ae_shapes=6, ae_steps=12, cells=12, draw_steps=3, rows=2, bits_of=16)

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def pool():
    "Descriptors of 264 shapes, and of the same shapes with noise on their vertices."
    meshes = [s.mesh(24) for s in shape_set(264, seed=3)]
    copies = [replicate(*m, 'noise', 'sigma 0.5%', seed=i) for i, m in enumerate(meshes)]
    return tuple(np.stack([lfd_descriptor(*m) for m in x]) for x in (meshes, copies))


def records(pool, seed):
    "One draw of 64 training, 100 held-out and 100 generated shapes: an honest generator's record and a copier's."
    shapes, copies = pool
    order = np.random.default_rng(seed).permutation(264)
    train, test, fresh = order[:64], order[64:164], order[164:]
    copied = copies[train[np.random.default_rng(seed + 1000).integers(64, size=100)]]
    d_test = nearest(shapes[test], shapes[train], n_jobs=1)[1][:, 0]
    ids = list(map(str, range(100)))
    return [distance_record(nearest(x, shapes[train], n_jobs=1)[1][:, 0], d_test, ids, ids, 64) for x in (shapes[fresh], copied)]


def test_planted_truth_over_100_seeds(pool):
    "A generator that draws fresh shapes is accused at most 5 times in 100, one that returns training shapes with noise every time."
    found = [records(pool, seed) for seed in range(100)]
    alarms = sum(honest['verdict'] == 'copying' for honest, _ in found)
    assert alarms <= 5
    assert all(copier['verdict'] == 'copying' and copier['auc'] > .9 for _, copier in found)
    assert abs(np.mean([honest['auc'] for honest, _ in found]) - .5) < .02


def test_records_carry_what_claims_and_expected_look_up():
    r = run_experiment(base_preset(Profile('toy', TOY)), Profile('toy', TOY), seed=1)
    wanted = {'row', 'x', 'seed', 'control', 'm', 'n', 'n_train', 'd_gen', 'd_test', 'gen_ids', 'test_ids', 'auc', 'auc_low', 'auc_high', 'z_u', 'z_u_low', 'z_u_high', 'min_detectable_auc', 'verdict',
              'verdict_text', 'fd', 'fd_label', 'kd', 'kd_se', 'empty', 'preset', 'protocol', 'data', 'loss', 'seconds', 'provenance'}
    assert wanted <= set(r) and r['seed'] == 1
    assert len(r['d_gen']) == r['m'] == len(r['gen_ids']) and len(r['d_test']) == r['n'] == len(r['test_ids'])
    assert json.loads(json.dumps(r)) == r
    gen, train, d = record_pairs(r)
    assert d == sorted(r['d_gen'])[:6] and len(gen) == len(train) == len(d)


def test_steps_depend_on_what_decides_them_and_on_nothing_else():
    p, other = Profile('toy', TOY), Profile('toy', dict(TOY, seeds=3, rows=9))
    base = base_preset(p)
    assert preset_step(base, p, 0) == preset_step(base, other, 0)
    for change in (dict(n_gen=5), dict(cells=16), dict(steps=9), dict(ae_steps=13), dict(n_test=5)):
        changed = Profile('toy', TOY | change)
        assert preset_step(base_preset(changed), changed, 0).key != preset_step(base, p, 0).key, change
    assert preset_step(base, p, 1).key != preset_step(base, p, 0).key


@pytest.mark.parametrize('profile', ['smoke', 'laptop', 'gpu'])
def test_every_experiment_has_a_plan(profile):
    for name in EXPERIMENTS:
        steps = notebook_steps(name, profile)
        assert len(steps) >= len(experiment_rows(name, load_profile(profile)))*load_profile(profile).seeds
        assert all(s.cost > 0 for s in all_steps(steps))


RUN = """
import json, sys
from memkit.core import Profile
from memkit.experiment import experiment_records
print(json.dumps(experiment_records('fig_training_time', Profile('toy', json.loads(sys.argv[1])))))
"""


def told(home, kill=None):
    "Run the toy experiment in a process of its own; killed after so many seconds, if it is still there."
    p = subprocess.Popen([sys.executable, '-c', RUN, json.dumps(TOY)], stdout=subprocess.PIPE, cwd=ROOT, env=os.environ | dict(MEMKIT_HOME=str(home), OMP_NUM_THREADS='1'))
    try: out = p.communicate(timeout=kill)[0]
    except subprocess.TimeoutExpired:
        os.kill(p.pid, signal.SIGKILL)
        p.communicate()
        return None
    assert p.returncode == 0
    same = json.loads(out)
    for r in same:
        for k in ('seconds', 'training_seconds', 'provenance'): r.pop(k)   # when and how fast, not what
    return same


def test_killed_and_run_again_equals_an_uninterrupted_run(tmp_path):
    began = time.time()
    whole = told(tmp_path/'whole')
    took, rng = time.time() - began, random.Random(0)
    for _ in range(4):
        if told(tmp_path/'killed', kill=took*rng.uniform(.3, .9)) is not None: break
    assert told(tmp_path/'killed') == whole


@pytest.mark.parametrize('name, params, source', [
    ('train_autoencoder', dict(shapes=6, steps=12, seed=0, device='cpu', judged=1), 'memkit.autoencoder.ShapeSamples'),
    ('train_picture_autoencoder', dict(shapes=6, steps=12, n_latents=16, seed=0), 'memkit.latents._Pixels')])
def test_a_training_that_is_asked_to_stop_is_not_taken_for_finished(tmp_path, monkeypatch, name, params, source):
    "SIGTERM ends a training with a checkpoint; the step that ran it must not go on with half-trained weights."
    step, calls = Step(f'memkit.stages:{name}', params), []
    module, _, kind = source.rpartition('.')
    kind = getattr(importlib.import_module(module), kind)
    def sample(self, i, seed, real=kind.sample):
        calls.append(i)
        if len(calls) == 100: os.kill(os.getpid(), signal.SIGTERM)
        return real(self, i, seed)
    with monkeypatch.context() as m:
        m.setenv('MEMKIT_HOME', str(tmp_path/'stopped'))
        m.setattr(kind, 'sample', sample)
        with pytest.raises(KeyboardInterrupt, match='stopped after step'): run_step(step)
        part = step.folder.with_name(f'{step.folder.name}.part')
        assert not step_done(step) and newest_checkpoint(part/'run') and '12' not in newest_checkpoint(part/'run').name
        curve = json.loads((run_step(step)/'curve.json').read_text())
    monkeypatch.setenv('MEMKIT_HOME', str(tmp_path/'whole'))
    assert [r['loss'] for r in json.loads((run_step(step)/'curve.json').read_text())] == [r['loss'] for r in curve]
