"""Set scores against the reference code's numbers, and against loops that spell the definitions out."""
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from memkit.core import InputError, make_rng
from memkit.set_scores import auth_pct, coverage_score, duplicate_rate, knn_radii, mmd_score, one_nna, prdc

REFERENCE = json.loads((Path(__file__).parent/'data'/'set_scores_golden.json').read_text())
ids = lambda case: case['id']


def features(case, data, request):
    "The two arrays of a case; the larger ones are only in the full reference set."
    small = np.load(data/'fpd_small.npz')
    if f'{case["id"]}/ref' not in small.files: small = np.load(request.getfixturevalue('golden')/'stats'/case['arrays'])
    return small[f'{case["id"]}/ref'].astype(np.float64), small[f'{case["id"]}/gen'].astype(np.float64)


def expanded(a, b):
    "Distances as the reference computes them, x² − 2xy + y²: a mean of 10⁶ leaves it four digits."
    return np.sqrt(np.maximum((a*a).sum(1)[:, None] - 2*(a @ b.T) + (b*b).sum(1), 0))


@pytest.mark.parametrize('case', REFERENCE['prdc'], ids=ids)
def test_prdc_and_authpct_equal_the_reference(case, data, request):
    ref, gen = features(case, data, request)
    distance = expanded if case['id'] == 'shifted_mean_1e6' else cdist
    for max_gb in (1., 1e-4):
        found = prdc(gen=gen, ref=ref, k=case['k'], max_gb=max_gb, distance=distance)
        for name, value in case['prdc_reference'].items(): assert getattr(found, name) == pytest.approx(value, rel=1e-12, abs=0), (name, max_gb)
    assert float(auth_pct(gen_train=cdist(gen, ref), train_train=cdist(ref, ref))) == pytest.approx(case['authpct_naive'], rel=1e-12, abs=0)


@pytest.mark.parametrize('case', REFERENCE['point_set_scores'], ids=ids)
def test_cov_mmd_and_1nna_equal_the_reference(case):
    rr, rg, gg = (np.array(case[k]) for k in ('d_ref_ref', 'd_ref_gen', 'd_gen_gen'))
    assert float(coverage_score(gen_test=rg.T)) == pytest.approx(case['cov'], rel=1e-12)
    assert float(mmd_score(gen_test=rg.T)) == pytest.approx(case['mmd'], rel=1e-12)
    assert float(mmd_score(gen_test=rg)) == pytest.approx(case['mmd_from_gen'], rel=1e-12)      # what the exchanged sets give
    assert float(one_nna(gen_gen=gg, gen_test=rg.T, test_test=rr)) == pytest.approx(case['one_nna'], rel=1e-12)


def test_a_large_mean_does_not_change_the_scores(data):
    "Unlike the reference, whose density moves from 0.8533 to 0.852."
    X = np.load(data/'fpd_small.npz')
    ref, gen = X['shifted_mean_1e6/ref'], X['shifted_mean_1e6/gen']
    here = prdc(gen=gen, ref=ref)
    assert here == prdc(gen=gen - 1e6, ref=ref - 1e6)
    assert here.density != pytest.approx(next(c for c in REFERENCE['prdc'] if c['id'] == 'shifted_mean_1e6')['prdc_reference']['density'], rel=1e-4)


def loop_prdc(gen, ref, k):
    "The definitions, one shape at a time."
    ball = lambda X, i: sorted(np.linalg.norm(X[i] - X[j]) for j in range(len(X)) if j != i)[k - 1]
    rr, gr = [ball(ref, i) for i in range(len(ref))], [ball(gen, i) for i in range(len(gen))]
    inside = np.array([[np.linalg.norm(g - r) < rr[j] for j, r in enumerate(ref)] for g in gen])
    found = np.array([[np.linalg.norm(g - r) < gr[i] for r in ref] for i, g in enumerate(gen)])
    return inside.any(1).mean(), found.any(0).mean(), inside.sum()/(k*len(gen)), inside.any(0).mean()


@pytest.mark.parametrize('k, m, n', [(1, 2, 3), (3, 9, 4), (5, 6, 17)])
def test_prdc_is_its_definition(k, m, n):
    rng = make_rng(k, 'prdc')
    gen, ref = rng.normal(size=(m, 3)), rng.normal(size=(n, 3))*1.3
    found = prdc(gen=gen, ref=ref, k=k)
    assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(loop_prdc(gen, ref, k))
    assert found.sizes == (m, n)


def test_prdc_refuses_and_flags_what_the_reference_crashes_on_or_misreads():
    x = make_rng(0, 'x').normal(size=(8, 3))
    for gen, ref in ((x[:5], x), (x, x[:5])):
        with pytest.raises(InputError, match='5 shapes and k = 5; expected 1 ≤ k and at least 6 shapes'): prdc(gen=gen, ref=ref)
    with pytest.raises(InputError, match='k = 0'): knn_radii(x, 0)
    bad = x.copy(); bad[3, 1] = np.nan
    for gen, ref in ((bad, x), (x, bad)):
        with pytest.raises(InputError, match='NaN'): prdc(gen=gen, ref=ref)
    equal = prdc(gen=np.ones((9, 3)), ref=np.ones((7, 3)))
    assert (equal.precision, equal.recall, equal.density, equal.coverage) == (0, 0, 0, 0) and len(equal.flags) == 2 and '9 gen balls' in equal.flags[0] and '7 ref balls' in equal.flags[1]
    assert prdc(gen=x, ref=x + .1).flags == ()


def test_a_copy_of_the_training_set_is_perfect_for_prdc_and_nothing_for_authpct():
    x = make_rng(1, 'x').normal(size=(60, 3))
    p, D = prdc(gen=x, ref=x), cdist(x, x)
    assert (p.precision, p.recall, p.density, p.coverage) == (1, 1, 1, 1)
    assert float(auth_pct(gen_train=D, train_train=D)) == 0


def test_authpct_is_strict():
    assert float(auth_pct(gen_train=[[0, 0, 3]], train_train=[[0, 0, 3], [0, 0, 3], [3, 3, 0]])) == 0     # a copy of a training shape that occurs twice
    assert float(auth_pct(gen_train=[[2, 5, 5], [1, 5, 5]], train_train=[[0, 1, 9], [1, 0, 9], [9, 9, 0]])) == 50


def test_any_distance_serves():
    from memkit.distances import get_distance
    from memkit.shapes import shape_set
    cd = get_distance('cd')
    x = np.stack([cd.describe(*s.mesh(16)) for s in shape_set(12, 3, categories=['mug', 'chair'])])[:, :64]
    p = prdc(gen=x[:6], ref=x[6:], k=2, distance=cd.pairwise)
    assert 0 <= p.precision <= 1 and p.sizes == (6, 6)
    X = dict(gen_gen=cd.pairwise(x[:6], x[:6]), gen_test=cd.pairwise(x[:6], x[6:]), test_test=cd.pairwise(x[6:], x[6:]))
    assert 0 <= float(one_nna(**X)) <= 1 and float(duplicate_rate(gen_gen=X['gen_gen'], threshold=1e9)) == 1


@pytest.mark.parametrize('score, args', [(coverage_score, 1), (mmd_score, 1), (one_nna, 3), (auth_pct, 2), (duplicate_rate, 1), (prdc, 2)])
def test_sets_must_be_named(score, args):
    with pytest.raises(TypeError): score(*[np.ones((9, 9))]*args)


def test_1nna_flags_ties_and_unequal_sizes_and_keeps_integers_exact():
    same = one_nna(gen_gen=[[0, 1], [1, 0]], gen_test=[[1, 1], [1, 1]], test_test=[[0, 1], [1, 0]])
    assert float(same) == .5 and same.flags == ('4 ties between the sets',)
    assert any('unequal' in f for f in one_nna(gen_gen=np.zeros((1, 1)), gen_test=[[2., 1.]], test_test=[[0, 3.], [3, 0]]).flags)
    assert 'cannot be reached' in coverage_score(gen_test=np.ones((1, 2))).flags[0]


def test_diagonals_are_not_used():
    rng = make_rng(2, 'd')
    g, t = rng.normal(size=(7, 2)), rng.normal(size=(8, 2))
    gg, gt, tt = cdist(g, g), cdist(g, t), cdist(t, t)
    a = float(one_nna(gen_gen=gg, gen_test=gt, test_test=tt)), float(auth_pct(gen_train=gt, train_train=tt)), float(duplicate_rate(gen_gen=gg))
    gg, tt = gg + 5*np.eye(7), tt + 5*np.eye(8)
    assert a == (float(one_nna(gen_gen=gg, gen_test=gt, test_test=tt)), float(auth_pct(gen_train=gt, train_train=tt)), float(duplicate_rate(gen_gen=gg)))
    assert a[2] == 0


def test_matrices_that_do_not_fit_are_named():
    with pytest.raises(InputError, match='test_test: .*a row for each test shape'): one_nna(gen_gen=np.ones((2, 2)), gen_test=np.ones((2, 3)), test_test=np.ones((2, 2)))
    with pytest.raises(InputError, match='train_train'): auth_pct(gen_train=np.ones((2, 3)), train_train=np.ones((2, 2)))
    with pytest.raises(InputError, match='gen_gen'): duplicate_rate(gen_gen=np.ones((2, 3)))
    with pytest.raises(InputError, match='object'): mmd_score(gen_test=np.array([[None]]))
