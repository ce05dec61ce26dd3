"The runner under everything that a night may bring: changes, faults, kills. Toy notebooks and steps in a checkout of their own."
import json, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]

TOY = '''
import json, os, time
from pathlib import Path
from memkit.steps import Step

FACTOR = 2
def note(word):
    with open(os.environ['TOY_CALLS'], 'a') as f: f.write(word + '\\n')
def data(out, n):
    note('data')
    (out/'data.json').write_text(json.dumps(list(range(n))))
def train(out, data, seed):
    "Eight short steps with a checkpoint after each, as a training has them."
    note(f'train {seed}')
    state = out/'state.json'
    step, x = json.loads(state.read_text()) if state.exists() else (0, seed)
    while step < 8:
        step, x = step + 1, (FACTOR*x + sum(json.loads((data/'data.json').read_text()))) % 9973
        time.sleep(float(os.environ.get('TOY_PACE', 0)))
        state.with_suffix('.tmp').write_text(json.dumps([step, x]))
        os.replace(state.with_suffix('.tmp'), state)
    return dict(x=x)
def measure(out, **models):
    note('measure')
    values = {k: json.loads((m/'state.json').read_text())[1] for k, m in sorted(models.items())}
    (out/'values.json').write_text(json.dumps(values))
    return values
def raises(out): raise FileNotFoundError(2, 'No such file or directory', 'meshes.csv')

def graph():
    shapes = Step('toy:data', dict(n=5), label='shapes')
    return Step('toy:measure', {}, {f'model_{s}': Step('toy:train', dict(seed=s), dict(data=shapes), label=f'training {s}', cost=3) for s in (1, 2)}, label='measures')
def inputs(name, profile):
    return dict(fig_models=[graph()], fig_hungry=[Step('toy:raises', label='no meshes')]).get(name, [])
'''
DRIVER = '''
import functools, os, pathlib, sys, types
import memkit.isolated, memkit.reproduce, toy
if not os.environ.get('TOY_REPORT'):   # the real one takes seconds to import
    def figure_folder(profile, root):
        (folder := pathlib.Path('figures', profile)).mkdir(parents=True, exist_ok=True)
        return folder
    sys.modules['memkit.report'] = types.SimpleNamespace(figure_folder=figure_folder, write_report=lambda profile, root: None)
memkit.reproduce.notebook_inputs = toy.inputs
memkit.isolated.Limits = functools.partial(memkit.isolated.Limits, stalled=4)
from memkit.cli import main
main(sys.argv[1:])
'''
SAVE = "import os, pathlib\nfolder = pathlib.Path(os.environ['MEMKIT_FIGURES'])/profile\n"
MODELS = SAVE + "import toy\nfrom memkit.steps import step_summary\nvalues = step_summary(toy.graph())\n(folder/'fig_models.csv').write_text(f'{values}')"
PLAIN = SAVE + "(folder/'fig_plain.csv').write_text('plain')"


class Checkout:
    "A checkout with toy notebooks, its cache, and the command."
    def __init__(self, root):
        self.root, self.figures, self.steps = root, root/'figures'/'smoke', root/'home'/'steps'
        (root/'nbs'/'paper').mkdir(parents=True)
        (root/'settings.ini').write_text('[smoke]\ndevice = cpu\n')
        shutil.copy(ROOT/'nbs'/'paper'/'expected.csv', root/'nbs'/'paper')   # the report at the end of a run quotes the paper
        (root/'toy.py').write_text(TOY)
        (root/'driver.py').write_text(DRIVER)
        self.env = os.environ | dict(MEMKIT_ROOT=str(root), MEMKIT_HOME=str(root/'home'), TOY_CALLS=str(root/'calls.txt'), OMP_NUM_THREADS='1')

    def notebook(self, name, source):
        cells = [dict(cell_type='code', id=f'cell-{i}', metadata=dict(tags=['parameters']*(i == 0)), source=s, outputs=[], execution_count=None) for i, s in enumerate(["profile: str = 'smoke'", source])]
        (self.root/'nbs'/'paper'/f'{name}.ipynb').write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=dict(name='python3', language='python', display_name='python3')), nbformat=4, nbformat_minor=5)))

    def start(self, *args, **env): return subprocess.Popen([sys.executable, self.root/'driver.py', 'reproduce', *map(str, args)], cwd=self.root, env=self.env | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                                              preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) if os.name == 'posix' else None) # a job in the background of a shell would inherit that it is ignored
    def run(self, *args, **env):
        process = self.start(*args, **env)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err
    def calls(self):
        path = self.root/'calls.txt'
        said = path.read_text().split('\n')[:-1] if path.exists() else []
        path.unlink(missing_ok=True)
        return sorted(said)
    def records(self): return {str(p.relative_to(self.steps)): p.read_bytes() for p in sorted(self.steps.glob('*-*/*')) if p.suffix != '.ipynb'}
    def processes(self):
        "Whatever still runs on behalf of this checkout."
        def ours(p):
            try: return p.status() != 'zombie' and p.environ().get('MEMKIT_HOME') == self.env['MEMKIT_HOME']
            except psutil.Error: return False
        return [p for p in psutil.process_iter() if ours(p)]
    def is_quiet(self, patience=10):
        end = time.monotonic() + patience
        while self.processes() and time.monotonic() < end: time.sleep(.1)
        return not self.processes()


@pytest.fixture
def checkout(tmp_path): return Checkout(tmp_path)


def test_only_what_changed_is_done_again(checkout):
    checkout.notebook('fig_models', MODELS); checkout.notebook('fig_plain', PLAIN)
    code, out, err = checkout.run('--dry-run')
    assert code == 0 and '6 of 6 steps to run' in out and 'training 1  after 1' in out and '3 s' in out and '\nabout ' in out, out + err
    assert not checkout.calls() and not checkout.figures.exists() and not list(checkout.steps.glob('*-*'))
    code, out, err = checkout.run('--jobs', 2, '--resume')
    assert code == 0 and err == '' and '[6 of 6]' in out, out + err
    assert checkout.calls() == ['data', 'measure', 'train 1', 'train 2']
    assert sorted(p.name for p in checkout.figures.glob('fig_*')) == ['fig_models.csv', 'fig_models.ipynb', 'fig_plain.csv', 'fig_plain.ipynb']
    before = {p.name: (p.stat().st_ino, p.read_bytes()) for p in checkout.figures.glob('fig_*')}
    code, out, _ = checkout.run()
    assert (code, checkout.calls()) == (0, []) and '[' not in out
    assert {p.name: (p.stat().st_ino, p.read_bytes()) for p in checkout.figures.glob('fig_*')} == before

    checkout.notebook('fig_plain', PLAIN.replace("'plain'", "'plainer'"))   # a notebook: it alone
    code, out, _ = checkout.run()
    assert (code, checkout.calls()) == (0, []) and '[1 of 1] fig_plain' in out
    assert (checkout.figures/'fig_plain.csv').read_text() == 'plainer'

    (checkout.root/'toy.py').write_text(TOY.replace('FACTOR = 2', 'FACTOR = 3'))   # training: it and what follows
    code, out, err = checkout.run('fig_models')
    assert (code, checkout.calls()) == (0, ['measure', 'train 1', 'train 2']) and 'fig_plain' not in out, out + err
    assert (checkout.figures/'fig_models.csv').read_bytes() != before['fig_models.csv'][1]

    (checkout.root/'toy.py').write_text(TOY)   # and back: all of it is still there
    code, out, _ = checkout.run()
    assert (code, checkout.calls()) == (0, []) and (checkout.figures/'fig_models.csv').read_bytes() == before['fig_models.csv'][1]


FATES = dict(
    fig_bug=("1/0", 'ZeroDivisionError: division by zero'),
    fig_syntax=("x = (", 'SyntaxError'),
    fig_missing=("open('meshes.csv')", "No such file or directory: 'meshes.csv'"),
    fig_full=("import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n" + SAVE + "(folder/'fig_full.csv').write_text('x'*9999)", 'the disk is full (File too large)'),
    fig_killed=(SAVE + "(folder/'fig_killed.csv').write_text('half')\nimport os\nos.kill(os.getpid(), 9)", 'its kernel died'),
    fig_stalled=(SAVE + "(folder/'fig_stalled.csv').write_text('half')\nimport time\ntime.sleep(600)", 'stalled: no processor time for 4 s'),
    fig_greedy=("x = b'x'*900_000_000\nimport time\ntime.sleep(600)", 'more than the memory limit of 0.7 GB'),
    fig_hungry=(PLAIN, 'not run: needs no meshes'),
    tab_torn=(None, 'cannot be read as a notebook'))


@pytest.fixture(scope='module')
def bad_night(tmp_path_factory):
    checkout = Checkout(tmp_path_factory.mktemp('night'))
    checkout.figures.mkdir(parents=True)
    for name, (source, _) in FATES.items():
        checkout.notebook(name, source)
        (checkout.figures/f'{name}.csv').write_text('of yesterday')
    (checkout.root/'nbs'/'paper'/'tab_torn.ipynb').write_text('{"cells": [')
    checkout.notebook('fig_plain', PLAIN)
    return (checkout, *checkout.run('--jobs', 2, '--limit-gb', .7, TOY_REPORT='1'))


@pytest.mark.parametrize('name', FATES)
def test_a_fault_is_one_clear_line_and_no_half_figure(bad_night, name):
    checkout, code, out, err = bad_night
    assert code == 1
    lines = [l for l in err.splitlines() if l.startswith(f'{name}: ')]
    assert len(lines) == 1 and FATES[name][1] in lines[0], err
    assert (checkout.figures/f'{name}.csv').read_text() == 'of yesterday' and not list(checkout.figures.glob(f'*{name}*.ipynb'))


def test_what_has_nothing_to_do_with_the_faults_is_finished(bad_night):
    checkout, code, out, err = bad_night
    assert (checkout.figures/'fig_plain.csv').read_text() == 'plain' and (checkout.figures/'fig_plain.ipynb').is_file()
    assert len(err.splitlines()) == len(FATES) + 2 and 'Traceback' not in err + out   # a line each, one for the step behind fig_hungry, and the sum
    assert (checkout.figures/'report.html').is_file() and not [p for p in checkout.figures.iterdir() if p.name.startswith('.')]
    assert checkout.is_quiet()


def test_a_failed_step_says_where_its_output_is(bad_night):
    checkout, code, out, err = bad_night
    see = lambda name: Path(next(l for l in err.splitlines() if l.startswith(f'{name}: ')).rpartition('(see ')[2].rstrip(')'))
    assert 'ZeroDivisionError' in see('fig_bug').read_text() and see('fig_bug').name == 'fig_bug.failed.ipynb'
    assert 'meshes.csv' in see('no meshes').read_text()


def test_unknown_notebook_profile_and_jobs_are_bad_input(checkout):
    checkout.notebook('fig_plain', PLAIN)
    for args, said in ((['fig_moon'], 'fig_moon'), (['--profile', 'lunar'], 'lunar')):
        code, out, err = checkout.run(*args)
        assert code == 2 and said in err and len(err.strip().splitlines()) == 1
    assert checkout.run('--jobs', 0)[0] == 2 and not checkout.figures.exists()


def test_killed_at_any_moment_the_same_command_ends_with_the_same_bytes(checkout, tmp_path_factory):
    calm = Checkout(tmp_path_factory.mktemp('calm'))
    for c in (calm, checkout): c.notebook('fig_models', MODELS)
    assert calm.run('--jobs', 2)[0] == 0
    rng, cut, calls = random.Random(7), 0, checkout.root/'calls.txt'
    noted = lambda: calls.stat().st_size if calls.exists() else 0
    for i in range(7):
        before, process = noted(), checkout.start('--jobs', 2, TOY_PACE='.25')
        end = time.monotonic() + (4 if i % 3 else rng.uniform(.5, 4))   # at any moment, or shortly after a step has begun
        while noted() == before and process.poll() is None and time.monotonic() < end: time.sleep(.02)
        time.sleep(rng.uniform(0, .9))
        cut += process.poll() is None
        process.kill(); process.communicate()
        assert checkout.is_quiet(), checkout.processes()
        assert not list(checkout.figures.glob('fig_*.csv')) or (checkout.figures/'fig_models.csv').read_bytes() == (calm.figures/'fig_models.csv').read_bytes()
    assert cut >= 5
    code, out, err = checkout.run('--jobs', 2)
    assert code == 0, err
    assert checkout.records() == calm.records() and len(checkout.records()) == 10
    assert (checkout.figures/'fig_models.csv').read_bytes() == (calm.figures/'fig_models.csv').read_bytes()
    assert len(checkout.calls()) > len(calm.calls()) # something was interrupted indeed
    assert not list(checkout.steps.glob('*.part'))


@pytest.mark.skipif(os.name == 'nt', reason='signals')
@pytest.mark.parametrize('by', ['SIGTERM', 'SIGINT', 'SIGKILL'])
def test_however_it_is_stopped_nothing_runs_on(checkout, by):
    checkout.notebook('fig_models', MODELS)
    process = checkout.start('--jobs', 2, TOY_PACE='60')
    noted = checkout.root/'calls.txt'
    while not noted.exists() or 'train' not in noted.read_text(): time.sleep(.05)
    process.send_signal(getattr(signal, by))   # SIGTERM, as a cluster sends it, counts as Ctrl-C
    out, err = process.communicate(timeout=30)
    assert checkout.is_quiet()
    if by == 'SIGKILL': assert process.returncode == -9
    else: assert process.returncode == 130 and 'the same command goes on' in err and ': stopped: after' in out and 'Traceback' not in err
    assert '4 of 5 steps to run' in checkout.run('--dry-run')[1]


def test_two_runs_at_once_share_the_work(checkout):
    checkout.notebook('fig_models', MODELS)
    both = [checkout.start('--jobs', 1, TOY_PACE='.1') for _ in range(2)]
    said = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert checkout.calls() == ['data', 'measure', 'train 1', 'train 2']
