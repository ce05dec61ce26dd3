"""The training loop against what happens to processes: kill -9, SIGTERM, a full disk, two ranks, hostile files."""
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('accelerate')
from torch import nn

from memkit.core import InputError, write_json, sha256_of
from memkit.runs import TrainConfig, checkpoints, load_checkpoint, lr_factor, read_metrics
from memkit.train import TrainingError, train

STEPS = 60


@pytest.fixture(autouse=True)
def one_thread():
    "Sums in one order: the runs compared here are equal to the last bit, also with another process."
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


class Blobs:
    "40 points on a circle, moved a little at each visit; the target is their angle as a vector."
    def __len__(self): return 40
    def sample(self, i, seed):
        angle = torch.tensor(2*np.pi*i/40)
        noise = torch.randn(2, generator=torch.Generator().manual_seed(seed))
        return dict(x=torch.stack([angle.cos(), angle.sin()]) + 0.1*noise, y=torch.stack([(2*angle).cos(), (2*angle).sin()]))


class Net(nn.Module):
    "With dropout, whose mask comes from torch's global generator, and a layer that no step uses."
    def __init__(self, p=0.2):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b, self.idle, self.p = nn.Linear(2, 24), nn.Linear(24, 2), nn.Linear(3, 3), p
    def forward(self, x): return self.b(nn.functional.dropout(torch.tanh(self.a(x)), self.p, self.training))


def loss(model, batch):
    "Error of the prediction, weighted by a number drawn from the sample's seed."
    weight = torch.stack([torch.rand((), generator=torch.Generator().manual_seed(int(s))) for s in batch['seed']])
    return (weight[:, None]*(model(batch['x']) - batch['y']).square()).mean()


def config(**changes):
    return TrainConfig(**dict(steps=STEPS, batch_size=8, lr=2e-2, warmup=5, save_every=10, log_every=1, tensorboard=False) | changes)


def run(out, c=None, f=loss, net=None, **options):
    return train(net or Net(), f, Blobs(), c or config(), out, verbose=False, groups=[dict(match='b.', lr_scale=0.5, weight_decay=0.05)], **options)


def same_bits(a, b): return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def at_visit(n, do):
    "The loss, with `do` at its n-th call."
    calls = itertools.count(1)
    def f(model, batch):
        if next(calls) == n: do()
        return loss(model, batch)
    return f


def stop(): raise KeyboardInterrupt


WORKER = '''
import sys, time, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_train as t
torch.set_num_threads(1)
out, mark, at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
def f(model, batch):
    if mark.exists(): time.sleep(0.05)
    elif next(calls) == at: mark.touch(); time.sleep(float(sys.argv[4]))
    return t.loss(model, batch)
calls = t.itertools.count(1)
print('steps', t.run(out, f=f).step)
'''


def start(tmp_path, name, at, pause):
    "A process that trains; returns it once it has reached its `at`-th step."
    script = tmp_path/'worker.py'
    script.write_text(WORKER.format(tests=os.path.dirname(__file__)))
    mark = tmp_path/name
    p = subprocess.Popen([sys.executable, script, tmp_path/'run', mark, str(at), str(pause)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(1200):
        if mark.exists(): return p
        if p.poll() is not None: raise AssertionError(p.communicate())
        time.sleep(0.1)
    raise AssertionError('the process never came to its step')


def test_killed_then_asked_to_stop_then_finished_equals_a_run_without_a_break(tmp_path):
    whole = run(tmp_path/'whole')
    killed = start(tmp_path, 'killed', at=35, pause=600)       # in the middle of step 35
    killed.send_signal(signal.SIGKILL); killed.communicate()
    assert checkpoints(tmp_path/'run')[-1].name == 'step_0000030' and read_metrics(tmp_path/'run')[-1]['step'] == 34
    with open(tmp_path/'run'/'metrics.jsonl', 'a') as f: f.write('{"step": 35, "lo')   # a line cut short

    asked = start(tmp_path, 'asked', at=8, pause=0)             # resumed: its 8th step is step 38
    asked.send_signal(signal.SIGTERM)
    out, err = asked.communicate(timeout=120)
    assert asked.returncode == 0, err
    at = int(out.split()[-1])
    assert 38 <= at < STEPS and checkpoints(tmp_path/'run')[-1].name == f'step_{at:07d}'

    resumed = run(tmp_path/'run')
    assert resumed.finished and resumed.step == STEPS
    a, b = load_checkpoint(tmp_path/'whole'), load_checkpoint(tmp_path/'run')
    assert a.step == b.step == STEPS and same_bits(a.model, b.model)
    lines = [json.loads(x) for x in (tmp_path/'run'/'metrics.jsonl').read_text().splitlines()]
    assert [x['step'] for x in lines] == list(range(1, STEPS + 1))
    assert [(x['loss'], x['grad_norm'], x['lr']) for x in lines] == [(x['loss'], x['grad_norm'], x['lr']) for x in whole.history]
    assert not [p for p in (tmp_path/'run'/'checkpoints').iterdir() if p.name.startswith('.')]


@pytest.mark.parametrize('changes', [dict(ema=0.9, accumulate=2, log_every=7, valid_every=20), dict(optimizer='muon'), dict(precision='bf16', schedule='constant', clip=0.)])
def test_other_settings_resume_exactly_too(tmp_path, changes):
    c = config(steps=30, **changes)
    whole = run(tmp_path/'whole', c, valid=Blobs())
    with pytest.raises(KeyboardInterrupt): run(tmp_path/'cut', c, f=at_visit(27*c.accumulate, stop), valid=Blobs())
    cut = run(tmp_path/'cut', c, net=Net(), valid=Blobs())
    a, b = load_checkpoint(tmp_path/'whole'), load_checkpoint(tmp_path/'cut')
    assert same_bits(a.model, b.model) and (not c.ema or same_bits(a.ema, b.ema) and not same_bits(a.ema, a.model))
    keep = lambda r: [{k: v for k, v in x.items() if k not in ('seconds', 'valid_loss')} for x in r.history]
    assert keep(whole) == keep(cut)
    if c.valid_every: assert whole.history[-1]['valid_loss'] == cut.history[-1]['valid_loss']


def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys):
    whole = run(tmp_path/'whole', config(steps=30))
    with pytest.raises(KeyboardInterrupt): run(tmp_path/'run', config(steps=30), f=at_visit(25, stop))
    file = tmp_path/'run'/'checkpoints'/'step_0000020'/'training.pt'
    file.write_bytes(file.read_bytes()[:-100])
    resumed = run(tmp_path/'run', config(steps=30))
    assert 'step_0000020: training.pt is not the file that was written' in capsys.readouterr().out
    assert resumed.curve().tolist() == whole.curve().tolist()
    assert same_bits(load_checkpoint(tmp_path/'whole').model, load_checkpoint(tmp_path/'run').model)


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Hostile:
        def __reduce__(self): return (os.mkdir, (str(tmp_path/'owned'),))
    run(tmp_path/'run', config(steps=10))
    folder = checkpoints(tmp_path/'run')[-1]
    for name in ('training.pt', 'extra.pt'):
        sound = (folder/name).read_bytes(), (folder/'state.json').read_bytes()
        torch.save(dict(optimizer=Hostile(), rng=[]), folder/name)
        state = json.loads((folder/'state.json').read_text())
        state['files'][name] = sha256_of(folder/name)
        write_json(folder/'state.json', state)
        with pytest.raises(pickle.UnpicklingError): run(tmp_path/'run', config(steps=10))
        (folder/name).write_bytes(sound[0]); (folder/'state.json').write_bytes(sound[1])
    assert not (tmp_path/'owned').exists()


def test_nan_stops_and_the_last_sound_checkpoint_goes_on(tmp_path):
    c = config(steps=30)
    poisoned = lambda model, batch: loss(model, batch)*(float('inf') if next(calls) == 17 else 1.)
    calls = itertools.count(1)
    with pytest.raises(TrainingError, match=r'step 17: loss is inf; .*last sound checkpoint: step_0000010.*lower lr than 0.02'): run(tmp_path/'run', c, f=poisoned)
    assert [p.name for p in checkpoints(tmp_path/'run')] == ['step_0000010'] and read_metrics(tmp_path/'run')[-1]['step'] == 16
    assert all(torch.isfinite(v).all() for v in load_checkpoint(tmp_path/'run').model.values())
    run(tmp_path/'run', c); run(tmp_path/'whole', c)
    assert same_bits(load_checkpoint(tmp_path/'whole').model, load_checkpoint(tmp_path/'run').model)


def test_another_configuration_is_refused_and_what_may_change_may(tmp_path):
    run(tmp_path/'run', config(steps=10), settings=dict(dit=dict(depth=2)))
    for c, settings, text in ((config(steps=20), dict(dit=dict(depth=2)), 'train.steps: 10 then, 20 now'), (config(steps=10), dict(dit=dict(depth=3)), 'dit.depth: 2 then, 3 now')):
        with pytest.raises(InputError, match=text): run(tmp_path/'run', c, settings=settings)
    assert run(tmp_path/'run', config(steps=10, log_every=3, keep_last=1, accumulate=4), settings=dict(dit=dict(depth=2))).finished


def test_workers_and_tensorboard_change_no_number(tmp_path):
    plain = run(tmp_path/'plain', config(steps=8))
    worked = run(tmp_path/'worked', config(steps=8, loader_workers=2, tensorboard=True))
    assert plain.curve().tolist() == worked.curve().tolist()
    events, = (tmp_path/'worked'/'tb').iterdir()
    assert b'grad_norm' in events.read_bytes()


def test_the_caller_keeps_model_and_generator(tmp_path):
    net, state, keys = Net(), torch.get_rng_state(), None
    keys = set(net.__dict__)
    run(tmp_path/'run', config(steps=3, precision='bf16'), net=net, sample=lambda model, step: torch.rand(3) and None)
    assert torch.equal(torch.get_rng_state(), state) and set(net.__dict__) == keys and net(torch.zeros(1, 2)).dtype == torch.float32
    assert same_bits(net.state_dict(), load_checkpoint(tmp_path/'run').model)


def test_learning_rate_is_that_of_the_released_configurations(data):
    reference = json.loads((data/'model_lr.json').read_text())
    ours = [lr_factor(n, reference['steps']) for n in reference['step']]
    np.testing.assert_allclose(ours, reference['factor'], rtol=1e-6)


TWO = '''
import os, sys, torch
sys.path.insert(0, {tests!r})
import test_train as t
torch.set_num_threads(1)
out, calls = sys.argv[1], t.itertools.count(1)
c = t.config(steps=24, accumulate=2, ema=0.9, valid_every=12, save_every=8)
go = lambda name, f=t.loss: t.run(f'{{out}}/{{name}}', c, f=f, net=t.Net(p=0.), valid=t.Blobs())
go('ddp')
os.environ['ACCELERATE_USE_FSDP'] = 'true'
try: go('fsdp', t.at_visit(2*20, t.stop))
except KeyboardInterrupt: pass
r = go('fsdp')
print(os.environ['RANK'], type(r).__name__, r.step, len(r.history))
'''


def test_two_processes_see_the_losses_of_one(tmp_path):
    "DDP, and FSDP with a break in the middle: gloo, two ranks, the same global batch."
    script = tmp_path/'two.py'
    script.write_text(TWO.format(tests=os.path.dirname(__file__)))
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(script), str(tmp_path)]   # what accelerate launches
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr[-3000:]
    c = config(steps=24, accumulate=2, ema=0.9, valid_every=12, save_every=8)
    one = run(tmp_path/'one', c, net=Net(p=0.), valid=Blobs())
    a = load_checkpoint(tmp_path/'one')
    for name in ('ddp', 'fsdp'):
        lines = read_metrics(tmp_path/name)
        assert [x['step'] for x in lines] == list(range(1, 25))
        for key in ('loss', 'grad_norm', 'valid_loss'):
            np.testing.assert_allclose([x[key] for x in lines if key in x], [x[key] for x in one.history if key in x], rtol=0, atol=1e-6)
        b = load_checkpoint(tmp_path/name)
        for k in a.model: torch.testing.assert_close((b.model[k], b.ema[k]), (a.model[k], a.ema[k]), rtol=0, atol=2e-6)
    with open(tmp_path/'ddp'/'config.json') as f: assert json.load(f)['provenance']['processes'] == 2
    assert run(tmp_path/'fsdp', c, net=Net(p=0.), valid=Blobs()).finished       # a sharded run is readable by one process
