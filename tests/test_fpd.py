"memkit.fpd against reference numbers, closed forms and identities."
import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from memkit.core import InputError, make_rng
from memkit.features import _tokens
from memkit.fpd import (_cross_eigen, _leave_out, _record, fd_infinity, fd_report, feature_label, feature_stats, frechet,
                        frechet_distance, jackknife_fd, kernel_distance, lfd94, load_features, load_stats, moments, save_stats)


@pytest.fixture(scope='session')
def small(data):
    "The committed part of the reference cases: id → (expected, ref, gen)."
    return load_cases(data/'fpd_golden.json', data/'fpd_small.npz')


@pytest.fixture(scope='session')
def full(golden):
    "All reference cases."
    return load_cases(golden/'stats'/'golden_fpd.json', golden/'stats'/'golden_fpd.npz')


def load_cases(numbers, arrays):
    with np.load(arrays, allow_pickle=False) as z:
        cases = {c['id']: c['expected'] for c in json.loads(numbers.read_text())['cases']}
        return {k: (e, z[f'{k}/ref'], z[f'{k}/gen']) for k, e in cases.items() if f'{k}/ref' in z}


def check_fd(cases, least):
    n_paper = n_exact = 0
    for key, (expected, x, y) in cases.items():
        if key == 'nan_in_ref':
            for mode in ('exact', 'paper'):
                with pytest.raises(InputError, match='ref: 1 of 30 rows hold NaN'): frechet_distance(x, y, mode)
            continue
        scale = sum(np.trace(moments(v).cov) for v in (x, y))
        truth, got = expected['truth_ddof0']['value'], frechet(x, y)
        tol = 1e-9 if key == 'shifted_mean_1e6' else 1e-9*scale
        merged = frechet(moments(x), moments(y))
        states = [moments(x), moments(y)]
        forced = [_record(states, 'eigen', _cross_eigen(states))] if x.shape[1] < 1000 else []   # the slowest route, also where it is not chosen
        for result in (got, merged, *forced):
            assert abs(result.raw - truth) <= tol, (key, result)
            assert abs(result.raw - truth) <= result.bound + 4e-16*scale, (key, result)   # the reference rounds, too
        assert got.value >= 0 and merged.ranks == got.ranks, key
        n_exact += 1
        if 'value' in expected['paper_fd']:
            assert abs(frechet_distance(x, y, 'paper') - expected['paper_fd']['value']) <= 1e-8*scale + 1e-12, key
            n_paper += 1
    assert (n_paper, n_exact) == least


def test_reference_small(small): check_fd(small, (16, 17))


def test_reference_full(full): check_fd(full, (26, 27))


def test_paper_mode_where_the_released_code_stops(small):
    _, x, y = small['d1']
    assert abs(frechet_distance(x, y, 'paper') - ((x.mean() - y.mean())**2 + (x.std() - y.std())**2)) < 1e-12
    _, x, y = small['n1_n1']
    assert abs(frechet_distance(x, y, 'paper') - (((x - y)**2).sum() - 5*2e-6)) < 1e-12
    assert abs(frechet_distance(x, y) - ((x - y)**2).sum()) < 1e-14


def test_it_is_ddof_0(small):
    _, x, y = small['duplicated_rows']      # every row of ref seven times: the same distribution
    assert len(y) == 7*len(x) and frechet_distance(x, y) < 1e-14


def check_kd(cases, least):
    n = 0
    for key, (expected, x, y) in cases.items():
        if key == 'nan_in_ref':
            with pytest.raises(InputError, match='ref: 1 of 30 rows'): kernel_distance(x, y)
            continue
        if min(len(x), len(y)) < 2:
            with pytest.raises(InputError, match='at least 2 shapes'): kernel_distance(x, y)
            continue
        got, k = kernel_distance(x, y, 'none'), min(len(x), len(y))
        assert abs(got.value - expected['kd_naive_all_rows']['value']) <= 1e-9*got.largest, key
        first = kernel_distance(x[:k], y[:k], 'none')
        assert abs(first.value - expected['kd_tf_first_min_rows']['value']) <= 1e-9*first.largest, key
        name = next(e for e in expected if e.startswith('kid_tf_seed2020_'))
        subsets, size = map(int, name.split('_')[-1].split('x'))
        drawn = kernel_distance(x, y, 'none', subsets=subsets, size=size, seed=2020)
        assert abs(drawn.value - expected[name]['value']) <= 1e-9*drawn.largest and drawn.se is None, key
        n += 1
    assert n == least


def test_kernel_distance_small(small): check_kd(small, 16)


def test_kernel_distance_full(full): check_kd(full, 26)


def test_kernel_distance_leaves_the_global_generator_alone():
    before = np.random.get_state()[1].copy()
    x = make_rng(0).normal(size=(9, 3))
    kernel_distance(x, x, subsets=2, size=5)
    fd_infinity(np.tile(x, (3, 1)), np.tile(x, (3, 1)))
    assert (np.random.get_state()[1] == before).all()


features = st.tuples(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(2, 40), st.integers(1, 12))


def draw(case):
    seed, n, m, d = case
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d))*rng.gamma(1, size=d), rng.normal(size=(m, d)) + rng.normal(size=d), rng


@settings(max_examples=60, deadline=None)
@given(features)
def test_identities(case):
    x, y, rng = draw(case)
    fd = frechet(x, y)
    tol = fd.bound + 1e-12*fd.scale
    # between nothing to gain and everything to gain from the covariances
    trace = fd.scale - 2*np.sqrt(np.trace(moments(x).cov)*np.trace(moments(y).cov))
    assert fd.mean_term + trace - tol <= fd.value <= fd.mean_term + fd.scale + tol
    assert abs(fd.value - frechet_distance(y, x)) <= 2*tol
    self = frechet(x, x)
    assert self.value <= self.bound + 1e-12*self.scale
    shift = rng.normal(size=x.shape[1])
    assert abs(frechet_distance(x, x + shift) - shift @ shift) <= 1e-8*(self.scale + shift @ shift)
    assert abs(frechet_distance(3*x, 3*y) - 9*fd.value) <= 9*tol + 9e-8*fd.scale
    Q = np.linalg.qr(rng.normal(size=(x.shape[1],)*2))[0]
    assert abs(frechet_distance(x @ Q, y @ Q) - fd.value) <= 1e-7*(fd.scale + fd.value)
    assert abs(frechet(moments(x), moments(y)).value - fd.value) <= 1e-7*(fd.scale + fd.value)


@settings(max_examples=40, deadline=None)
@given(features, st.lists(st.integers(1, 40), max_size=4))
def test_streaming_equals_one_pass_and_merging_is_associative(case, cuts):
    x, y, _ = draw(case)
    x = np.concatenate([x, np.resize(y, (len(y), x.shape[1]))])
    ids = [f'{i}' for i in range(len(x))]
    edges = sorted({0, len(x), *(c % len(x) for c in cuts)})
    parts = [feature_stats(x[a:b], ids[a:b], groups=4) for a, b in zip(edges, edges[1:])]
    left, right = parts[0], parts[-1]
    for p in parts[1:]: left = left.merge(p)
    for p in parts[-2::-1]: right = p.merge(right)
    whole = feature_stats(x, ids, groups=4)
    for s in (left, right):
        assert s.digest == whole.digest and [g.count for g in s.groups] == [g.count for g in whole.groups]
        np.testing.assert_allclose(s.m2, whole.m2, rtol=0, atol=1e-11*np.trace(whole.m2) + 1e-300)
        np.testing.assert_allclose(s.mean, x.mean(0), rtol=0, atol=1e-12*np.abs(x).max())
    np.testing.assert_allclose(whole.m2, (x - x.mean(0)).T @ (x - x.mean(0)), rtol=0, atol=1e-11*np.trace(whole.m2) + 1e-300)


def test_a_far_mean_costs_no_digits():
    x = make_rng(0).normal(size=(5000, 3))
    far = moments(x + 1e7)
    np.testing.assert_allclose(far.cov, np.cov((x + 1e7 - 1e7).T, ddof=0), rtol=0, atol=1e-8)


def test_a_float32_table_is_averaged_in_float64():
    x = make_rng(0).normal(size=(20000, 2)).astype(np.float32) + np.float32(1000)
    np.testing.assert_allclose(moments(x, block=512).cov, np.cov(x.T.astype(float), ddof=0), rtol=1e-12)


def test_refused_merges_leave_the_state_alone(tmp_path):
    x = make_rng(0).normal(size=(50, 3))
    s = feature_stats(x, range(50), 'FPD[uni3d-g, ddof=0]', weights='ab'*32)
    before = s.m2.copy()
    for other, message in ((feature_stats(x[:5], range(5), s.label, weights=s.weights), '5 of the 5 ids'),
                           (feature_stats(x[:5], range(49, 54), s.label, weights=s.weights), '1 of the 5 ids'),
                           (feature_stats(x, range(50, 100), 'FPD[uni3d-b, ddof=0]', weights=s.weights), 'uni3d-g.*uni3d-b'),
                           (feature_stats(x, range(50, 100), s.label, weights='cd'*32), 'abababababab.*cdcdcdcdcdcd'),
                           (feature_stats(x, range(50, 100), s.label, weights=s.weights, normalisation='whitened'), 'none.*whitened'),
                           (feature_stats(x[:, :2], range(50, 100), s.label, weights=s.weights), 'expected the same')):
        with pytest.raises(InputError, match=message): s.merge(other)
    with pytest.raises(InputError, match='uni3d-g.*uni3d-b'):
        frechet_distance(s, feature_stats(x, range(50, 100), 'FPD[uni3d-b, ddof=0]', weights=s.weights))
    assert (s.m2 == before).all() and s.count == 50
    loaded = load_stats(save_stats(tmp_path/'s.npz', s))
    assert (loaded.m2 == before).all() and loaded.tokens == s.tokens and loaded.weights == s.weights
    with pytest.raises(InputError, match='50 of the 50 ids'): s.merge(loaded)


def test_statistics_files_damaged_anywhere_are_refused(tmp_path):
    good = save_stats(tmp_path/'s.npz', feature_stats(make_rng(0).normal(size=(30, 2)), range(30), groups=2)).read_bytes()
    bad, reference, rng, refused = tmp_path/'bad.npz', load_stats(tmp_path/'s.npz'), make_rng(1), 0
    for i in range(150):
        data = bytearray(good)
        if i % 2: data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        else: del data[int(rng.integers(len(data))):]
        bad.write_bytes(data)
        try: got = load_stats(bad)
        except InputError as e: refused += 'bad.npz' in str(e)
        else: assert (got.m2 == reference.m2).all() and got.tokens == reference.tokens and got.count == 30   # a byte that nothing depends on
    assert refused > 100


def test_load_features_of_the_papers_archives(tmp_path):
    x = np.arange(6.).reshape(3, 2)
    for key in ('arr', 'X', 'features', 'emb', 'embeddings', 'data'):
        np.savez(tmp_path/'f.npz', extra=np.zeros(3), **{key: x})
        assert (load_features(tmp_path/'f.npz') == x).all()
    np.savez(tmp_path/'f.npz', data=x + 1, features=x)
    assert (load_features(tmp_path/'f.npz') == x).all()
    (tmp_path/'text.npy').write_text('hello')
    with pytest.raises(InputError, match='text.npy'): load_features(tmp_path/'text.npy')
    with pytest.raises(InputError, match='FileNotFoundError'): load_features(tmp_path/'none.npy')


def test_jackknife_interval_covers_the_truth_and_the_plain_value_does_not():
    d, n, reps = 8, 160, 120
    hit, raw = 0, []
    rng = make_rng(0, 'coverage')
    truth = d*.2**2 + d*.3**2
    for _ in range(reps):
        x, y = rng.normal(size=(n, d)), 1.3*rng.normal(size=(n, d)) + .2
        _, _, (low, high) = jackknife_fd(feature_stats(x, range(n)), feature_stats(y, range(n)))
        hit, raw = hit + (low <= truth <= high), raw + [frechet_distance(x, y)]
    assert .88 <= hit/reps <= 1 and np.mean(raw) > 1.15*truth


def test_leave_out_equals_recomputation():
    x, y = make_rng(0).normal(size=(90, 5)), make_rng(1).normal(size=(80, 5))
    s = feature_stats(x, range(90), groups=7)
    fast, size = _leave_out(s, moments(y))
    group = _tokens(x, range(90))[0] % np.uint64(7)
    slow = [frechet_distance(x[group != k], y) for k in range(7)]
    np.testing.assert_allclose(fast, slow, rtol=1e-8)
    assert list(size) == list(np.bincount(group.astype(int), minlength=7))


def test_degenerate_sets_get_a_value_and_no_nan():
    same = np.ones((40, 3))
    report = fd_report(same, same)
    assert report.fd == 0 and report.fd_ci is None and 'one_group' in report.flags
    line = np.outer(np.arange(60.), [1, 2, 3])
    report = fd_report(line, line + 1, ids_ref=range(60), ids_gen=range(60))
    assert report.exact.ranks == (1, 1) and 'rank_deficient' in report.flags and abs(report.fd - 3) < 1e-8
    assert np.isfinite([report.fd_corrected, report.fd_se]).all()
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize('n, flagged', [(8, True), (9, False)])
def test_undersampled_up_to_two_shapes_per_dimension(n, flagged):
    x, y = make_rng(0).normal(size=(n, 4)), make_rng(1).normal(size=(50, 4))
    report = fd_report(x, y, ids_ref=range(n), ids_gen=range(50))
    assert ('undersampled' in report.flags) == flagged == (report.fd_ci is None)


def test_lfd94_is_mean_and_spread_over_views_in_any_order():
    x = make_rng(0).integers(0, 256, (5, 10, 10, 47), dtype=np.uint8)
    order = make_rng(1).permutation(100)
    turned = x.reshape(5, 100, 47)[:, order].reshape(x.shape)
    got = lfd94(x)
    assert got.shape == (5, 94) and (got == lfd94(turned)).all()
    np.testing.assert_allclose(got[:, :47], x.mean((1, 2)))
    np.testing.assert_allclose(got[:, 47:], x.std((1, 2)), rtol=1e-12)
    assert fd_report(got, got, label=feature_label('lfd94')).label == 'FD[lfd94]'


def test_labels():
    assert feature_label('uni3d-g', 'xyz+0rgb', '10000pt') == 'FPD[uni3d-g, xyz+0rgb, 10000pt, l2norm=no, ddof=0]'
    assert feature_label('lfd94') == 'FD[lfd94]' and feature_label('clip').startswith('FD[clip')


def test_a_statistics_file_whose_content_was_exchanged_is_refused(tmp_path):
    good = save_stats(tmp_path/'s.npz', feature_stats(make_rng(0).normal(size=(30, 2)), range(30), groups=2))
    with np.load(good) as z: parts = dict(z)
    for change in (dict(tokens=parts['tokens'][::2]), dict(counts=parts['counts'] + 1), dict(scatters=parts['scatters']*np.nan)):
        np.savez(tmp_path/'bad.npz', **{**parts, **change})
        with pytest.raises(InputError, match='bad.npz: count or ids do not match'): load_stats(tmp_path/'bad.npz')


@pytest.mark.parametrize('n, route', [(9, 'features'), (400, 'cholesky')])
def test_small_but_real_directions_count_in_the_rank(n, route):
    x = make_rng(0).normal(size=(n, 12))*np.logspace(0, -4, 12)      # variances from 1 down to 1e-8
    result = frechet(x, x[::-1] + 1.)
    assert result.route == route and result.ranks == (min(n - 1, 12),)*2


def test_the_rounding_bound_knows_of_ill_conditioning():
    x, y = make_rng(0).normal(size=(300, 8)), make_rng(1).normal(size=(300, 8))
    Q = np.linalg.qr(make_rng(2).normal(size=(8, 8)))[0]
    well, ill = frechet(x, y), frechet(x @ np.diag(np.logspace(0, -4, 8)) @ Q, y @ np.diag(np.logspace(0, -4, 8)) @ Q)
    assert well.route == ill.route == 'cholesky'
    assert ill.bound/ill.scale > 30*well.bound/well.scale
