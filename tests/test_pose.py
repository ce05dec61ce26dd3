"""Pose-refined light field distance: rotations recovered, copies at 0, never above plain, on built-in and on real meshes."""
import numpy as np
import pytest

from memkit.align import Pose, align, alignment_costs, find_pose, likely_rotations, meet, meet_corners, nearest_rotation, pose_table, principal_rotations, read_surface, slide, surface_moments
from memkit.core import InputError, make_rng
from memkit.database import Database
from memkit.lfd import lfd_descriptor, lfd_distance
from memkit.mesh import load_mesh, save_mesh
from memkit.pose import nearest_pose
from memkit.retrieval import nearest
from memkit.shapes import CATEGORIES, sample_shape


def random_rotation(rng):
    q = rng.normal(size=4); w, x, y, z = q/np.linalg.norm(q)
    return np.array([[1 - 2*(y*y + z*z), 2*(x*y - w*z), 2*(x*z + w*y)], [2*(x*y + w*z), 1 - 2*(x*x + z*z), 2*(y*z - w*x)], [2*(x*z - w*y), 2*(y*z + w*x), 1 - 2*(x*x + y*y)]])


def shuffled(V, F, rng):
    "The same surface: vertices and faces in another order, faces begun at another corner."
    order = rng.permutation(len(V))
    where = np.argsort(order)
    return V[order], np.roll(where[F][rng.permutation(len(F))], 1, axis=1)


def auc(d_gen, d_test): return float(np.mean((d_gen[:, None] < d_test) + .5*(d_gen[:, None] == d_test)))


def same_rotation(a, b): return np.trace(a @ b.T) > 3 - 1e-9


def test_the_table_of_rotations_is_that_of_the_distance():
    "Turn triangles by an entry of the table: the descriptors then agree best at just that entry. (Not exactly: the box that centres and scales them turns too.)"
    V = make_rng(0, 'table').normal(size=(60, 3)); F = np.arange(60).reshape(20, 3)
    V /= np.linalg.norm(V, axis=1, keepdims=True)
    d = lfd_descriptor(V, F)
    for k, s, t in ((0, 0, 0), (17, 3, 8), (42, 9, 1), (59, 5, 5)):
        cost = alignment_costs(d, lfd_descriptor(V @ pose_table()[k, s, t].T, F))
        assert cost[k, s, t] == cost.min() < .5*np.median(cost)


@pytest.mark.parametrize('category', CATEGORIES)
def test_a_turned_scaled_shuffled_copy_is_at_zero(category):
    V, F = sample_shape(category, 3).mesh(24)
    rng = make_rng(1, category)
    W, G = shuffled(1.7*V @ random_rotation(rng).T + rng.normal(size=3), F, rng)
    found = align(W, G, V, F)
    assert found.distance == 0 < found.plain
    assert found.residual < 1e-6 and found.scale == pytest.approx(1/1.7, rel=1e-6)


@pytest.mark.parametrize('category', ['airplane', 'guitar', 'gun', 'teapot'])
def test_known_rotations_come_back(category):
    V, F = sample_shape(category, 0).mesh(24)
    for i in range(2):
        R = random_rotation(make_rng(i, category))
        found = align(V @ R.T + [1, 2, 3], F, V, F)
        W = found.scale*((V @ R.T + [1, 2, 3]) @ found.rotation.T) + found.shift
        assert same_rotation(found.rotation, R.T) or np.abs(np.sort(W, axis=0) - np.sort(V, axis=0)).max() < 1e-9   # or a symmetry of the shape
        assert np.linalg.det(found.rotation) == pytest.approx(1)


def test_a_copy_stored_in_single_precision_is_at_zero():
    V, F = sample_shape('chair', 1).mesh(24)
    W = (V @ random_rotation(make_rng(5)).T).astype(np.float32).astype(np.float64)
    assert align(W, F, V, F).distance == 0
    a, b = read_surface(W, F, seed=1), read_surface(V, F)
    pose, _ = find_pose(a, b, principal_rotations(a, b))
    assert (meet(W, a, b, pose) == V).all()                   # the digits that were lost come back


def test_another_mesh_of_the_same_surface_is_found():
    "Each face cut into four and the new corners rounded: no vertex correspondence of all, and another order."
    V, F = sample_shape('airplane', 2).mesh(24)
    middle = [(V[F[:, i]] + V[F[:, (i + 1) % 3]])/2 for i in range(3)]
    n, f = len(V), len(F)
    m = [n + i*f + np.arange(f) for i in range(3)]
    W = np.concatenate([V, *middle])
    G = np.concatenate([np.stack(x, 1) for x in ((F[:, 0], m[0], m[2]), (m[0], F[:, 1], m[1]), (m[2], m[1], F[:, 2]), (m[0], m[1], m[2]))])
    found = align(W @ random_rotation(make_rng(6)).T, G, V, F)
    assert found.distance <= 5 and found.plain > 1000


def test_a_tenth_missing_and_the_rest_is_met():
    V, F = sample_shape('chair', 0).mesh(24)
    middle = V[F].mean(1) @ [1, .3, .2]
    G = F[middle < np.quantile(middle, .9)]
    R = random_rotation(make_rng(7))
    found, never_turned = align(V @ R.T, G, V, F), lfd_distance(lfd_descriptor(V, G), lfd_descriptor(V, F))
    assert same_rotation(found.rotation, R.T) and found.distance <= never_turned + 50


def test_moments_do_not_depend_on_the_triangulation():
    V, F = sample_shape('mug', 0).mesh(24)
    mid = V[F].mean(1)
    n = len(V) + np.arange(len(F))
    G = np.concatenate([np.stack([F[:, i], F[:, (i + 1) % 3], n], 1) for i in range(3)])
    for x, y in zip(surface_moments(V, F), surface_moments(np.concatenate([V, mid]), G)): np.testing.assert_allclose(x, y, atol=1e-12)


def test_mirror_images_stay_apart_where_left_and_right_differ():
    V, F = sample_shape('gun', 0).mesh(24)
    V = V + .15*np.maximum(V[:, :1], 0)*[0, 1, .6]            # nothing is symmetric any more
    V = V + .1*np.maximum(V[:, 1:2], 0)*[.5, 0, 1]
    R = random_rotation(make_rng(8))
    assert align(V @ R.T, F, V, F).residual < 1e-9
    assert align(V*[-1, 1, 1] @ R.T, F, V, F).residual > 1e-3


def test_rotations_are_proper_and_candidates_apart():
    a, b = (lfd_descriptor(*sample_shape('chair', i).mesh(24)) for i in (0, 1))
    R, cost = likely_rotations(a, b, 8, apart=20)
    assert len(R) == 8 and cost[0] == lfd_distance(a, b) and (np.diff(cost) >= 0).all()
    traces = np.einsum('aij,bij->ab', R, R)[np.triu_indices(8, 1)]
    assert traces.max() < 1 + 2*np.cos(np.deg2rad(20))
    np.testing.assert_allclose(np.linalg.det(R), 1, atol=1e-9)
    assert nearest_rotation(np.diag([1., 1, -1]))[2, 2] == pytest.approx(1) or np.linalg.det(nearest_rotation(np.diag([1., 1, -1]))) == pytest.approx(1)


@pytest.fixture(scope='module')
def toys():
    "Six training shapes; queries: turned copies of two of them, one of them with noise, and two new shapes."
    train = [sample_shape(c, 0).mesh(24) for c in ('guitar', 'chair', 'mug', 'gun', 'car', 'lamp')]
    rng = make_rng(9)
    (V, F), (W, G) = train[1], train[4]
    queries = [(V @ random_rotation(rng).T, F), ((W + rng.normal(size=W.shape)*.005) @ random_rotation(rng).T, G), sample_shape('chair', 1).mesh(24), sample_shape('toy', 1).mesh(24)]
    return queries, train, *(np.array([lfd_descriptor(*x) for x in meshes]) for meshes in (queries, train))


def test_never_above_plain_and_sorted(toys):
    queries, train, Q, G = toys
    plain = nearest(Q, G, 4, n_jobs=1)[1]
    I, D, R = nearest_pose(queries, train, Q, G, k=4, candidates=2, n_jobs=1, rotations=True)
    assert I.shape == D.shape == (4, 4) and R.shape == (4, 4, 3, 3) and I.dtype == D.dtype == np.int64
    assert (D <= plain).all() and (np.diff(D, axis=1) >= 0).all() and D[0, 0] == 0
    assert I[0, 0] == 1 and I[1, 0] == 4
    for i, row in enumerate(I): assert len(set(row.tolist())) == 4
    turned = lfd_distance(lfd_descriptor(queries[0][0] @ R[0, 0].T, queries[0][1]), G[1])
    assert turned <= 20                                       # the rotation that is returned is the one that was measured


def test_same_result_again_and_in_other_processes(toys, tmp_path):
    queries, train, Q, G = toys
    files = [save_mesh(tmp_path/f'{i}.ply', *x) for i, x in enumerate(train)]
    first = nearest_pose(queries, train, Q, G, k=2, n_jobs=1, rotations=True)
    for again in (nearest_pose(queries, train, Q, G, k=2, n_jobs=1, rotations=True), nearest_pose(queries, files, Q, G, k=2, n_jobs=2, rotations=True)):
        for x, y in zip(first, again): np.testing.assert_array_equal(x, y)


def test_databases_choose_their_meshes_by_id(toys):
    queries, train, Q, G = toys
    shelf = Database(dict(name='lfd'), list('abcdef'), G, ['']*6, {})
    meshes = dict(zip('fedcbax', [*train[::-1], None]))       # another order, and one mesh that failed
    I, D = nearest_pose(queries[:2], meshes, Q[:2], shelf, k=1, candidates=1, n_jobs=1)
    assert I[:, 0].tolist() == [1, 4] and D[0, 0] == 0
    assert (nearest_pose(queries[:1], train, candidates=1)[1] == D[:1]).all()   # described on the way


def test_excluded_shapes_are_not_met(toys):
    queries, train, Q, G = toys
    exclude = np.zeros((4, 6), bool); exclude[0, 1] = True
    assert nearest_pose(queries, train, Q, G, candidates=1, exclude=exclude, n_jobs=1)[0][0, 0] != 1
    I, D = nearest_pose(train[:3], train[:3], G[:3], G[:3], exclude_self=True, n_jobs=1)
    assert (I[:, 0] != range(3)).all() and (D > 0).all()


@pytest.mark.parametrize('wrong, message', [(dict(n_starts=0), 'n_starts = 0'), (dict(candidates=2.5), 'candidates = 2.5'), (dict(k=7), 'k = 7'), (dict(k=0), 'k = 0'), (dict(query=np.zeros((3, 10, 10, 47), np.uint8)), '4 meshes and 3'),
                                            (dict(n_jobs=0), 'n_jobs 0')])
def test_bad_arguments_are_refused(toys, wrong, message):
    queries, train, Q, G = toys
    with pytest.raises(InputError, match=message): nearest_pose(queries, train, **{**dict(query=Q, gallery=G, n_jobs=1), **wrong})


def test_a_missing_mesh_is_named(toys, tmp_path):
    queries, train, Q, G = toys
    with pytest.raises(InputError, match='gone.ply'): nearest_pose([tmp_path/'gone.ply'], train, Q[:1], G, n_jobs=1)


def test_stages_do_not_leave_a_pose_that_fits():
    V, F = sample_shape('teapot', 0).mesh(24)
    a, b, rest = read_surface(V, F, seed=1), read_surface(V, F, seed=2), Pose(np.eye(3), 1., np.zeros(3))
    pose, apart = slide(a, b, rest)
    assert np.trace(pose.rotation) > 3 - 1e-3 and apart < .02
    pose, half, whole = meet_corners(a, b, rest)
    assert half < 1e-12 and whole < 1e-12 and same_rotation(pose.rotation, np.eye(3))
    assert any(same_rotation(R, np.eye(3)) for R in principal_rotations(a, a))


@pytest.fixture(scope='module')
def real_sets(real_meshes):
    "20 classes: files 0-2 train, 3 test; copies of the files 0, turned arbitrarily, and with 0.5 % vertex noise on top."
    sets = {name: [] for name in ('train', 'test', 'turned', 'noisy')}
    for p in sorted(real_meshes.glob('*.off')):
        V, F = load_mesh(p)
        if p.stem[-1] in '012': sets['train'].append((V, F))
        if p.stem[-1] == '3': sets['test'].append((V, F))
        if p.stem[-1] == '0':
            rng = make_rng(0, p.stem)
            W = V @ random_rotation(rng).T
            sets['turned'].append((W, F))
            sets['noisy'].append((W + rng.normal(size=V.shape)*.005*np.ptp(W[F.ravel()], axis=0).max(), F))
    return sets, {name: np.array([lfd_descriptor(*x) for x in meshes]) for name, meshes in sets.items()}


def test_turned_copies_of_real_meshes_are_nearer_than_new_shapes(real_sets):
    sets, d = real_sets
    plain = {name: nearest(d[name], d['train'])[1][:, 0] for name in ('turned', 'noisy', 'test')}
    posed = {name: nearest_pose(sets[name], sets['train'], d[name], d['train'], n_jobs=2)[1][:, 0] for name in plain}
    assert all((posed[name] <= plain[name]).all() for name in plain)
    assert auc(plain['turned'], plain['test']) < .75
    assert auc(posed['turned'], posed['test']) >= .98 and (posed['turned'] == 0).sum() >= 19
    assert auc(posed['noisy'], posed['test']) >= .9
    assert np.median(posed['test']) > 4500, 'new shapes must not be drawn near'
