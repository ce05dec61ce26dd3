"""The light field distance: reference values, identities, and both kernels against a third, naive form of the formula."""
import os, subprocess, sys

import numpy as np
import pytest

from memkit.core import InputError, make_rng
from memkit.lfd import lfd_alignments, lfd_distance, simd_kind


@pytest.fixture(scope='module')
def reference(data):
    return np.load(data/'lfd_distance.npz')


@pytest.fixture(params=['psadbw', 'plain'])
def kernel(request):
    if request.param == 'psadbw' and simd_kind() is None: pytest.skip('this processor has no AVX2')
    return request.param


def naive(a, b):
    "Section 8 of the specification in numpy, without packing, weights by multiplication."
    w = np.r_[np.ones(35, int), np.full(11, 2), 1]
    cost = (abs(a[:, :, None, None].astype(int) - b[None, None].astype(int))*w).sum(-1)  # s, i, t, j
    return min(cost[:, p][:, range(10), :, range(10)].sum(0).min() for p in lfd_alignments())


def adversarial(n=12):
    "Random bytes, extremes, one hot component: costs and sums at both ends of their ranges."
    rng = make_rng(0, 'adversarial')
    d = rng.integers(0, 256, (n, 10, 10, 47), dtype=np.uint8)
    d[0], d[1] = 0, 255
    d[2] = np.where(rng.random((10, 10, 47)) < .5, 0, 255)
    d[3] = 255 - d[2]
    d[4] = 0; d[4, 3, 7, 46] = 255
    d[5] = 0; d[5, 9, 9, 45] = 255
    d[6] = 113                 # against 0: 65,540, just over the 16 bits
    d[7] = 0; d[7][:, :, :35] = 187; d[7][:, 0, 46] = 70; d[7][:, 1, 46] = 15   # against 0: 65,535 exactly
    d[8] = d[7]; d[8][:, 1, 46] = 14                                           # 65,534
    return d


def test_every_reference_distance(reference, kernel):
    d = reference['descriptors']
    assert (lfd_distance(d, d, kernel=kernel) != reference['distance']).sum() == 0


def test_the_c_program_ignores_the_second_eccentricity(reference):
    blind = reference['descriptors'].copy()
    blind[..., 46] = 0
    assert (lfd_distance(reference['descriptors'], blind) == reference['c_program']).all()
    assert (reference['c_program'] != reference['distance']).any()


def test_kernels_equal_the_naive_formula(kernel):
    d = adversarial()
    expected = np.array([[naive(a, b) for b in d] for a in d])
    assert (lfd_distance(d, d, kernel=kernel) == expected).all()
    assert expected[0, 1] == 147_900 and expected[0, 6] == 65_540 and expected[0, 7] == 65_535 and expected[0, 8] == 65_534


def test_kernels_agree_on_many_random_pairs():
    if simd_kind() is None: pytest.skip('this processor has no AVX2')
    rng = make_rng(1, 'pairs')
    d = np.concatenate([rng.integers(0, top, (40, 10, 10, 47)).astype(np.uint8) for top in (256, 16, 3)])
    assert (lfd_distance(d, d) == lfd_distance(d, d, kernel='plain')).all()


def test_alignments_are_the_rotation_group():
    P = lfd_alignments()
    rows = {tuple(p) for p in P}
    assert P.shape == (60, 10) and len(rows) == 60 and tuple(range(10)) in rows
    assert {tuple(p[q]) for p in P for q in P} == rows
    assert all(sorted(p) == list(range(10)) for p in P)


def test_zero_symmetric_and_free_of_the_camera_body(reference, kernel):
    d = reference['descriptors'][:8]
    D = lfd_distance(d, d, kernel=kernel)
    assert (np.diag(D) == 0).all() and (D == D.T).all()
    for p in lfd_alignments()[::7]:
        assert (lfd_distance(d[:, ::-1, p], d, kernel=kernel) == D).all()


def test_tiles_join(reference):
    d = reference['descriptors']
    many = d[np.arange(1100) % 30]
    assert (lfd_distance(many, d[:3]) == reference['distance'][np.arange(1100) % 30][:, :3]).all()
    assert (lfd_distance(d[:3], many) == reference['distance'][:3][:, np.arange(1100) % 30]).all()


def test_shapes_and_types(reference):
    d = reference['descriptors']
    assert type(lfd_distance(d[0], d[1])) is int
    assert lfd_distance(d[0], d).shape == (30,) and lfd_distance(d[:4], d[1]).shape == (4,)
    assert lfd_distance(d[:0], d).shape == (0, 30)
    strided = d[::2, ::-1, ::-1]
    assert (lfd_distance(strided, d) == lfd_distance(strided.copy(), d)).all()
    for bad in (d.astype(int), d[..., :46], d[0, 0], np.zeros(3), [[1]], d[None]):
        with pytest.raises(InputError, match='expected light field descriptors'): lfd_distance(d, bad)
        with pytest.raises(InputError, match='^a: '): lfd_distance(bad, d)
    with pytest.raises(InputError, match='expected .auto'): lfd_distance(d, d, kernel='fast')


@pytest.mark.parametrize('setting', [dict(NUMBA_ENABLE_AVX='0'), dict(NUMBA_CPU_NAME='generic')])
def test_a_processor_without_the_instruction(data, tmp_path, setting):
    "numba told to compile for a lesser machine must neither crash nor change a number."
    code = (f'import numpy as np; from memkit.lfd import *; from memkit.lfd import simd_kind\n'
            f'r = np.load({str(data/"lfd_distance.npz")!r}); d = r["descriptors"]\n'
            f'assert simd_kind() is None and (lfd_distance(d, d) == r["distance"]).all()')
    subprocess.run([sys.executable, '-c', code], check=True, env={**os.environ, **setting, 'NUMBA_CACHE_DIR': str(tmp_path)})
