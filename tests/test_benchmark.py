"""The benchmark measures what it says: known answers, faults that cost one shape, runs that resume, real meshes."""
import csv, json

import numpy as np
import pytest

from memkit.benchmark import (BenchmarkResult, assign_roles, benchmark_folder, blind_spots, calibration_line, describe_items, load_calibration, make_mesh, measure,
                              overview, plan_items, run_benchmark, write_benchmark, write_calibration)
from memkit.core import InputError
from memkit.distances import Distance, get_distance
from memkit.hits import SERIES, detection, hit_ranks, paired_tests, replica_radius, score, sign_test, wilson
from memkit.mesh import save_mesh
from memkit.points import sample_surface
from memkit.replicas import REPLICAS
from memkit.shapes import shape_set

LEVELS = [('noise', 'sigma 0.5%'), ('noise', 'sigma 4%'), ('rotation', 'yaw 90'), ('similarity', 'shift')]


def profile(V, F):
    "Where a shape is: mean and spread of its vertices. Sees every move."
    return np.r_[V.mean(0), V.std(0)]


def edges(V, F):
    "Sorted distances from the centre; sees no rotation and no shift."
    p = sample_surface(V, F, 400, seed=0)[0].astype(float)
    return np.sort(np.linalg.norm(p - p.mean(0), axis=1))


def sums(V, F):
    "A description of integers."
    return np.round(100*profile(V, F)).astype(np.int64)


def l1(a, b): return np.abs(a[:, None] - b[None]).mean(-1)


PLACE = Distance('place', 'mean and spread', profile, l1, protocol='vertices')
RADII = Distance('radii', 'sorted radii', edges, l1, frozenset({'rotation', 'translation'}), '400 points')


@pytest.fixture(scope='module')
def meshes(): return {f'{s.category}-{i}': s.mesh(20) for i, s in enumerate(shape_set(16, seed=3))}


@pytest.fixture(scope='module')
def result(meshes): return run_benchmark(meshes, 5, 5, [PLACE, RADII], LEVELS, seed=1, about='test shapes')


@pytest.mark.parametrize('n', [1, 5, 133])
def test_wilson_equals_scipy_and_stays_inside(n):
    from scipy.stats import binomtest
    for k in range(n + 1):
        known = binomtest(k, n).proportion_ci(method='wilson')
        assert wilson(k/n, n) == pytest.approx((known.low, known.high), abs=1e-12)


def test_wilson_covers_a_mean_of_reciprocal_ranks():
    rng = np.random.default_rng(0)
    values, truth = np.array([1, 1/2, 1/3, 1/10]), .7*1 + .1*(1/2 + 1/3 + 1/10)
    covered = [low <= truth <= high for low, high in (wilson(float(rng.choice(values, 30, p=[.7, .1, .1, .1]).mean()), 30) for _ in range(400))]
    assert np.mean(covered) > .93


def test_detection_never_calls_more_novel_shapes_than_allowed():
    rng = np.random.default_rng(1)
    for n in (7, 99, 100, 250, 1000):
        novel = rng.integers(0, 30, n)          # with ties
        d = detection(rng.integers(0, 30, 50), novel)
        assert (novel < d['threshold']).mean() <= .01
        assert d['fpr_resolved'] == (n >= 100)


def test_ranks_count_ties_against_the_distance():
    assert hit_ranks(np.zeros((3, 8)), [0, 1, 2]).tolist() == [8, 8, 8]
    assert score(np.array([8, 8]), np.zeros(2), np.zeros(3))['auc'] == .5


def test_radius_is_exact_on_a_line_and_takes_the_first_crossing():
    x = np.array([1., 2., 5., 9.])
    for slope in (.03, .1, .2): assert replica_radius(x, 1 - slope*x) == pytest.approx(.25/slope if .25/slope <= 9 else np.inf)
    assert replica_radius([1, 2, 3], [.9, .5, .9]) == pytest.approx(1.375)


def test_every_series_is_made_of_levels_that_exist():
    for family, _, levels in SERIES.values(): assert set(levels) <= set(REPLICAS[family])


def test_sign_test_is_exact_mcnemar():
    from scipy.stats import binom
    a, b = {i: i < 9 for i in range(12)}, {i: i >= 9 for i in range(12)}
    assert sign_test(a, b) == (9, 3, pytest.approx(2*binom.cdf(3, 12, .5)))


def test_copies_of_one_source_count_once():
    "Ten levels of the same three sources are no thirty independent shapes."
    hits = {n: {('noise', f'{i}'): {s: found for s in 'xyz'} for i in range(10)} for n, found in (('a', True), ('b', False))}
    whole = next(t for t in paired_tests(hits) if t['scope'] == 'all')
    assert (whole['a_better'], whole['p']) == (3, .25)


def test_a_distance_that_sees_position_loses_moved_copies_and_one_that_does_not_keeps_them(result):
    assert result.row('place', 'noise', 'sigma 0.5%')['hit1'] == 1
    assert result.row('place', 'similarity', 'shift')['auc'] < .5 < result.row('radii', 'similarity', 'shift')['auc']
    assert result.row('radii', 'rotation', 'yaw 90')['hit1'] == 1
    assert {s['distance']: (s['family'], s['level']) for s in blind_spots(result)}['place'] == ('similarity', 'shift')
    assert [r['distance'] for r in overview(result)] == ['radii', 'place']


def test_every_row_agrees_with_the_matrix_of_distances(meshes, result):
    roles = assign_roles(meshes, 5, 5, 1)
    items = plan_items(roles, LEVELS, 1)
    describe = {k: edges(*make_mesh(i)) for k, i in items.items()}
    gallery = np.stack([describe[f'gallery//{k}'] for k in roles.gallery])
    novel = l1(np.stack([describe[f'novel//{k}'] for k in roles.novel]), gallery).min(1)
    for family, level in LEVELS:
        D = l1(np.stack([describe[f'{family}/{level}/{s}'] for s in roles.sources]), gallery)
        truth, row = [list(roles.gallery).index(s) for s in roles.sources], result.row('radii', family, level)
        assert row['hit1'] == (D.argmin(1) == truth).mean()
        assert row['auc'] == pytest.approx((D.min(1)[:, None] < novel).mean() + (D.min(1)[:, None] == novel).mean()/2)
        assert row['threshold'] == novel.min()


def test_the_faces_of_a_copy_are_in_another_order(meshes):
    "Otherwise a sampled distance recognises its own random numbers."
    items = plan_items(assign_roles(meshes, 5, 5, 1), [('rotation', 'yaw 90'), ('noise', 'sigma 0.5%')], 1)
    for i in items.values():
        if i['family'] in REPLICAS:
            V, F = make_mesh(i)
            W, G = i['mesh']
            assert len(F) == len(G) and not np.array_equal(F, G)


def test_novel_shapes_never_stand_in_the_gallery(meshes):
    for seed in range(20):
        r = assign_roles(meshes, 3, 4, seed)
        assert len(r.novel) == 4 and not set(r.novel) & set(r.gallery) and set(r.sources) <= set(r.gallery) and len(r.gallery) == 12


def test_a_run_resumes_and_notices_changes(meshes, tmp_path):
    calls = []
    counted = Distance('place', 'mean and spread', lambda V, F: calls.append(1) or profile(V, F), l1, protocol='vertices')
    first = run_benchmark(meshes, 4, 4, [counted], LEVELS[:2], out=tmp_path)
    assert len(calls) == 16 + 8
    again = run_benchmark(meshes, 4, 4, [counted], LEVELS[:2], out=tmp_path)
    assert len(calls) == 24 and again.rows == first.rows
    run_benchmark(meshes, 4, 4, [counted], LEVELS[:3], out=tmp_path)
    assert len(calls) == 28
    victim = again.items[next(k for k in again.items if k.startswith('novel'))]['source']
    moved = {k: (V + 1, F) if k == victim else (V, F) for k, (V, F) in meshes.items()}
    changed = run_benchmark(moved, 4, 4, [counted], LEVELS[:3], out=tmp_path)
    assert len(calls) == 29 and changed.rows == run_benchmark(moved, 4, 4, [PLACE], LEVELS[:3]).rows
    other = Distance('place', 'mean and spread', profile, l1, protocol='other vertices')
    with pytest.raises(InputError, match='holds descriptions'): run_benchmark(meshes, 4, 4, [other], LEVELS[:2], out=tmp_path)


def test_a_killed_comparison_goes_on(meshes, tmp_path):
    calls = []
    def stumbling(a, b):
        calls.append(1)
        if len(calls) == 5: raise KeyboardInterrupt
        return l1(a, b)
    d = Distance('place', 'mean and spread', profile, stumbling, protocol='vertices')
    with pytest.raises(KeyboardInterrupt): run_benchmark(meshes, 4, 4, [d], LEVELS, out=tmp_path)
    assert len(calls) == 5                       # 2 of the check, novel, first level, the broken one
    assert run_benchmark(meshes, 4, 4, [d], LEVELS, out=tmp_path).rows == run_benchmark(meshes, 4, 4, [PLACE], LEVELS).rows
    assert len(calls) == 5 + 2 + 3


def test_what_cannot_be_described_is_named_and_left_out_for_all(meshes, tmp_path):
    def fussy(V, F):
        if len(F) % 7 == 3: raise ValueError('an unlucky number of faces')
        return profile(V, F)
    bad = {k for k, (V, F) in meshes.items() if len(F) % 7 == 3}
    meshes = dict(meshes)
    if not bad: meshes['chair-0'] = (meshes['chair-0'][0], meshes['chair-0'][1][:len(meshes['chair-0'][1])//7*7 - 4])
    result = run_benchmark(meshes, 6, 4, [Distance('fussy', 'fussy', fussy, l1), RADII], [('noise', 'sigma 1%')])
    assert result.failures and all('unlucky' in r for r in result.failures.values())
    assert not any(k in result.failures for f in result.found.values() for c in f for k in (f'{c[0]}/{c[1]}/{s}' for s in f[c]))
    assert {k: set(v) for k, v in result.found['fussy'].items()} == {k: set(v) for k, v in result.found['radii'].items()}


def test_workers_give_the_same_and_a_hang_costs_one_shape(meshes, tmp_path):
    few = {k: meshes[k] for k in list(meshes)[:8]}
    alone = run_benchmark(few, 3, 3, [get_distance('cd')], LEVELS[:2])
    crew = run_benchmark(few, 3, 3, [get_distance('cd')], LEVELS[:2], n_jobs=2)
    assert crew.found == alone.found
    slow = {k: i for k, i in crew.items.items() if k.startswith('novel')}
    victim = slow[next(iter(slow))]['mesh'][0]
    def sleepy(V, F):
        import time
        if V.shape == (len(victim), 3): time.sleep(60)
        return V.mean(0)
    arrays, failed, _ = describe_items(slow, [Distance('sleepy', 'sleepy', sleepy, l1)], n_jobs=2, time_limit=3)
    assert failed and all('3 s' in r for r in failed.values()) and len(arrays['sleepy']) == len(slow) - len(failed)


def test_labels_are_a_column_and_their_queries_leave_the_gallery(meshes, tmp_path):
    ids = list(meshes)
    csv_file = tmp_path/'labels.csv'
    csv_file.write_text(f'query,is_replica,true_id\n{ids[0]},yes,{ids[5]}\n{ids[1]},no,\n{ids[2]},no,\n')
    try: result = run_benchmark(meshes, 3, {f'new {k}': meshes[k] for k in ids[10:]}, [PLACE], [('noise', 'sigma 1%')], labels=csv_file)
    except InputError as e: pytest.fail(str(e))
    row = result.row('place', 'user labels', 'replica')
    assert (row['n'], row['n_novel']) == (1, 2)
    assert not {f'gallery//{i}' for i in ids[:3]} & set(result.items)
    assert 'user labels' not in [r['scope'] for r in result.tests]     # one distance, no pairs
    csv_file.write_text('query,is_replica,true_id\nnobody,no,\n')
    with pytest.raises(InputError, match='nobody'): run_benchmark(meshes, 3, 3, [PLACE], labels=csv_file)


def test_integer_and_float_distances_give_json(meshes, tmp_path):
    d = Distance('sums', 'integers', sums, lambda a, b: np.abs(a[:, None] - b[None]).sum(-1))
    result = run_benchmark(meshes, 3, 3, [d, PLACE], LEVELS)
    files = write_benchmark(result, tmp_path)
    record = json.loads(files[1].read_text())
    assert record['format'] == 'memkit-benchmark/1' and len(record['rows']) == 8 and record['tests']
    with open(files[0]) as f: assert len(list(csv.DictReader(f))) == 8
    assert isinstance(result, BenchmarkResult) and 'Replica radius' in files[2].read_text() and 'cannot resolve' in files[2].read_text()


def test_calibration_is_kept_by_distance_and_protocol(result, tmp_path):
    write_calibration(result)
    kept = load_calibration(RADII)
    assert kept['auc']['noise']['sigma 4%'][0] == result.row('radii', 'noise', 'sigma 4%')['auc']
    assert 'rotation' in calibration_line(kept) and 'test shapes' in calibration_line(kept)
    assert load_calibration(Distance('radii', 'x', edges, l1, protocol='500 points')) is None
    assert load_calibration('lfd') is None
    (tmp_path/'radii.json').write_text('[]')
    assert load_calibration(RADII, tmp_path) is None


def test_a_distance_cannot_write_outside_of_its_folder(meshes, tmp_path):
    with pytest.raises(InputError, match='leaves it'): run_benchmark(meshes, 3, 3, [Distance('../radii', 'x', edges, l1)], LEVELS, out=tmp_path/'run')
    assert not list(tmp_path.iterdir())


def test_a_folder_with_a_broken_file(meshes, tmp_path):
    (tmp_path/'shelf').mkdir()
    for k, m in list(meshes.items())[:8]: save_mesh(tmp_path/'shelf'/f'{k}.off', *m)
    (tmp_path/'shelf'/'broken.off').write_text('OFF\n3 1 0\n0 0')
    result = benchmark_folder(tmp_path/'shelf', tmp_path/'out', ['cd'], 3, 3, [('noise', 'sigma 1%')], n_jobs=2)
    assert any('broken' in k for k in result.failures) and not any(str(tmp_path) in r for r in result.failures.values())
    assert load_calibration('cd')['n_gallery'] == result.sizes['n_gallery']
    with pytest.raises(InputError, match='no meshes'): benchmark_folder(tmp_path/'out'/'kept', tmp_path/'out2')


def test_real_meshes(real_meshes, tmp_path):
    result = benchmark_folder(real_meshes, tmp_path, ['cd', 'd2'], 6, 12, [('rotation', 'uniform'), ('noise', 'sigma 1%'), ('remesh', 'decimate 50%')], n_jobs=1, calibrate=False)
    assert result.sizes['n_gallery'] + result.sizes['n_novel'] == 100
    assert result.row('cd', 'noise', 'sigma 1%')['hit1'] >= .8
    assert result.row('cd', 'rotation', 'uniform')['auc'] < .5 < result.row('d2', 'rotation', 'uniform')['auc']
