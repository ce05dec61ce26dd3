"memkit.fpd against reference numbers, closed forms and identities."
import json

import numpy as np
import pytest

from memkit.core import InputError, make_rng
from memkit.fpd import (FeatureStats, _cross_cholesky, _cross_eigen, _leave_out, _record, _unbiased, fd_infinity, fd_report, feature_label, feature_stats, frechet,
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
        for result in (got, merged, _record([moments(x), moments(y)], 'eigen', _cross_eigen([moments(x), moments(y)]))):
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
