"Z_U and its company against the paper's own numbers, closed forms, other people's code and simulation."
import json, math, time, tracemalloc, warnings
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from memkit import zu
from memkit.cells import c_t, cell_table, holm
from memkit.core import InputError, make_rng
from memkit.zu import auc, auc_difference, auc_interval, min_detectable_auc, p_values, placements, plan, verdict, z_scores, z_u, zu_report

pytestmark = pytest.mark.filterwarnings('ignore:.*infinite:UserWarning')
distances = st.lists(st.integers(-5, 30), min_size=1, max_size=12)


def numbers(values): return [float(x) for x in values]   # nan and inf are strings in the file


@pytest.fixture(scope='module')
def stored(): return json.loads((__import__('pathlib').Path(__file__).parent/'data'/'zu_golden.json').read_text())['cases']


def sides(c):
    "(d_gen, d_test) of a stored case; None where they are kept elsewhere."
    if c['kind'] == 'zu_features': return c['cross']['LQm'], c['cross']['LPn']
    if c['kind'] == 'zu_distances' and not c.get('npz'): return numbers(c['gen']), numbers(c['test'])


# the paper's numbers

def test_z_u_is_the_papers(stored):
    seen = 0
    for c in stored:
        if not (pair := sides(c)): continue
        want = c['expected'].get('value')
        if want is None or want == 'nan':
            with pytest.raises(InputError): z_u(*pair)
        else:
            assert z_u(*pair) == pytest.approx(want, rel=1e-12, abs=1e-15), c['id']
            assert zu_report(*pair).z_u == z_u(*pair)
        seen += 1
    assert seen == 33


def test_lfd_like_thousand(stored, data):
    c, = [c for c in stored if c['id'] == 'lfd_like_1000_1000']
    arrays = np.load(data/'zu_golden_lfd.npz')
    assert z_u(arrays['gen'], arrays['test']) == pytest.approx(c['expected']['value'], rel=1e-12)
    assert z_u(arrays['gen'].astype(np.uint16), arrays['test'].tolist()) == pytest.approx(c['expected']['value'], rel=1e-12)


def test_z_u_is_the_papers_at_size(stored, golden):
    arrays = np.load(golden/'stats'/'golden_zu_large.npz')
    large = [c for c in stored if c.get('npz')]
    for c in large:
        pair = arrays[c['id'] + '/gen'], arrays[c['id'] + '/test']
        assert z_u(*pair) == pytest.approx(c['expected']['value'], rel=1e-12), c['id']
        check_cross(c, pair)
    assert len(large) == 5


def check_cross(c, pair):
    x, z = c['cross'], z_scores(*pair)
    assert auc(*pair) == pytest.approx(x['A'], rel=1e-12, abs=1e-15), c['id']
    assert z['plain'] == pytest.approx(x['z_plain'], rel=1e-9, abs=1e-12), c['id']
    assert z['sd_tie'] == pytest.approx(x['sd_tie'], rel=1e-9), c['id']
    off = x['U'] - x['n']*x['m']/2
    if x['sd_tie']: assert z['tie'] == pytest.approx(math.copysign(max(abs(off) - 0.5, 0), off)/x['sd_tie'], rel=1e-9), c['id']
    p = p_values(*pair, exact=False)
    for mine, theirs in (('p_mem', 'less'), ('p_under', 'greater'), ('p_two', 'two-sided')):
        assert p[mine] == pytest.approx(x[f'p_asymptotic_{theirs}'], rel=1e-7, abs=1e-15), (c['id'], mine)
    if 'p_exact_less' in x and x['n']*x['m'] <= 10_000:
        p = p_values(*pair, exact=True)
        assert (p['p_method'], p['p_mem'], p['p_under']) == ('exact', pytest.approx(x['p_exact_less'], rel=1e-9), pytest.approx(x['p_exact_greater'], rel=1e-9)), c['id']
    if isinstance(x.get('delong_var_naive'), float) and 0 < x['A'] < 1 and x['delong_var_naive'] > 0:
        assert auc_interval(*pair)['se']**2 == pytest.approx(x['delong_var_naive'], rel=1e-9), c['id']


def test_everything_else_agrees_with_scipy(stored):
    checked = 0
    for c in stored:
        if c.get('cross') and (pair := sides(c)): check_cross(c, pair); checked += 1
    assert checked == 29


def within_cells(c):
    "Distances of the stored features to their nearest training row in the same cell, inf where the cell has none."
    out = []
    train, where = np.array(c['T'], float), np.array(c['T_cells'])
    for rows, cells in ((c['Qm'], c['Qm_cells']), (c['Pn'], c['Pn_cells'])):
        found = []
        for x, cell in zip(np.array(rows, float), cells):
            near = train[where == cell]
            found.append(np.sqrt(((near - x)**2).sum(1)).min() if len(near) else np.inf)
        out.append(np.array(found))
    return out


def test_cells_are_the_papers(stored):
    values = refused = 0
    for c in [c for c in stored if c['kind'] == 'cells']:
        args = *within_cells(c), c['Qm_cells'], c['Pn_cells'], c['T_cells']
        for want in c['expected_C_T']:
            if 'value' in want:
                got = c_t(*args, tau=want['tau'], strict=True)
                if want['value'] == 'nan': assert (got.c_t, got.status) == (None, 'no_cell_passes'); continue
                assert got.c_t == pytest.approx(want['value'], rel=1e-12), (c['id'], want['tau'])
                assert [r['z_u'] for r in got.cells] == pytest.approx(c['expected_zu_cells']['value'], rel=1e-12), c['id']
                values += 1
            else:       # the paper's code stops, one way or another; memkit says which cell, or goes on without it
                with pytest.raises(InputError, match='no held-out shapes|no training shapes'): c_t(*args, tau=want['tau'], strict=True)
                assert [r['z_u'] for r in c_t(*args, tau=want['tau']).cells].count(None) == 1
                refused += 1
    assert (values, refused) == (13, 3)


# closed forms and invariants

@pytest.mark.parametrize('m, n', [(1, 1), (3, 7), (40, 2), (500, 700)])
def test_bounds(m, n):
    bound, half = math.sqrt(3*m*n/(m + n + 1)), 0.5/math.sqrt(m*n*(m + n + 1)/12)
    near, far = np.arange(m), np.arange(n) + m
    assert z_u(near, far) == pytest.approx(-bound + half, rel=1e-13)
    assert z_u(far[:n], near) == pytest.approx(bound + half, rel=1e-13)
    assert z_scores(near, far)['plain'] == pytest.approx(-bound, rel=1e-13)
    assert (auc(near, far), auc(far, near)) == (1, 0)
    assert z_u(np.ones(m), np.ones(n)) == pytest.approx(half, rel=1e-13)


@given(distances, distances)
def test_pairs_one_by_one(gen, test):
    u = sum((q > p) + 0.5*(q == p) for q in gen for p in test)
    m, n = len(gen), len(test)
    assert z_u(gen, test) == pytest.approx((u - n*m/2 + 0.5)/math.sqrt(n*m*(n + m + 1)/12), rel=1e-12, abs=1e-14)
    assert auc(gen, test) == pytest.approx(1 - u/(n*m), abs=1e-15)
    v, w = placements(gen, test)
    assert v == pytest.approx([np.mean([(p > q) + 0.5*(p == q) for p in test]) for q in gen])
    assert w == pytest.approx([np.mean([(q < p) + 0.5*(p == q) for q in gen]) for p in test])


@given(distances, distances, st.sampled_from([np.exp, np.cbrt, lambda x: 3*x - 7, lambda x: x.astype(np.float32)]))
def test_only_the_order_counts(gen, test, increasing):
    gen, test = np.array(gen), np.array(test)
    a, b = zu_report(gen, test), zu_report(increasing(gen.astype(float)), increasing(test.astype(float)))
    for key in ('z_u', 'auc', 'auc_ci', 'z_tie', 'p_mem', 'p_two', 'se', 'min_detectable_auc'): assert getattr(a, key) == getattr(b, key)


@given(distances, distances, st.randoms(use_true_random=False))
def test_the_order_given_does_not_count(gen, test, random):
    a = zu_report(gen, test)
    random.shuffle(gen); random.shuffle(test)
    b = zu_report(gen, test)
    assert (a.z_u, a.auc, a.p_two) == (b.z_u, b.auc, b.p_two) and a.auc_ci == pytest.approx(b.auc_ci, abs=1e-12)


@given(distances, distances)
def test_mirror(gen, test):
    a, b = z_scores(gen, test), z_scores(test, gen)
    assert (a['plain'], a['tie']) == (-b['plain'], -b['tie'])
    assert a['paper'] + b['paper'] == pytest.approx(1/a['sd'], rel=1e-9)
    assert auc(gen, test) + auc(test, gen) == pytest.approx(1, abs=1e-15)
    low, high = auc_interval(gen, test)['ci']
    assert auc_interval(test, gen)['ci'] == pytest.approx((1 - high, 1 - low), abs=1e-9)
    p, q = p_values(gen, test), p_values(test, gen)
    assert (p['p_mem'], p['p_two']) == pytest.approx((q['p_under'], q['p_two']), rel=1e-9)


@given(distances, distances)
def test_report_is_sound(gen, test):
    r = zu_report(gen, test)
    assert 0 <= r.auc_ci[0] <= r.auc <= r.auc_ci[1] <= 1 and r.z_u_ci[0] <= r.z_u + 1e-12 and r.z_u <= r.z_u_ci[1] + 1e-12
    assert 0 < r.p_mem <= 1 and 0 < r.p_two <= 1
    assert verdict(r)[0] in ('copying', 'no evidence', 'underpowered')
    if verdict(r)[0] == 'copying': assert r.p_mem <= 0.025 and r.z_u < 0
    json.dumps(r.to_dict(), allow_nan=False)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_exact_p_by_enumeration(gen, test):
    pool, u = np.array(gen + test), z_scores(gen, test)['plain']
    every = np.array([z_scores(pool[list(c)], np.delete(pool, c))['plain'] for c in combinations(range(len(pool)), len(gen))])
    p = p_values(gen, test, exact=True)
    assert (p['p_mem'], p['p_under']) == pytest.approx(((every <= u + 1e-9).mean(), (every >= u - 1e-9).mean()), rel=1e-12)


def test_permutation_is_seeded_and_right():
    rng = np.random.default_rng(0)
    gen, test = rng.integers(0, 40, 6), rng.integers(3, 50, 900)
    drawn, counted = zu._permutation_p(gen, test, seed=3), zu._exact_p(gen, test)
    assert drawn == pytest.approx(counted, abs=5*math.sqrt(0.25/1e5))
    assert drawn == zu._permutation_p(gen, test, seed=3) != zu._permutation_p(gen, test, seed=4)
    gen, test = rng.normal(-0.35, 1, 40), rng.normal(size=300)       # a sizeable part of all: drawing with replacement would show
    low, want = zu._permutation_p(gen, test)[0], zu._exact_p(gen, test)[0]
    assert 0.005 < want < 0.08 and abs(low - want) < 4*math.sqrt(want/1e5)
    p = p_values([-1.]*9, np.arange(5000), seed=1)
    assert (p['p_method'], p['p_mem']) == ('permutation', 1/100_001)


def test_exact_is_not_for_many():
    assert p_values(np.arange(60), np.arange(60), exact=True)['p_method'] == 'normal'
    assert p_values(np.arange(19), np.arange(60))['p_method'] == 'exact'
    assert p_values(np.arange(20), np.arange(60))['p_method'] == 'normal'


# intervals

@pytest.mark.parametrize('a, m, n', [(1, 5, 5), (0, 30, 8), (0.5, 1, 1), (0.9, 1, 40), (0.7, 50, 50)])
def test_newcombe_solves_its_equation(a, m, n):
    z2, k = stats.norm.ppf(0.975)**2, (m + n)/2 - 1
    low, high = zu._newcombe(a, m, n)
    inside = lambda t: (a - t)**2 <= z2*t*(1 - t)*(1 + k*(1 - t)/(2 - t) + k*t/(1 + t))/(m*n)
    assert 0 <= low <= a <= high <= 1
    for t in np.linspace(0, 1, 1001):
        if min(abs(t - low), abs(t - high)) > 1e-6: assert inside(t) == (low < t < high), t


def test_coverage_of_the_interval():
    rng, hits = make_rng(0, 'coverage'), 0
    for _ in range(600): hits += (lambda ci: ci[0] <= 0.8 <= ci[1])(auc_interval(rng.normal(-math.sqrt(2)*stats.norm.ppf(0.8), 1, 30), rng.normal(size=50))['ci'])
    assert 0.925 < hits/600 < 0.975


def test_clusters_restore_coverage():
    rng, hits, naive, alarms = make_rng(0, 'clusters'), 0, 0, 0
    groups = np.arange(200)//4
    for _ in range(400):
        gen, test = (math.sqrt(0.9)*rng.normal(size=50)[groups] + math.sqrt(0.1)*rng.normal(size=200) for _ in 'QP')
        r = zu_report(gen, test, groups, groups)
        hits += r.auc_ci[0] <= 0.5 <= r.auc_ci[1]
        naive += (lambda ci: ci[0] <= 0.5 <= ci[1])(auc_interval(gen, test)['ci'])
        alarms += verdict(r)[0] == 'copying'
    assert 0.92 < hits/400 < 0.98
    assert naive/400 < 0.8
    assert alarms/400 < 0.05
    assert 3 < r.design_effect < 4.5 and r.min_detectable_auc > 1.5*min_detectable_auc(200, 200) - 0.25
    assert r.p_method == 'cluster' and r.se_method == 'cluster' and r.units == (50, 50)
    assert r.z_cluster == pytest.approx((0.5 - r.auc)/r.se)


def test_groups_of_one_change_nothing():
    rng = make_rng(1)
    gen, test = rng.normal(size=60), rng.normal(0.3, 1, 80)
    a, b = auc_interval(gen, test), auc_interval(gen, test, [f'prompt {i}' for i in range(60)], None)
    assert a['se'] == pytest.approx(b['se'], rel=1e-12) and b['design_effect'] == pytest.approx(1)
    assert b['ci'][0] == pytest.approx(a['ci'][0], abs=0.002)      # Student's t with some 130 degrees of freedom


def test_groups_stay_with_their_shapes():
    rng = make_rng(2)
    groups = rng.integers(0, 25, 100)
    gen, test = rng.normal(size=25)[groups] + rng.normal(size=100)/3, rng.normal(size=90)
    right, mixed = zu_report(gen, test, groups), zu_report(gen, test, rng.permutation(groups))
    v, w = placements(gen, test)
    by_hand = 25/24*sum((v[groups == g] - v.mean()).sum()**2 for g in range(25))/100**2 + w.var(ddof=1)/90
    assert right.se == pytest.approx(math.sqrt(by_hand), rel=1e-9) and right.se > 1.3*mixed.se
    part = w.var(ddof=1)/90
    df = by_hand**2/((by_hand - part)**2/24 + part**2/89)       # Welch and Satterthwaite
    half = stats.t.ppf(0.975, df)*right.se/right.auc/(1 - right.auc)
    assert right.auc_ci == pytest.approx([1/(1 + (1/right.auc - 1)*math.exp(s*half)) for s in (1, -1)], rel=1e-9)


def test_one_group_proves_nothing():
    r = zu_report(np.arange(100), np.arange(100) + 1000, ['the same'] * 100, None)
    assert r.auc == 1 and r.auc_ci[0] < 0.5 and verdict(r)[0] != 'copying'
    assert r.p_mem == pytest.approx(1/101)
    json.dumps(r.to_dict(), allow_nan=False)


def test_paired_difference_against_resampling():
    rng = make_rng(5)
    test = rng.gamma(4, size=60)
    a, b = rng.gamma(4, size=300)*0.7, rng.gamma(4, size=300)*0.9
    found = auc_difference(a, test, b)
    draws = []
    for _ in range(800):
        t, i, j = rng.integers(0, 60, 60), rng.integers(0, 300, 300), rng.integers(0, 300, 300)
        draws.append(auc(a[i], test[t]) - auc(b[j], test[t]))
    assert found['se'] == pytest.approx(np.std(draws), rel=0.12)
    assert found['difference'] == pytest.approx(auc(a, test) - auc(b, test), abs=1e-15)
    same = auc_difference(a, test, a)
    assert (same['difference'], same['p_two']) == (0, 1)
    apart = auc_difference([0]*9, [1]*9, [2]*7)      # 1 and 0, no scatter: square and add
    (low, _), (_, high) = auc_interval([0]*9, [1]*9)['ci'], auc_interval([2]*7, [1]*9)['ci']
    assert apart['ci'] == pytest.approx((1 - math.hypot(1 - low, high), 1), abs=1e-9)
    other = auc_difference(a, test, b, test_b := test*2)
    assert other['auc_b'] == auc(b, test_b)


# power

def test_the_table_of_the_plan():
    table = {0.52: (3271, 2577, 1636, 1289), 0.55: (524, 413, 262, 207), 0.6: (131, 104, 66, 52), 0.7: (33, 26, 17, 13)}
    for a, want in table.items():
        two, one = plan(a), plan(a, sides=1)
        assert (two['m'], one['m'], two['smallest'], one['smallest']) == want
    assert [plan(0.55, n)['m'] for n in (261, 262, 300, 500, 1000)][0] is None
    assert [plan(0.55, n)['m'] for n in (300, 500, 1000)] == [2046, 549, 355]
    assert 'impossible with 261' in plan(0.55, 261)['text']


@pytest.mark.parametrize('a, n', [(0.55, None), (0.6, 80), (0.4, 200)])
def test_plan_and_min_detectable_agree(a, n):
    p = plan(a, n)
    reach = lambda m: min_detectable_auc(m, p['n'] if n else m) - 0.5
    assert reach(p['m']) <= abs(a - 0.5) < reach(p['m'] - 1)


def test_power_is_as_promised():
    rng, found = make_rng(0, 'power'), 0
    n = plan(0.6)['m']
    for _ in range(600): found += p_values(rng.normal(-math.sqrt(2)*stats.norm.ppf(0.6), 1, n), rng.normal(size=n))['p_two'] < 0.05
    assert 0.75 < found/600 < 0.85


# edge cases

@pytest.mark.parametrize('gen, test, said', [
    ([], [1], 'd_gen is empty'), ([1], [], 'd_test is empty'), ([1, np.nan], [1], '1 of 2 distances are NaN'), ([1], [None, 2], 'd_test: 1 of 2'),
    (['a'], [1], 'd_gen'), ([[1, 2]], [1], 'shape'), ([True], [1], 'bool'), ([1j], [1], 'complex'), ([1], ['x', None], 'd_test')])
def test_refused(gen, test, said):
    for f in (z_u, auc, z_scores, p_values, placements, auc_interval, zu_report):
        with pytest.raises(InputError, match=said): f(gen, test)


def test_nan_names_and_drop():
    with pytest.raises(InputError, match='mug8'): zu_report([1., np.nan], [2.], ids_gen=['mug7', 'mug8'])
    r = zu_report([1, np.nan, 3, np.nan], [2, 4, np.nan], list('aabb'), list('xyz'), nan='drop')
    assert (r.m, r.n, r.n_dropped_gen, r.n_dropped_test) == (2, 2, 2, 1) and 'dropped' in r.flags
    assert r.units == (2, 2) and r.auc == auc([1, 3], [2, 4])
    with pytest.raises(InputError, match='empty'): zu_report([np.nan], [1.], nan='drop')
    with pytest.raises(InputError, match='different ids'): zu_report([1, 2], [1], ids_gen=['a', 'a'])


def test_infinite_is_last_and_said():
    with pytest.warns(UserWarning, match='d_gen: 1 of 2 distances are infinite'): r = zu_report([np.inf, 1.], [2., 3.])
    assert 'infinite' in r.flags and r.auc == 0.5
    assert auc([np.inf], [np.inf]) == 0.5


def test_flags():
    few, many = np.arange(10), np.arange(30)
    assert zu_report(few, many + 100).flags == ['small_sample', 'zeros_in_gen']
    assert zu_report(many + 1, many).flags == ['zeros_in_test']
    assert zu_report([1]*30, [1]*40).flags == ['degenerate']
    assert zu_report(many + 1, many + 1, many//3, None).flags == ['few_groups']
    assert zu_report((many + 1.5).astype('f4'), many + 1.5).flags == ['mixed_precision']
    assert zu_report(-(many + 1.), -(many + 2.)).flags == []
    tied = zu_report([1]*5, [1]*8)
    assert tied.z_u == pytest.approx(0.0731925, abs=1e-6) and (tied.auc, tied.z_tie, tied.p_two) == (0.5, 0, 1)


def test_float32_would_invent_ties():
    gen, test = [1 + 1e-9, 1 + 3e-9], [1 + 2e-9, 1 + 4e-9]
    assert auc(gen, test) == 0.75 and auc(np.float32(gen), np.float32(test)) == 0.5


def test_input_is_left_alone():
    gen, test = np.array([3., 1., 2.]), np.array([2., 1.])
    zu_report(gen, test); c_t(gen, test, 'aab', 'ab')
    assert gen.tolist() == [3, 1, 2] and test.tolist() == [2, 1]


def test_no_int64_overflow():
    n = 1_700_000      # n n (2n + 1) is 9.8e18, beyond 2**63
    near, far = np.arange(n, dtype=np.int32), np.arange(n, 2*n, dtype=np.int32)
    assert n*n*(2*n + 1) > 2**63
    assert z_u(near, far) == pytest.approx(-math.sqrt(3*n*n/(2*n + 1)), rel=1e-9)
    assert z_scores(far, near)['sd_tie'] == pytest.approx(math.sqrt(n*n*(2*n + 1)/12), rel=1e-12)


def test_memory_grows_with_m_plus_n():
    rng = np.random.default_rng(0)
    gen, test = rng.normal(size=200_000), rng.normal(size=200_000)
    tracemalloc.start()
    try:
        zu_report(gen, test)
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert peak < 20*(gen.nbytes + test.nbytes)


def test_few_against_many_is_fast():
    "scipy's automatic choice of an exact p-value takes minutes and gigabytes here."
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    for m in (3, 8): zu_report(rng.normal(size=m), rng.normal(size=100_000))
    assert time.perf_counter() - start < 5


def test_no_global_random_state():
    np.random.seed(0); before = np.random.get_state()[1].copy()
    p_values([1.]*5, np.arange(5000))
    assert (np.random.get_state()[1] == before).all()


# verdict and record

def copies(share, m, n, seed=0):
    rng = make_rng(seed, 'verdict')
    return np.where(rng.random(m) < share, 0, rng.gamma(4, 1000, m)), rng.gamma(4, 1000, n)


def test_verdicts():
    word, text = verdict(zu_report(*copies(0.12, 4000, 4000)))
    share = zu_report(*copies(0.12, 4000, 4000))
    assert word == 'copying' and text == f'copying: worth about {100*share.copy_share:.0f} % exact copies [{100*share.copy_share_ci[0]:.0f}, {100*share.copy_share_ci[1]:.0f}]'
    assert 0.08 < share.copy_share < 0.16
    assert verdict(zu_report(*copies(0, 500, 500)))[0] == 'no evidence'
    word, text = verdict(zu_report(*copies(0, 20, 20)))
    assert word == 'underpowered' and text.startswith('too few shapes') and 'cannot detect less than 51 %' in text
    assert verdict(zu_report(*copies(0, 500, 500)), underpowered_above=0.54)[0] == 'underpowered'
    assert verdict(zu_report([1], [2])) == ('underpowered', 'too few shapes: 1 generated and 1 held-out ones cannot detect any copying')
    word, text = verdict(zu_report(*copies(0.3, 500, 500), replica_auc=0.75))
    assert word == 'copying' and 'exact' not in text and zu_report(*copies(0.3, 500, 500), replica_auc=0.75).copy_share > 0.45
    assert verdict(zu_report(*copies(0.3, 500, 500), replica_auc=0.4))[1].startswith('copying: auc 0.6')
    word, text = verdict(zu_report(np.arange(1, 41) + 99, np.arange(1, 41)))
    assert word == 'no evidence' and 'farther' in text


@pytest.mark.parametrize('k, word', [(3, 'underpowered'), (4, 'copying')])
def test_three_against_three_cannot_convict(k, word):
    assert verdict(zu_report(np.arange(1, k + 1), np.arange(10, 10 + k)))[0] == word     # p = 1/20 and 1/70


def test_false_alarms_are_rare():
    rng = make_rng(0, 'alarms')
    for size in (6, 25, 100):
        wrong = sum(verdict(zu_report(rng.normal(size=size), rng.normal(size=size)))[0] == 'copying' for _ in range(500))
        assert wrong/500 < 0.045, size


def test_shapes_at_zero_are_mentioned_whatever_auc():
    "A third exact copies, the rest far away: the average sees nothing, the text must."
    rng = make_rng(0)
    gen, test = np.r_[np.zeros(300), 3000 + 1000*rng.gamma(4, size=700)], 1000*rng.gamma(4, size=1000)
    r = zu_report(gen, test)
    assert verdict(r)[0] == 'no evidence' and 'at distance 0 lie 30 % of the generated' in verdict(r)[1] and 'zeros_in_gen' in r.flags


def test_record_and_table_agree():
    r = zu_report(*copies(0.3, 90, 70), np.arange(90)//3, None, protocol=dict(distance='lfd'), n_train=500)
    record = json.loads(json.dumps(r.to_dict(), allow_nan=False))
    rows = dict(l[2:-2].split(' | ') for l in r._repr_markdown_().splitlines() if l.startswith('| ') and l.count(' | ') == 1 and l != '| | |')
    shown = set(record) - {'verdict', 'verdict_text', 'meaning', 'protocol'}
    assert shown == set(rows)
    for key in shown:
        if isinstance(record[key], float): assert rows[key] == f'{record[key]:.4g}', key
        elif isinstance(record[key], int): assert rows[key] == str(record[key]), key
    assert record['verdict_text'] in repr(r) and record['verdict_text'] in r._repr_markdown_() and record['meaning'] in r._repr_markdown_()
    assert record['protocol']['distance'] == 'lfd' and record['n_train'] == 500
    assert record['z_ref'] == pytest.approx(-(r.auc - 0.5)*math.sqrt(6000)) and record['copy_share'] == pytest.approx(2*r.auc - 1)
    assert {'z_u', 'auc', 'auc_ci', 'm', 'n', 'min_detectable_auc', 'verdict', 'verdict_text'} <= set(record)


def test_digest_follows_the_input():
    a, b = zu_report([1, 2], [3]), zu_report([2, 1], [3])
    assert a.protocol['sha256_gen'] != b.protocol['sha256_gen'] and a.protocol['sha256_test'] == b.protocol['sha256_test']


# cells

def test_holm_by_its_definition():
    p = make_rng(0).random(7)**3
    order, worst = np.argsort(p), 0
    for rank, i in enumerate(order):
        worst = max(worst, (7 - rank)*p[i])
        assert holm(p)[i] == pytest.approx(min(1, worst))


def test_labels_of_any_kind():
    keys = [('mug', 1), 7, 'lamp', frozenset({2})]
    r = c_t([1, 2, 3, 4], [2, 3, 4, 5], keys, keys)
    assert r.status == 'ok' and len(r.cells) == 4
    json.dumps(r.to_dict(), allow_nan=False)
    with pytest.raises(InputError, match='expected 2 labels'): c_t([1, 2], [3], 'a', 'a')


def test_cells_that_cannot_count():
    r = c_t([1, 2, 3], [4, 5], ['a', 'a', 'b'], ['a', 'c'], {'a': 3, 'b': 1, 'd': 2})
    assert {row['cell']: row['status'] for row in r.cells} == {'a': 'counts', 'b': 'no held-out shapes', 'c': 'no training shapes', 'd': 'no held-out shapes'}
    assert r.c_t == z_u([1, 2], [4])
    with pytest.raises(InputError, match=r'b \(no held-out'): c_t([1, 2, 3], [4, 5], ['a', 'a', 'b'], ['a', 'c'], strict=True)
    for tau in (-0.1, 1, 20):
        with pytest.raises(InputError, match='tau'): c_t([1], [2], 'a', 'a', tau=tau)


def test_averages_by_their_formulas():
    rng = make_rng(9)
    cells_gen, cells_test = rng.integers(0, 3, 70), rng.integers(0, 3, 50)
    gen, test = rng.integers(0, 20, 70), rng.integers(2, 22, 50)
    r, top, var, w, a = c_t(gen, test, cells_gen, cells_test), 0, 0, [], []
    for c in range(3):
        q, p = gen[cells_gen == c], test[cells_test == c]
        m, n, u = len(q), len(p), sum((x > y) + 0.5*(x == y) for x in q for y in p)
        top, var = top + (u - m*n/2)/(m + n + 1), var + m*n/12/(m + n + 1)
        w.append(n/50); a.append(1 - u/(m*n))
    assert r.z_van_elteren == pytest.approx(top/math.sqrt(var), rel=1e-12)
    assert r.p_van_elteren == pytest.approx(stats.norm.cdf(r.z_van_elteren))
    assert r.auc_strat == pytest.approx(np.dot(w, a), rel=1e-12)
    assert r.c_t_norm == pytest.approx(r.c_t/math.sqrt(np.dot(w, w)), rel=1e-12)


def test_tau_is_strict():
    status = lambda tau: [row['status'] for row in c_t([1]*10, [1]*10, 'aabbbbbbbb', 'aabbbbbbbb', tau=tau).cells]
    assert status(0.2) == ['below tau', 'counts'] and status(0.19) == ['counts', 'counts']


def test_nan_in_a_cell():
    with pytest.raises(InputError, match='d_gen: 1 of 2'): c_t([1, np.nan], [2, 3], 'ab', 'ab')


def test_stratified_interval_covers():
    rng, hits, cells = make_rng(0, 'strata'), 0, np.arange(120) % 6
    for _ in range(300):
        r = c_t(rng.normal(-math.sqrt(2)*stats.norm.ppf(0.7), 1, 120) + 5*cells, rng.normal(size=120) + 5*cells, cells, cells)
        hits += r.auc_strat_ci[0] <= 0.7 <= r.auc_strat_ci[1]
    assert 0.91 < hits/300 < 0.985


def test_cell_table_shows_what_is_stored():
    rng = make_rng(3)
    r = c_t(rng.normal(size=90), rng.normal(size=60), np.arange(90) % 3, np.arange(60) % 3)
    for row in r.to_dict()['cells']: assert f"| {row['cell']} | {row['m']} | {row['n']} | – | {row['z_u']:.4g} | {row['auc']:.4g} |" in r._repr_markdown_()
    assert cell_table(rng.normal(size=4), rng.normal(size=4), 'aabb', 'abab')[0]['p_holm'] <= 1
