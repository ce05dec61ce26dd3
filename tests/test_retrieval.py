"""Nearest neighbours are those of a full comparison, whatever the bounds, chunks, threads and ties; neighbour files travel unharmed."""
import json

import numpy as np
import pytest

from memkit.core import InputError, make_rng
from memkit.database import Database
from memkit.lfd import lfd_distance, simd_kind
from memkit.retrieval import lfd_bounds, nearest, read_distances, read_neighbours_csv, read_neighbours_json, write_neighbours_csv, write_neighbours_json


@pytest.fixture(scope='module')
def golden_set(data):
    stored = np.load(data/'lfd_distance.npz')
    return stored['descriptors'], stored['distance']


def varied(descriptors, n, seed):
    "Mixtures of two real shapes with noise of different strength: families, as real sets have them."
    rng = make_rng(seed, 'varied')
    a, b = rng.integers(0, len(descriptors), (2, n))
    w = rng.random((n, 1, 1, 1))*.5
    x = descriptors[a]*(1 - w) + descriptors[b]*w + rng.normal(size=(n, 10, 10, 47))*rng.uniform(0, 9, (n, 1, 1, 1))
    return np.clip(x, 0, 255).astype(np.uint8)


def full(D, k, excluded=None):
    "The k nearest by sorting everything: allowed ones first, then by distance, then by index."
    excluded = np.zeros(D.shape, bool) if excluded is None else excluded
    order = np.lexsort((np.broadcast_to(np.arange(D.shape[1]), D.shape), D, excluded))[:, :k]
    return order, np.take_along_axis(D, order, 1)


def same(found, expected):
    assert (found[0] == expected[0]).all() and (found[1] == expected[1]).all()


SETS = {
    'golden': lambda d: (d, d),
    'varied': lambda d: (varied(d, 60, 1), varied(d, 560, 2)),
    'random bytes': lambda d: tuple(make_rng(0, 'bytes').integers(0, 256, (150, 10, 10, 47), dtype=np.uint8)[s] for s in (slice(0, 30), slice(30, None))),
    'many ties': lambda d: (np.repeat(d[:6], 3, 0), d[make_rng(0, 'ties').integers(0, 7, 200)]),
    'one value': lambda d: (np.zeros((3, 10, 10, 47), np.uint8), np.zeros((90, 10, 10, 47), np.uint8)),
    'extremes': lambda d: (np.stack([np.zeros_like(d[0]), np.full_like(d[0], 255)]), np.stack([np.full_like(d[0], v) for v in (255, 255, 200, 255, 0, 100, 0)])),
}


@pytest.mark.parametrize('name', SETS)
def test_bounds_lie_below_the_distance_in_order(golden_set, name):
    query, gallery = SETS[name](golden_set[0])
    query, gallery = query[:20], gallery[:60]
    ladder = np.concatenate([lfd_bounds(query, gallery), lfd_distance(query, gallery)[None]])
    assert (np.diff(ladder, axis=0) >= 0).all()
    assert (lfd_bounds(query, gallery, kernel='plain') == ladder[:3]).all()


@pytest.mark.parametrize('k', [1, 5])
@pytest.mark.parametrize('name', SETS)
def test_search_equals_full_comparison(golden_set, name, k):
    query, gallery = SETS[name](golden_set[0])
    D = lfd_distance(query, gallery)
    same(nearest(query, gallery, k=k, n_jobs=1), full(D, k))
    same(nearest(query, gallery, k=k, n_jobs=2, max_gb=.003), full(D, k))     # chunks of 50
    same(nearest(query, gallery, k=k, distance=lfd_distance, max_gb=.01), full(D, k))


def test_all_of_the_gallery(golden_set):
    d, D = golden_set
    same(nearest(d, d, k=30), full(D, 30))


def test_within_a_set(golden_set):
    d, D = golden_set
    d = np.concatenate([d, d[:5]])     # five exact duplicates
    D = lfd_distance(d, d)
    own = np.eye(35, dtype=bool)
    same(nearest(d, d, k=34, exclude_self=True), full(D, 34, own))
    assert (nearest(d, d, exclude_self=True)[1][:5, 0] == 0).all()
    mask = make_rng(0, 'mask').random((35, 35)) < .3
    for distance in ('lfd', lfd_distance):
        same(nearest(d, d, k=9, exclude=mask, distance=distance, max_gb=.001), full(D, 9, mask))
        same(nearest(d, d, k=9, exclude=mask, exclude_self=True, distance=distance, max_gb=.001), full(D, 9, mask | own))
    mask[7, 8:] = True; mask[7, :8] = True; mask[7, 3] = False
    assert nearest(d, d, exclude=mask)[0][7, 0] == 3
    with pytest.raises(InputError, match='query 7 has 1 candidates'): nearest(d, d, k=2, exclude=mask)


def test_a_tie_that_only_the_weakest_bound_sees():
    "Shape 0 is as far as 64 others; its interval bound is exact, theirs are 0, so it is visited last and must still win."
    gallery = np.zeros((65, 10, 10, 47), np.uint8)  # 64 = two batches
    gallery[0, :, :, 0] = 9
    gallery[1:, ::2, :, 0], gallery[1:, 1::2, :, 1] = 9, 9
    query = np.zeros((1, 10, 10, 47), np.uint8)
    assert (lfd_distance(query, gallery) == 90).all() and lfd_bounds(query, gallery)[0, 0, :2].tolist() == [90, 0]
    assert nearest(query, gallery, k=2)[0].tolist() == [[0, 1]]


def test_bounds_save_work(golden_set):
    gallery = varied(golden_set[0], 700, 3)
    _, _, stats = nearest(varied(golden_set[0], 40, 4), gallery, stats=True, n_jobs=1)
    assert stats.pairs == 28_000 and stats.exact < stats.ranked < stats.sums < stats.pairs and stats.exact < .06*stats.pairs


def test_gallery_mapped_from_disk(golden_set, tmp_path):
    d, D = golden_set
    np.save(tmp_path/'d.npy', d)
    mapped = np.load(tmp_path/'d.npy', mmap_mode='r')
    same(nearest(mapped, mapped, k=3), full(D, 3))
    db = Database({}, [f'{i}' for i in range(30)], mapped, ['']*30, {})
    same(nearest(db, db, k=3), full(D, 3))
    assert nearest(d[4], d)[0].shape == (1, 1)


def test_plain_kernel_in_the_search(golden_set, monkeypatch):
    "The search of a processor without the byte instruction."
    import memkit.retrieval as module
    query, gallery = SETS['varied'](golden_set[0])
    monkeypatch.setattr(module, 'simd_kind', lambda kernel='auto': None)
    same(nearest(query[:10], gallery[:200], k=3), full(lfd_distance(query[:10], gallery[:200]), 3))


def test_any_distance(tmp_path):
    rng = make_rng(0, 'any')
    a, b = rng.integers(0, 4, (70, 3)), rng.integers(0, 4, (300, 3))   # integers: many ties
    city = lambda x, y: abs(x[:, None] - y).sum(-1)
    found = nearest(a, b, k=20, distance=city, max_gb=2e-4)
    same(found, full(city(a, b), 20))
    assert found[1].dtype.kind == 'i'
    root = lambda x, y: np.sqrt(city(x, y)).astype(np.float32)
    assert nearest(a, b, distance=root)[1].dtype == np.float32
    far = lambda x, y: np.where(city(x, y) > 2, np.inf, city(x, y))
    excluded = np.zeros((70, 300), bool); excluded[:, :150] = True
    same(nearest(a, b, k=150, distance=far, exclude=excluded, max_gb=2e-4, n_jobs=2), full(far(a, b), 150, excluded))
    calls = []
    nearest(a, b, distance=lambda x, y: calls.append((len(x), len(y))) or city(x, y), max_gb=1e-3)
    assert sum(m*n for m, n in calls) == 70*300 and len(calls) > 4


def test_one_generator_is_the_same_in_any_company(golden_set):
    query, gallery = SETS['varied'](golden_set[0])
    together = nearest(query, gallery, k=4)
    for i in (0, 17, 59): same([x[0] for x in nearest(query[i:i + 1], gallery, k=4)], [x[i] for x in together])


# --- files

INDEX, DISTANCE = np.array([[1, 0], [0, 2]]), np.array([[3, 9], [0, 4]])


def test_json_as_the_papers_tool_reads_it(tmp_path):
    "Every entry is a list whose first element has a `distance` that is a number; nothing else is relied on there."
    path = write_neighbours_json(tmp_path/'n.json', ['q', 'r'], ['a', 'b', 'ü'], INDEX, DISTANCE)
    data = json.loads(path.read_text(encoding='utf-8'))
    assert data == {'q': [{'model_id': 'b', 'distance': 3.0}, {'model_id': 'a', 'distance': 9.0}], 'r': [{'model_id': 'a', 'distance': 0.0}, {'model_id': 'ü', 'distance': 4.0}]}
    back = read_neighbours_json(path)
    assert back.ids == ['q', 'r'] and back.distance.tolist() == [3, 0] and back.neighbour == ['b', 'a'] and back.group == [None]*2


@pytest.mark.parametrize('text, ids, distance, failed', [
    ('{"a": [{"distance": 7}], "b": {"distance": 5.5}}', ['a', 'b'], [7, 5.5], []),
    ('{"a": [{"distance": 7}, {"distance": 6}]}', ['a'], [6], []),
    ('{"m": {"a": [{"distance": 1}], "b": {"distance": 2}}, "n": {"a": [{"distance": 3}]}}', ['a', 'b', 'a'], [1, 2, 3], []),
    ('{"a": [], "b": [{"model_id": "x"}], "c": [{"distance": 2}], "d": null, "e": [{"distance": NaN}], "f": {}}', ['c'], [2], ['a', 'b', 'd', 'e', 'f']),
    ('{"a": [], "m": {"b": [{"distance": 1}]}}', ['b'], [1], ['a']),
    ('{"a": [{"distance": Infinity}]}', ['a'], [np.inf], []),
    ('{"a": []}', [], [], ['a']),
])
def test_json_forms(tmp_path, text, ids, distance, failed):
    (tmp_path/'n.json').write_text(text)
    found = read_neighbours_json(tmp_path/'n.json', allow_failed=True)
    assert found.ids == ids and found.distance.tolist() == distance and found.failed == failed
    assert read_distances(tmp_path/'n.json', allow_failed=True).tolist() == distance
    if failed:
        with pytest.raises(InputError, match=f'{len(failed)} of {len(failed) + len(ids)} queries have no distance: {failed[0]}'): read_neighbours_json(tmp_path/'n.json')


@pytest.mark.parametrize('text', ['', '[]', '{}', '3', '{"a": 1', '[' * 100_000, '{"a": [{"distance": 1}], "a": [{"distance": 2}]}', '{"m": {"a": {"distance": 1}, "a": {"distance": 1}}}', '\xff'])
def test_json_that_is_none(tmp_path, text):
    (tmp_path/'n.json').write_bytes(text.encode('latin-1'))
    with pytest.raises(InputError, match='n.json'): read_neighbours_json(tmp_path/'n.json')
    with pytest.raises(InputError, match='missing.json'): read_neighbours_json(tmp_path/'missing.json')


def test_csv_carries_any_id(tmp_path):
    names = ['=1+1', '+x', '-x', '@x', "'x", "''=x", '\tx', 'a,b', 'a"b', 'a\nb', 'ü', ' x', '', '0']
    index = np.arange(len(names))[:, None]
    path = write_neighbours_csv(tmp_path/'n.csv', names, names, index, index*.1)
    back = read_neighbours_csv(path)
    assert back.ids == names and back.neighbour == names and (back.distance == index[:, 0]*.1).all()
    import csv
    with open(path, newline='', encoding='utf-8') as f: cells = [c for row in list(csv.reader(f))[1:] for c in (row[0], row[2])]
    assert not [c for c in cells if c[:1] and c[0] in '=+-@\t\r']
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes().replace(b'\r\n', b'\n'))   # as a spreadsheet saves it
    assert read_distances(path).tolist() == back.distance.tolist()


def test_writers_refuse_what_does_not_fit(tmp_path):
    for write in (write_neighbours_json, write_neighbours_csv):
        for q, g, i, d in [(['q'], 'abc', INDEX, DISTANCE), ('qr', 'ab', INDEX, DISTANCE), ('qr', 'abc', INDEX, DISTANCE[:, :1]), ('qr', 'abc', INDEX - 1, DISTANCE), ('qq', 'abc', INDEX, DISTANCE)]:
            with pytest.raises(InputError): write(tmp_path/'x', q, g, i, d)
        assert not list(tmp_path.iterdir())
