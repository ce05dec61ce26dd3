"""Distances: kernels against plain definitions, declared invariances over all of DISTANCES, tensors against arrays, copies found in any pose."""
import itertools, pickle

import numpy as np
import pytest
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from memkit.core import InputError, make_rng
from memkit.distances import CHANGES, DISTANCES, changed, chamfer_points, d2_histogram, get_distance, invariance, over_rotations, packed_cells, solid_cells, total_variation, volume_iou
from memkit.mesh import load_mesh, normalize_mesh
from memkit.pointsets import chamfer_distance, directed, emd_distance, f_score, nearest_points, normal_consistency
from memkit.render import lfd_cameras
from memkit.sdf import sdf_to_mesh
from memkit.shapes import sample_shape, shape_set
from memkit.solids import ball, box
from memkit.turns import best_poses, dodecahedron_rotations, pose_distance, pose_points, rigid_fit, search_rotations, surface_moments, turn_points

rng = make_rng(0, 'test_distances')


def clouds(kind, n, count=2):
    "Point sets of several characters."
    x = rng.normal(size=(count, n, 3))
    if kind == 'plane': x[..., 2] = 0
    if kind == 'line': x[..., 1:] = 0
    if kind == 'one place': x[:] = x[:, :1]
    if kind == 'repeated': x = np.repeat(x, 2, 1)[:, :n]
    if kind == 'far away': x += 1e4
    if kind == 'two clusters': x[:, ::2] += 50
    return x


@pytest.mark.parametrize('kind', ['cloud', 'plane', 'line', 'one place', 'repeated', 'far away', 'two clusters'])
@pytest.mark.parametrize('n, m', [(1, 1), (7, 8), (8, 9), (16, 17), (15, 33), (300, 129)])
def test_nearest_neighbours_are_exact(kind, n, m):
    a, b = clouds(kind, n)[0], clouds(kind, m)[0]
    d2, index = nearest_points(a, b)
    full = ((a[:, None] - b[None])**2).sum(-1)
    assert np.allclose(d2, full.min(1), rtol=1e-13, atol=0) and index.dtype == np.int64
    assert np.allclose(full[np.arange(n), index], d2, rtol=1e-13, atol=0)
    assert (nearest_points(a, a)[0] == 0).all()


@pytest.mark.parametrize('k, l', [(5, 5), (20, 33), (2048, 1000)])
def test_chamfer_equals_the_tree_loop(k, l):
    a, b = rng.normal(size=(3, k, 3)).astype(np.float32), rng.normal(size=(2, l, 3)).astype(np.float32)
    there = np.array([[cKDTree(y).query(x)[0] for y in b.astype(float)] for x in a.astype(float)])
    back = np.array([[cKDTree(x).query(y)[0] for y in b.astype(float)] for x in a.astype(float)])
    assert np.allclose(chamfer_distance(a, b), (there**2).mean(2) + (back**2).mean(2), rtol=1e-12)
    assert np.allclose(chamfer_distance(a, b, 'cd_l1_avg'), (there.mean(2) + back.mean(2))/2, rtol=1e-12)
    p, r = (there < .3).mean(2), (back < .3).mean(2)
    assert np.allclose(f_score(a, b, .3), 2*p*r/np.maximum(p + r, 1e-300))
    assert (chamfer_distance(a, b) == chamfer_distance(b, a).T).all()


def test_normal_consistency_equals_its_definition():
    a, b = rng.normal(size=(2, 3, 40, 6))
    for x in (a, b): x[..., 3:] /= np.linalg.norm(x[..., 3:], axis=-1, keepdims=True)
    def one(x, y): return np.abs((x[:, 3:]*y[cKDTree(y[:, :3]).query(x[:, :3])[1], 3:]).sum(1)).mean()
    assert np.allclose(normal_consistency(a, b), [[(one(x, y) + one(y, x))/2 for y in b] for x in a])


def test_earth_movers_distance_is_the_best_of_all_matchings():
    a, b = rng.normal(size=(2, 2, 5, 3))
    for kind, power in (('emd_l2', 1), ('emd_sq', 2)):
        best = [[min((np.linalg.norm(x - y[list(p)], axis=1)**power).mean() for p in itertools.permutations(range(5))) for y in b] for x in a]
        assert np.allclose(emd_distance(a, b, kind), best)
    with pytest.raises(InputError, match='at most 2,048'): emd_distance(np.zeros((1, 2049, 3)), np.zeros((1, 2049, 3)))


@pytest.mark.parametrize('bad', [np.zeros((4, 3)), np.zeros((2, 0, 3)), np.zeros((2, 4, 2)), np.array([['a']*3]*2)[None], np.full((1, 4, 3), np.inf)])
def test_what_is_no_point_set_is_refused(bad):
    good = np.zeros((1, 4, 3))
    for f in (chamfer_distance, emd_distance, pose_distance, lambda a, b: f_score(a, b, .1)):
        with pytest.raises(InputError, match='a: '): f(bad, good)
        with pytest.raises(InputError, match='b: '): f(good, bad)


def test_tensors_give_the_same_numbers():
    torch = pytest.importorskip('torch')
    a, b = rng.normal(size=(2, 3, 70, 3))
    na, nb = (np.concatenate([x, x/np.linalg.norm(x, axis=-1, keepdims=True)], -1) for x in (a, b))
    cells = rng.integers(0, 256, (2, 3, 64)).astype(np.uint8)
    shares = rng.dirichlet(np.ones(9), (2, 3))
    points = np.stack([pose_points(*sample_shape('chair', i).mesh(12), 150) for i in range(2)])
    calls = [(chamfer_distance, a, b), (lambda x, y: chamfer_distance(x, y, 'cd_l1_avg'), a, b), (lambda x, y: f_score(x, y, .4), a, b), (normal_consistency, na, nb),
             (emd_distance, a, b), (lambda x, y: emd_distance(x, y, 'emd_sq'), a, b), (volume_iou, *cells), (total_variation, *shares), (pose_distance, points, points[:1])]
    calls += [(DISTANCES[k].pairwise, *x) for k, x in (('one_minus_iou', cells), ('one_minus_fscore', (a, b)), ('one_minus_nc', (na, nb)))]
    calls += [(over_rotations('cd', dodecahedron_rotations()[:4]).pairwise, a[:, :20], b[:, :20])]
    for f, x, y in calls:
        found = f(torch.from_numpy(x), torch.from_numpy(y))
        assert isinstance(found, torch.Tensor) and found.dtype == torch.float64
        assert np.allclose(found.numpy(), f(x, y), rtol=1e-10, atol=1e-12)
    assert np.allclose([v.numpy() for v in nearest_points(torch.from_numpy(a[0]), torch.from_numpy(b[0]))], nearest_points(a[0], b[0]))
    with pytest.raises(InputError, match='not finite'): chamfer_distance(torch.full((1, 2, 3), torch.nan), torch.zeros(1, 2, 3))


# ---- every distance of the list

MESHES = [sample_shape(*s).mesh(24) for s in (('mug', 4), ('guitar', 2), ('chair', 5))]
EACH = pytest.mark.parametrize('name', DISTANCES)


@pytest.fixture(scope='module')
def described(): return {k: np.stack([d.describe(*m) for m in MESHES]) for k, d in DISTANCES.items()}


@EACH
def test_it_is_a_distance(name, described):
    d, x = DISTANCES[name], described[name]
    D = np.asarray(d.pairwise(x, x))
    assert D.shape == (3, 3) and (D >= 0).all() and np.isfinite(D).all()
    assert (np.abs(D.diagonal()) < 1e-6).all() and (D + np.eye(3) > 1e-3).all()
    assert np.allclose(D, D.T, rtol=.3 if name == 'cd_pose' else 1e-12)          # the search over poses starts from one of the two
    assert d.pairwise(x[:2], x).shape == (2, 3) and (np.asarray(d.pairwise(x[:2], x)) == D[:2]).all()


@EACH
def test_its_record_is_complete_and_travels_to_other_processes(name, described):
    d = DISTANCES[name]
    assert d.name == name and d.label and d.protocol and d.convention and d.normalisation and d.size > 0
    assert d.invariant <= set(CHANGES)
    again = pickle.loads(pickle.dumps(d.describe))(*MESHES[0])
    assert again.dtype == described[name].dtype and (again == described[name][0]).all()
    if d.turn is not None: assert d.turn(described[name], np.eye(3)).shape == described[name].shape


def median_shares(name):
    "Over two kinds of shape: how much of each change is seen, as a share of the distance to another shape."
    rows = [invariance(name, MESHES[i], MESHES[j]) for i, j in ((1, 2), (2, 1))]
    return {c: np.mean([r[c] for r in rows]) for c in CHANGES}


@EACH
def test_declared_invariances_hold_and_only_those(name):
    share, d = median_shares(name), DISTANCES[name]
    for change in CHANGES:
        limit = 1e-3 if change in ('translation', 'scale') else .75 if (name, change) == ('lfd', 'rotation') else .35
        if change in d.invariant: assert share[change] < limit, (change, share)
        elif change == 'rotation': assert share[change] > .4, share                # reflections of nearly symmetric shapes may be small: see the test below
        else: assert change == 'reflection'


@EACH
def test_reflection_is_seen_exactly_where_declared(name):
    odd = sdf_to_mesh(box(.9, .3, .5).move(0, -.4, 0) | box(.25, .9, .3).move(-.3, .1, .1) | ball(.25).move(.35, -.1, .2), 24)
    assert (invariance(name, odd, MESHES[0])['reflection'] < .25) == ('reflection' in DISTANCES[name].invariant)


def test_changes_are_what_they_say():
    V, F = MESHES[0]
    area = lambda V, F: np.linalg.norm(np.cross(V[F[:, 1]] - V[F[:, 0]], V[F[:, 2]] - V[F[:, 0]]), axis=1).sum()
    for what, ratio in (('translation', 1), ('scale', 1.7**2), ('rotation', 1), ('reflection', 1), ('tessellation', 1)): assert np.isclose(area(*changed(V, F, what)), ratio*area(V, F)), what
    assert len(changed(V, F, 'tessellation')[1]) == 4*len(F)
    R = np.linalg.lstsq(V, changed(V, F, 'rotation')[0], rcond=None)[0]
    assert np.allclose(R @ R.T, np.eye(3)) and np.isclose(np.linalg.det(R), 1) and np.isclose(np.trace(R), 1 + 2*np.cos(np.deg2rad(100)))


# ---- solids

def test_closed_surfaces_do_not_leak_in_any_pose():
    cube = sdf_to_mesh(box(1., 1., 1.), 16)
    for R in Rotation.random(6, random_state=1).as_matrix():
        V = cube[0] @ R.T
        cells = solid_cells(V, cube[1], 32)
        volume = np.einsum('fi,fi->', V[cube[1][:, 0]], np.cross(V[cube[1][:, 1]], V[cube[1][:, 2]]))/6/np.ptp(V, axis=0).max()**3
        assert volume < cells.mean() < 1.25*volume + .02


def test_overlapping_parts_unite_and_orientation_does_not_matter():
    a, b = sdf_to_mesh(box(1., .6, .6), 16), sdf_to_mesh(box(.6, 1., .6), 16)
    V, F = np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1][:, ::-1] + len(a[0])])
    both, whole = solid_cells(V, F), solid_cells(*sdf_to_mesh(box(1., .6, .6) | box(.6, 1., .6), 16))
    assert (both & whole).sum()/(both | whole).sum() > .93


def test_iou_counts_cells():
    a, b = rng.integers(0, 2, (2, 3, 64)).astype(bool)
    found = volume_iou(np.packbits(a, axis=1), np.packbits(b, axis=1))
    assert np.allclose(found, [[(x & y).sum()/(x | y).sum() for y in b] for x in a])
    assert volume_iou(np.zeros((1, 8), np.uint8), np.zeros((1, 8), np.uint8))[0, 0] == 1


def test_d2_of_a_turned_mesh_is_the_same_to_rounding():
    V, F = MESHES[1]
    R = Rotation.random(random_state=3).as_matrix()
    assert total_variation(d2_histogram(V, F)[None], d2_histogram(V @ R.T*3, F)[None])[0, 0] < 1e-3


# ---- poses

def test_rotations():
    R, S = dodecahedron_rotations(), search_rotations()
    assert R.shape == (60, 3, 3) and S.shape == (624, 3, 3) and (R[0] == np.eye(3)).all() and np.allclose(S[0], np.eye(3))
    assert np.allclose(S @ S.transpose(0, 2, 1), np.eye(3)) and np.allclose(np.linalg.det(S), 1)
    corners = lfd_cameras()[0]
    for r in R: assert (np.linalg.norm((corners @ r.T)[:, None] - corners, axis=-1).min(1) < 1e-3).all()
    T = Rotation.random(2000, random_state=0).as_matrix()
    assert np.rad2deg(np.arccos(np.clip((np.einsum('aij,bij->ab', T, S) - 1)/2, -1, 1))).min(1).max() < 25


def test_surface_moments_do_not_depend_on_tessellation_or_pose():
    V, F = MESHES[2]
    centre, size = surface_moments(V, F)
    for what in CHANGES:
        c, s = surface_moments(*changed(V, F, what))
        assert np.isclose(s, size*(1.7 if what == 'scale' else 1))
    assert np.allclose(surface_moments(*changed(V, F, 'tessellation'))[0], centre)
    P = pose_points(V, F, 4000)
    assert np.abs(P.mean(0)).max() < .06 and abs((P**2).sum(1).mean() - 1) < .06


@pytest.mark.parametrize('degenerate', [False, True])
def test_rigid_fit_is_the_best_motion(degenerate):
    a = rng.normal(size=(30, 3))*([1, 1, 0] if degenerate else [1, 1, 1])
    b = a @ Rotation.random(random_state=2).as_matrix().T + 1 + rng.normal(0, .05, (30, 3))
    R, t = rigid_fit(a, b)
    best, rms = Rotation.align_vectors(b - b.mean(0), a - a.mean(0))
    assert np.isclose(np.linalg.norm(a @ R.T + t - b), rms, rtol=1e-9) and np.allclose(R, best.as_matrix(), atol=1e-6)


@pytest.fixture(scope='module')
def turned():
    meshes = [s.mesh(20) for s in shape_set(24, 5)]
    T = Rotation.random(24, random_state=4).as_matrix()
    return meshes, T, np.stack([pose_points(*m) for m in meshes])


def test_exact_copies_in_any_pose_come_to_zero(turned):
    "All but near-round shapes, for which one pose in a ring must be hit: 189 of 192 when measured."
    meshes, T, P = turned
    found, exact = [], []
    for (V, F), R, p in zip(meshes, T, P):
        copy = pose_points(V @ R.T*.2 - 4, F)[None].astype(float)
        D, pose = best_poses(copy, p[None])
        found.append(D[0, 0]); exact.append(chamfer_distance(copy @ pose[0, 0, :, :3].T + pose[0, 0, :, 3], p[None])[0, 0])
    assert (np.array(found) < 1e-9).mean() >= .95 and max(found) < .03
    assert np.allclose(found, exact, rtol=1e-6, atol=1e-12)


def test_copies_sampled_anew_in_any_pose_are_found_and_plain_chamfer_fails(turned):
    meshes, T, P = turned
    fresh = np.stack([pose_points(V @ R.T, F, seed=7) for (V, F), R in zip(meshes, T)])
    D, poses = best_poses(fresh[:12], P)
    assert (D.argmin(1) == np.arange(12)).mean() >= .9
    plain = chamfer_distance(fresh[:12], P)
    assert (plain.argmin(1) == np.arange(12)).mean() < .6
    assert (D <= plain*(1 + 1e-12)).all()
    stated = [[chamfer_distance((fresh[i] @ poses[i, j, :, :3].T + poses[i, j, :, 3])[None], P[j][None])[0, 0] for j in (0, 7)] for i in range(3)]
    assert np.allclose(D[:3][:, [0, 7]], stated, rtol=1e-6)                        # the value is the exact distance at the pose returned


def test_blocks_do_not_change_the_result(turned):
    P = turned[2][:5, :200]
    assert (best_poses(P, P, block=2)[0] == best_poses(P, P)[0]).all()


def test_a_turned_chamfer_is_the_least_over_its_list():
    a, b = rng.normal(size=(2, 2, 15, 3))
    R = dodecahedron_rotations()[:7]
    best = np.min([chamfer_distance(a @ r.T, b) for r in R], axis=0)
    assert np.allclose(over_rotations('cd', R).pairwise(a, b), best)
    assert over_rotations('emd_l2', R[:1]).name == 'emd_l2_turned'


def test_real_meshes_turned(real_meshes):
    files = sorted(real_meshes.glob('*.off'))[::5]
    meshes = [load_mesh(f) for f in files]
    P = np.stack([pose_points(*m, 512) for m in meshes])
    T = Rotation.random(len(files), random_state=6).as_matrix()
    D = pose_distance(np.stack([pose_points(V @ R.T, F, 512) for (V, F), R in zip(meshes, T)]), P)
    assert (D.argmin(1) == np.arange(len(files))).mean() >= .95 and np.median(D.diagonal()) < 1e-9
    assert all(np.isfinite(DISTANCES[k].describe(*m)).all() for k in ('one_minus_iou', 'one_minus_nc', 'd2') for m in meshes)
