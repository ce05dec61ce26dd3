"""The command line as a user meets it: a process, its output and its exit code."""
import json, subprocess, sys

import numpy as np
import pytest

from memkit.mesh import save_mesh
from memkit.shapes import shape_set


def memkit(*args, **kw):
    return subprocess.run([sys.executable, '-m', 'memkit', *map(str, args)], capture_output=True, text=True, timeout=300, **kw)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp('cli')
    for name, seed in (('train', 0), ('test', 1), ('gen', 2)):
        for s in shape_set(6, seed=seed): save_mesh(root/name/f'{s.category}.obj', *s.mesh(32))
    return root


def test_help_and_version_do_not_load_the_heavy_modules():
    code = "import sys\nfrom memkit.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint(sorted({'torch', 'numba', 'trimesh', 'matplotlib', 'scipy'} & set(sys.modules)))"
    got = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    assert got.stdout.strip().endswith('[]'), got.stdout[-200:]
    assert 'memkit audit' in got.stdout
    assert memkit('--version').stdout.startswith('memkit ')


@pytest.mark.parametrize('command', ['audit', 'lfd', 'nearest', 'zu', 'fpd', 'check', 'reproduce'])
def test_every_command_explains_itself(command):
    got = memkit(command, '--help')
    assert got.returncode == 0 and len(got.stdout) > 200


@pytest.mark.parametrize('args, said', [
    (['lfd', 'missing.obj', 'missing.obj'], 'missing.obj'), (['audit', '--gen', 'nowhere', '--train', 'nowhere', '--test', 'nowhere', '--out', 'out'], 'nowhere'),
    (['zu', 'a.json', 'b.json'], 'a.json'), (['fpd', 'a.npz', 'b.npz'], 'a.npz'), (['reproduce', 'fig_moon'], 'fig_moon')])
def test_bad_input_is_one_line_and_exit_code_2(args, said, tmp_path):
    got = memkit(*args, cwd=tmp_path)
    assert got.returncode == 2 and said in got.stderr and len(got.stderr.strip().splitlines()) == 1, got.stderr
    assert not list(tmp_path.rglob('*.html'))


def test_bad_usage_is_exit_code_2():
    assert memkit('audit').returncode == 2
    assert memkit('no-such-command').returncode == 2


def test_debug_shows_the_traceback(tmp_path):
    assert 'Traceback' in memkit('--debug', 'lfd', 'missing.obj', 'missing.obj', cwd=tmp_path).stderr


def test_lfd_of_two_files_is_an_integer(folders):
    a, b = sorted((folders/'train').iterdir())[:2]
    assert memkit('lfd', a, a).stdout == '0\n'
    assert int(memkit('lfd', a, b).stdout) > 0


def test_audit_ends_with_0_or_1_by_its_verdict(folders):
    common = ['--train', folders/'train', '--test', folders/'test', '--jobs', 2]
    fresh = memkit('audit', '--gen', folders/'gen', *common, '--out', folders/'out')
    assert fresh.returncode == 0, fresh.stderr
    assert 'report.html' in fresh.stdout
    (folders/'gen'/'broken.obj').write_text('garbage')
    again = memkit('audit', '--gen', folders/'gen', *common, '--out', folders/'out')
    assert 'not measured: gen: broken' in again.stderr and again.stdout == fresh.stdout
    copy = folders/'copies'
    copy.mkdir()
    for p in (folders/'train').iterdir(): (copy/p.name).write_bytes(p.read_bytes())
    got = memkit('audit', '--gen', copy, *common, '--out', folders/'out2')
    assert got.returncode == 1 and 'copying' in got.stdout
    assert memkit('audit', '--gen', copy, *common, '--out', folders/'out2', '--exit-zero').returncode == 0


def test_database_nearest_and_zu_speak_to_each_other(folders):
    assert memkit('lfd', folders/'train', '--db', folders/'db', '--jobs', 1).returncode == 0
    for name in ('gen', 'test'):
        assert memkit('nearest', folders/name, folders/'db', '--out', folders/f'{name}.json', '--jobs', 1).returncode == 0
    got = memkit('zu', folders/'gen.json', folders/'test.json', '--out', folders/'zu.json')
    assert got.returncode == 0, got.stderr
    record = json.loads((folders/'zu.json').read_text())
    assert record['m'] == record['n'] == 6 and record['verdict'] in ('copying', 'no evidence', 'underpowered')


def test_zu_refuses_empty_neighbour_lists(tmp_path):
    (tmp_path/'gen.json').write_text('{"a": [], "b": [{"model_id": "t", "distance": 3}]}')
    (tmp_path/'test.json').write_text('{"c": [{"model_id": "t", "distance": 4}]}')
    got = memkit('zu', tmp_path/'gen.json', tmp_path/'test.json')
    assert got.returncode == 2 and 'gen.json' in got.stderr
    assert memkit('zu', tmp_path/'gen.json', tmp_path/'test.json', '--allow-failed').returncode == 0


def test_fpd_of_arrays(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path/'a.npy', rng.normal(size=(50, 3))); np.save(tmp_path/'b.npy', rng.normal(size=(50, 3)))
    got = memkit('fpd', tmp_path/'a.npy', tmp_path/'b.npy', '--out', tmp_path/'fd.json')
    assert got.returncode == 0, got.stderr
    assert json.loads((tmp_path/'fd.json').read_text())['fd'] > 0
