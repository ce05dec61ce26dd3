"""Databases survive everything: kill -9 at random and at chosen moments, crashing and hanging workers, torn and flipped bytes."""
import json, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from memkit.core import InputError, sha256_of
from memkit.database import _read_records, build_database, load_database
from memkit.workers import map_isolated

KIND = '''
import os, time
import numpy as np
name, version = 'size', '1'
def describe(V, F):
    time.sleep(float(os.environ.get('PAUSE', 0)))
    if 'LOG' in os.environ:
        with open(os.environ['LOG'], 'a') as f: f.write(f'{len(V)}\\n')
    if len(V) == 13: raise ValueError('thirteen')
    return np.r_[V.min(0), V.max(0)].astype(np.float32)
'''
BUILD = '''
import sys, signal, os
sys.path.insert(0, sys.argv[1])
import kind
from memkit.database import build_database
ending = int(sys.argv[4])
if ending:   # kill -9 just before the n-th change of a name in the folder
    from pathlib import Path
    left = [ending]
    def counted(call):
        def wrapper(*a, **k):
            left[0] -= 1
            if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
            return call(*a, **k)
        return wrapper
    os.replace, Path.unlink = counted(os.replace), counted(Path.unlink)
build_database(sys.argv[2], sys.argv[3], kind, n_jobs=2)
'''


def content(folder): return {p.name: sha256_of(p) for p in folder.iterdir()}


def write_mesh(path, n):
    "A fan of n corners; every n is another mesh."
    path.parent.mkdir(parents=True, exist_ok=True)
    corners = '\n'.join(f'{np.cos(i):.6f} {np.sin(i):.6f} {i % 3}' for i in range(n))
    path.write_text(f'OFF\n{n} {n - 2} 0\n{corners}\n' + '\n'.join(f'3 0 {i} {i + 1}' for i in range(1, n - 1)) + '\n')


@pytest.fixture
def meshes(tmp_path):
    for n in range(3, 33): write_mesh(tmp_path/'meshes'/f'{"abc"[n % 3]}'/f'{n}.off', n)
    (tmp_path/'meshes'/'broken.off').write_text('OFF\n9 9 0\n')
    (tmp_path/'kind.py').write_text(KIND)
    (tmp_path/'build.py').write_text(BUILD)
    return tmp_path/'meshes'


@pytest.fixture
def kind(meshes, monkeypatch):
    monkeypatch.syspath_prepend(str(meshes.parent))
    import importlib, kind
    yield importlib.reload(kind)
    del sys.modules['kind']


def start(meshes, out, ending=0, **env):
    root = meshes.parent
    return subprocess.Popen([sys.executable, root/'build.py', root, meshes, out, str(ending)], env={**os.environ, **env}, stderr=subprocess.PIPE)


needs_kill = pytest.mark.skipif(os.name == 'nt', reason='kill -9 is of POSIX')


@needs_kill
def test_kill_9_ten_times_at_random_moments(meshes, kind, tmp_path):
    whole = build_database(meshes, tmp_path/'whole', kind, n_jobs=1)
    assert len(whole) == 29 and set(whole.failures) == {'broken', 'b/13'}
    out, rng, kills, progress = tmp_path/'out', random.Random(0), 0, set()
    while kills < 10:
        finished = set()
        if (out/'journal.bin').exists():
            with open(out/'journal.bin', 'rb') as f: finished = {m['id'] for m, _, _ in _read_records(f) if 'id' in m}
        progress.add(len(finished))
        log = tmp_path/f'log{kills}'
        process = start(meshes, out, LOG=str(log), PAUSE='.25')
        goal = rng.randint(0, 4)    # kill some time after so many more meshes were described
        while process.poll() is None and not (goal == 0 or log.exists() and len(log.read_text().split()) >= goal): time.sleep(.005)
        time.sleep(rng.random()*.2)
        process.kill(); process.wait()
        assert process.returncode == -signal.SIGKILL, process.stderr.read().decode()
        time.sleep(.05)
        described = {int(n) for n in log.read_text().split()} if log.exists() else set()
        assert not described & {int(i.split('/')[-1]) for i in finished if '/' in i}, 'a finished mesh was described again'
        kills += 1
    assert len(progress) > 4 and max(progress) < 31, 'the kills did not come in the middle'
    assert start(meshes, out).wait() == 0
    assert content(out) == content(tmp_path/'whole')


@needs_kill
def test_kill_9_at_every_step_of_the_end(meshes, kind, tmp_path):
    expected = None
    build_database(meshes, tmp_path/'before', kind, n_jobs=2)
    write_mesh(meshes/'new.off', 40)
    expected = content(build_database(meshes, tmp_path/'whole', kind, n_jobs=2).path)
    for ending in range(1, 6):
        out = tmp_path/f'out{ending}'
        shutil.copytree(tmp_path/'before', out)
        code = start(meshes, out, ending).wait()
        if code == 0: break
        assert len(load_database(out, verify=True)) in (29, 30)   # old or new, never a mixture
        assert start(meshes, out).wait() == 0
        assert content(out) == expected
    assert ending == 5, f'only {ending - 1} steps were killed'


def test_bytes_do_not_depend_on_jobs_or_history(meshes, kind, tmp_path):
    expected = content(build_database(meshes, tmp_path/'one', kind, n_jobs=1).path)
    assert content(build_database(meshes, tmp_path/'three', kind, n_jobs=3).path) == expected
    some = {k: v for k, v in [(p.relative_to(meshes).with_suffix('').as_posix(), p) for p in sorted(meshes.rglob('*.off'), reverse=True)][:20]}
    out = tmp_path/'grown'
    build_database(some, out, kind, n_jobs=2)
    write_mesh(meshes/'a'/'30.off', 50)                      # changed
    changed = build_database(meshes, out, kind, n_jobs=2)
    assert changed.sources != load_database(tmp_path/'one').sources
    write_mesh(meshes/'a'/'30.off', 30)
    assert content(build_database(meshes, out, kind, n_jobs=2).path) == expected
    (meshes/'a'/'30.off').unlink()                           # removed
    assert 'a/30' not in build_database(meshes, out, kind)


def test_nothing_is_described_twice(meshes, kind, tmp_path, monkeypatch):
    monkeypatch.setenv('LOG', str(tmp_path/'log'))
    build_database(meshes, tmp_path/'out', kind, n_jobs=2)
    before = (tmp_path/'log').read_text()
    assert len(before.split()) == 30
    build_database(meshes, tmp_path/'out', kind, n_jobs=2)
    assert (tmp_path/'log').read_text() == before
    build_database(meshes, tmp_path/'out', kind, n_jobs=1, retry_failed=True)
    assert (tmp_path/'log').read_text() == before + '13\n'
    build_database(meshes, tmp_path/'out', kind, n_jobs=2, rebuild=True)
    assert len((tmp_path/'log').read_text().split()) == 61


def test_crash_and_hang_cost_one_mesh_each(meshes, tmp_path):
    def describe(V, F):
        import ctypes, time
        if len(V) == 5: ctypes.string_at(0)
        if len(V) == 6: time.sleep(60)
        if len(V) == 7: os._exit(7)
        if len(V) == 8: raise MemoryError
        return V[:2]
    began = time.monotonic()
    made = build_database(meshes, tmp_path/'out', SimpleNamespace(name='hostile', describe=describe), n_jobs=2, time_limit=2)
    assert time.monotonic() - began < 40
    assert len(made) == 26 and set(made.failures) == {'broken', 'c/5', 'a/6', 'b/7', 'c/8'}
    assert 'SIGSEGV' in made.failures['c/5'] and made.failures['a/6'] == 'no result within 2 s' and 'exit code 7' in made.failures['b/7']
    assert made.failures['c/8'] == 'MemoryError' and made.failures['broken'].startswith('broken.off: ')
    assert str(tmp_path) not in (tmp_path/'out'/'index.json').read_text()


def test_damage_is_noticed(meshes, kind, tmp_path):
    out = tmp_path/'out'
    build_database(meshes, out, kind, n_jobs=2)
    expected = content(out)
    array = next(out.glob('*.npy'))
    good = array.read_bytes()
    array.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(InputError, match='has been changed'): load_database(out, verify=True)
    with pytest.raises(InputError, match='rebuild=True'): build_database(meshes, out, kind)
    assert content(build_database(meshes, out, kind, n_jobs=2, rebuild=True).path) == expected
    for damage in (lambda: array.write_bytes(good[:-4]), lambda: array.unlink(), lambda: (out/'index.json').write_text('{'), lambda: (out/'index.json').write_text('[]'),
                   lambda: (out/'index.json').write_bytes(b'\xff')):
        damage()
        with pytest.raises(InputError, match='damaged'): load_database(out)
        assert content(build_database(meshes, out, kind, n_jobs=2, rebuild=True).path) == expected
    index = json.loads((out/'index.json').read_text())
    (tmp_path/'evil.npy').write_bytes(good)
    (out/'index.json').write_text(json.dumps({**index, 'array': {**index['array'], 'file': '../evil.npy'}}))
    with pytest.raises(InputError, match='damaged'): load_database(out)


def test_a_flipped_byte_in_the_journal_costs_only_what_follows(meshes, kind, tmp_path):
    expected = content(build_database(meshes, tmp_path/'whole', kind, n_jobs=2).path)
    out = tmp_path/'out'
    def interrupted_at_the_end():
        with pytest.MonkeyPatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr('memkit.database._commit', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
            build_database(meshes, out, kind, n_jobs=2)
        with open(out/'journal.bin', 'rb') as f: return len(list(_read_records(f)))
    assert interrupted_at_the_end() == 32       # what it is, 29 descriptions, 2 failures
    data = bytearray((out/'journal.bin').read_bytes())
    data[len(data)//2] ^= 8
    (out/'journal.bin').write_bytes(data)
    with open(out/'journal.bin', 'rb') as f: kept = len(list(_read_records(f)))
    assert 5 < kept < 25
    assert interrupted_at_the_end() == 32       # the damaged end was cut off before anything was added
    with open(out/'journal.bin', 'ab') as f: f.write(data[:50])
    assert content(build_database(meshes, out, kind, n_jobs=2).path) == expected


def test_another_version_never_mixes(meshes, kind, tmp_path):
    out = tmp_path/'out'
    build_database(meshes, out, kind, n_jobs=2)
    before = content(out)
    newer = SimpleNamespace(name='size', version='2', describe=kind.describe)
    with pytest.raises(InputError, match='holds descriptions by size version 1, not by size version 2'): build_database(meshes, out, newer)
    build_database(meshes, out, kind)
    assert content(out) == before
    assert build_database(meshes, out, newer, n_jobs=2, rebuild=True).descriptor['version'] == '2'


@needs_kill
def test_one_writer_at_a_time(meshes, kind, tmp_path):
    process = start(meshes, tmp_path/'out', PAUSE='30')
    while not (tmp_path/'out'/'journal.bin').exists() or not (tmp_path/'out'/'journal.bin').stat().st_size: time.sleep(.01)
    with pytest.raises(InputError, match='another process is building'): build_database(meshes, tmp_path/'out', kind)
    process.kill(); process.wait()
    assert len(build_database(meshes, tmp_path/'out', kind, n_jobs=2)) == 29


def test_all_meshes_broken(tmp_path):
    for name in 'ab': (tmp_path/'m'/f'{name}.off').parent.mkdir(exist_ok=True); (tmp_path/'m'/f'{name}.off').write_text('OFF')
    made = build_database(tmp_path/'m', tmp_path/'out', SimpleNamespace(name='size', describe=len), n_jobs=1)
    assert len(made) == 0 and set(made.failures) == {'a', 'b'} and len(load_database(tmp_path/'out', verify=True)) == 0


@needs_kill
def test_workers_die_with_their_parent(tmp_path):
    script = ('import os, sys, time\nfrom memkit.workers import map_isolated\n'
              'def f(x):\n    import os, time\n    open(x, "w").write(str(os.getpid())); time.sleep(60)\n'
              'list(map_isolated(f, [sys.argv[1]], n_jobs=1))')
    parent = subprocess.Popen([sys.executable, '-c', script, tmp_path/'pid'])
    until = time.monotonic() + 30
    while not ((tmp_path/'pid').exists() and (tmp_path/'pid').read_text()) and time.monotonic() < until: time.sleep(.02)
    child = int((tmp_path/'pid').read_text())
    parent.kill(); parent.wait()
    until = time.monotonic() + 5
    def alive():
        try: return Path(f'/proc/{child}/stat').read_text().split()[2] != 'Z' if Path('/proc').is_dir() else os.kill(child, 0) is None
        except OSError: return False
    while alive() and time.monotonic() < until: time.sleep(.02)
    assert not alive()


def test_large_items_and_results_travel():
    items = [np.full(3_000_000, i, np.uint8) for i in range(4)]
    assert sorted(int(o.value.sum()) for o in map_isolated(np.negative, items, n_jobs=2)) == sorted(int((-x).sum()) for x in items)
