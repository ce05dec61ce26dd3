"""The distance on a device gives the integers of the processor's kernel: in torch, and as a Triton kernel through the interpreter."""
import importlib.util, os, subprocess, sys

import numpy as np
import pytest

torch = pytest.importorskip('torch')
from memkit.lfd import lfd_distance
from memkit.lfd_device import bound_pairs, device_search, device_tables, distance_pairs, keep_best
from memkit.retrieval import nearest

nobody = lambda rows, columns: None


def descriptors(n, seed, spread=256):
    "`spread` 256: uniform bytes, which no bound prunes; less: variations of a few shapes, with ties."
    rng = np.random.default_rng(seed)
    if spread == 256: return rng.integers(0, 256, (n, 10, 10, 47), dtype=np.uint8)
    base = np.random.default_rng(0).integers(0, 256, (4, 10, 10, 47))
    return np.clip(base[rng.integers(0, 4, n)] + rng.integers(-spread, spread + 1, (n, 1, 1, 47)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize('spread, n', [(256, 100), (20, 30)])
def test_torch_gives_the_same_integers_on_ten_thousand_pairs(spread, n):
    a, b = descriptors(n, 1, spread), descriptors(n, 2, spread)
    q, g = (torch.from_numpy(x.ravel()) for x in np.meshgrid(np.arange(n), np.arange(n), indexing='ij'))
    A, B, expected = device_tables(a), device_tables(b), lfd_distance(a, b).ravel()
    exact = distance_pairs(A, B, q, g).numpy()
    assert (exact == expected).all()
    sums, ranked = (bound_pairs(A, B, q, g, w).numpy() for w in ('sums', 'ranked'))
    assert (sums <= ranked).all() and (ranked <= exact).all()


def test_extreme_bytes():
    d = np.stack([np.zeros((10, 10, 47), np.uint8), np.full((10, 10, 47), 255, np.uint8)])
    t = device_tables(d)
    assert distance_pairs(t, t, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])).tolist() == [0, 147900, 0]
    for which in ('sums', 'ranked'): assert bound_pairs(t, t, torch.tensor([0]), torch.tensor([1]), which).tolist() == [147900]


def test_golden_matrix(data):
    z = np.load(data/'lfd_distance.npz')
    d = next(z[k] for k in z.files if z[k].dtype == np.uint8 and z[k].shape[1:] == (10, 10, 47))
    q, g = (torch.from_numpy(x.ravel()) for x in np.meshgrid(np.arange(len(d)), np.arange(len(d)), indexing='ij'))
    t = device_tables(d)
    assert (distance_pairs(t, t, q, g).numpy().reshape(len(d), -1) == lfd_distance(d, d)).all()


@pytest.mark.parametrize('spread, k, max_gb', [(20, 1, 1.), (20, 7, .0006), (256, 3, .0004), (0, 5, 1.)])
def test_search_equals_the_processor(spread, k, max_gb):
    Q, G = descriptors(9, 3, spread), descriptors(60, 4, spread)
    mask = np.random.default_rng(5).random((9, 60)) < .3
    for exclude in (None, mask):
        I, D, counts = device_search(Q, G, k, nobody if exclude is None else lambda r, c: exclude[r, c], 'cpu', max_gb, kernel='torch')
        expected = nearest(Q, G, k, exclude=exclude, device='cpu')
        assert (I == expected[0]).all() and (D == expected[1]).all()
        assert counts['exact'] <= counts['pairs']


def test_bounds_save_work_on_families():
    Q, G = descriptors(6, 6, 12), descriptors(400, 7, 12)
    *_, counts = device_search(Q, G, 1, nobody, 'cpu', kernel='torch')
    assert counts['exact'] < .5*counts['pairs'] and counts['ranked'] < counts['pairs']


def test_nearest_takes_the_device(monkeypatch):
    Q, G = descriptors(3, 8, 20), descriptors(20, 9, 20)
    monkeypatch.setattr('memkit.retrieval.search_device', lambda device: 'cpu' if device == 'cuda' else None)
    found, plain = nearest(Q, G, 2, device='cuda', stats=True), nearest(Q, G, 2, device='cpu', stats=True)
    assert all((x == y).all() for x, y in zip(found[:2], plain[:2])) and found[2].pairs == plain[2].pairs


INTERPRETED = '''
import numpy as np, torch
from memkit.lfd import lfd_distance
from memkit.lfd_device import *
rng = np.random.default_rng(0)
a, b = rng.integers(0, 256, (2, 10, 10, 47), dtype=np.uint8), rng.integers(0, 256, (3, 10, 10, 47), dtype=np.uint8)
A, B = device_tables(a), device_tables(b)
q, g = (torch.from_numpy(x.ravel()) for x in np.meshgrid(np.arange(2), np.arange(3), indexing='ij'))
assert kernel_for('cpu') == 'triton'
assert (distance_pairs(A, B, q, g, 'triton').numpy() == lfd_distance(a, b).ravel()).all()
for which in ('sums', 'ranked'): assert (bound_pairs(A, B, q, g, which, 'triton') == bound_pairs(A, B, q, g, which, 'torch')).all()
I, D, _ = device_search(a, b, 2, lambda rows, columns: None, 'cpu')
assert (D == np.sort(lfd_distance(a, b), 1)[:, :2]).all()
print('same integers')
'''


@pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='no Triton; pip install "memkit[gpu]" on Linux')
def test_the_triton_kernels_through_the_interpreter():
    done = subprocess.run([sys.executable, '-c', INTERPRETED], env=os.environ | dict(TRITON_INTERPRET='1', PYTHONPATH=os.pathsep.join(sys.path)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and 'same integers' in done.stdout, done.stderr[-2000:]
