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
import sys
import numpy as np, torch
from memkit.lfd import lfd_distance
from memkit.lfd_device import *

def compare(a, b):
    "All pairs of a and b: distance and both bounds; returns how many."
    A, B = device_tables(a), device_tables(b)
    q, g = (torch.from_numpy(x.ravel()) for x in np.meshgrid(np.arange(len(a)), np.arange(len(b)), indexing='ij'))
    expected = lfd_distance(a, b).ravel()
    found = distance_pairs(A, B, q, g, 'triton').numpy()
    assert (found == expected).all(), (found, expected)
    for which in ('sums', 'ranked'):
        bound = bound_pairs(A, B, q, g, which, 'triton')
        assert (bound == bound_pairs(A, B, q, g, which, 'torch')).all() and (bound.numpy() <= expected).all()
    return len(q)

assert kernel_for('cpu') == 'triton'
rng, size = np.random.default_rng(0), (10, 10, 47)
random = rng.integers(0, 256, (3, *size), dtype=np.uint8)
ends = rng.choice(np.uint8([0, 255]), size)                     # nothing but the smallest and the largest code
flat = np.broadcast_to(rng.integers(0, 256, 47, dtype=np.uint8), size)   # all views alike: every alignment ties
near = random[0].copy(); near[3, 7, [0, 35, 46]] += 1             # one step in a light, a heavy and the last code
edge = np.stack([np.zeros(size), np.full(size, 255), ends, 255 - ends, flat, near, *random[:2]]).astype(np.uint8)
pairs = compare(edge, edge[[1, 2, 4, 5, 6]]) + compare(random[2:], edge[1:])   # the last: a number that the programs cannot share evenly
z = np.load(sys.argv[1])
golden = z['descriptors'][:4]
assert (lfd_distance(golden, golden) == z['distance'][:4, :4]).all()
pairs += compare(golden, golden[1:])
few = edge[[4, 6]]
I, D, _ = device_search(few, edge, 2, lambda rows, columns: None, "cpu")
order = np.argsort(lfd_distance(few, edge), 1, kind="stable")[:, :2]   # of equal ones the first
assert (I == order).all() and (D == np.take_along_axis(lfd_distance(few, edge), order, 1)).all()
print('same integers on', pairs, 'pairs')
'''


@pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='no Triton; pip install "memkit[gpu]" on Linux')
def test_the_triton_kernels_through_the_interpreter(data):
    done = subprocess.run([sys.executable, '-c', INTERPRETED, str(data/'lfd_distance.npz')], env=os.environ | dict(TRITON_INTERPRET='1', PYTHONPATH=os.pathsep.join(sys.path)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and 'same integers on 59 pairs' in done.stdout, done.stderr[-2000:]
