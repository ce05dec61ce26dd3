"""Fields become meshes: the coarse-to-fine way gives what the dense one gives, for far fewer questions."""
import numpy as np
import pytest
import trimesh

from memkit.core import InputError
from memkit.sdf import MeshField, empty_grid, mesh_to_sdf, mixed_signs, near_surface, oriented_faces, sdf_to_mesh
from memkit.shapes import CATEGORIES, sample_shape


class Counted:
    "A field that counts the points it is asked, and how often it is called."
    def __init__(self, field): self.field, self.points, self.calls, self.seen = field, 0, 0, []
    def __call__(self, pts):
        self.points += len(pts); self.calls += 1; self.seen.append(pts)
        return self.field(pts)


def ball(pts, r=.8): return np.linalg.norm(pts, axis=1) - r


def watertight(V, F):
    mesh = trimesh.Trimesh(V, F, process=False)
    return mesh.is_watertight and mesh.is_winding_consistent and mesh.volume > 0


@pytest.mark.parametrize('category', CATEGORIES)
@pytest.mark.parametrize('lipschitz', [1., 1.5])
def test_adaptive_equals_dense(category, lipschitz):
    shape = sample_shape(category, 11)
    V, F = sdf_to_mesh(shape.sdf, 64, 'adaptive', lipschitz=lipschitz)
    W, G = sdf_to_mesh(shape.sdf, 64, 'dense')
    assert np.array_equal(V, W) and np.array_equal(F, G)


def test_thirty_times_fewer_questions_at_256():
    factors = []
    for category in CATEGORIES[::6]:
        field = Counted(sample_shape(category, 3).sdf)
        sdf_to_mesh(field, 256)
        factors.append(257**3/field.points)
    assert np.median(factors) >= 30, factors


def test_no_point_is_asked_twice_and_batches_are_bounded():
    field = Counted(ball)
    sdf_to_mesh(field, 64, batch=1000)
    assert max(map(len, field.seen)) <= 1000 and field.calls > 1
    # a corner of a coarse grid is a corner of the finer one: it may not be asked again
    assert len(np.unique(np.concatenate(field.seen).round(9), axis=0)) == field.points


def test_batch_size_does_not_change_the_mesh():
    a, b = (sdf_to_mesh(ball, 48, batch=n) for n in (777, 1 << 20))
    assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])


@pytest.mark.parametrize('resolution', [16, 31, 50, 64, 96])
@pytest.mark.parametrize('mode', ['adaptive', 'dense'])
def test_ball_at_any_resolution(resolution, mode):
    V, F = sdf_to_mesh(ball, resolution, mode)
    assert watertight(V, F)
    assert np.abs(np.linalg.norm(V, axis=1) - .8).max() < .5*(2.02/resolution)**2 + 2e-3*2.02/resolution
    assert trimesh.Trimesh(V, F, process=False).volume == pytest.approx(4/3*np.pi*.8**3, rel=12/resolution**2)
    assert F.dtype == np.int64 and V.dtype == np.float64 and len(np.unique(F)) == len(V)


def test_exact_zeros_make_no_degenerate_faces():
    "A cube whose faces lie in planes of the grid: every value there is zero."
    V, F = sdf_to_mesh(lambda p: np.abs(p).max(1) - .5, 32, bound=1.)
    assert watertight(V, F)
    area = np.linalg.norm(np.cross(V[F[:, 1]] - V[F[:, 0]], V[F[:, 2]] - V[F[:, 0]]), axis=1)
    assert area.min() > 0


@pytest.mark.parametrize('seed', range(6))
def test_many_balls_and_shells_are_watertight(seed):
    rng = np.random.default_rng(seed)
    centre, radius = rng.normal(size=(6, 3))*.3, rng.uniform(.06, .3, 6)
    def field(p):
        d = np.linalg.norm(p[:, None] - centre, axis=2) - radius
        return np.min(np.abs(d) - .03 if seed % 2 else d, axis=1)
    assert watertight(*sdf_to_mesh(field, 48, bound=1.6))


def test_continuation_follows_an_overestimating_field():
    "A thin rod on a ball, distances four times too large: with L = 1 only the continuation can reach the tip."
    def field(p):
        rod = np.maximum(np.hypot(p[:, 0] - .06, p[:, 1] - .07) - .04, np.abs(p[:, 2]) - .8)
        return 4*np.minimum(np.linalg.norm(p + [0, 0, .5], axis=1) - .3, rod)
    V, F = sdf_to_mesh(field, 64, lipschitz=1., bound=1.)
    W, G = sdf_to_mesh(field, 64, 'dense', bound=1.)
    assert np.array_equal(V, W) and np.array_equal(F, G)
    assert V[:, 2].max() == pytest.approx(.8, abs=.03)


def test_a_speck_inside_one_coarse_cell_is_found():
    "Nothing leads to it: only the bound itself keeps its cell."
    def field(p): return np.minimum(np.linalg.norm(p + .4, axis=1) - .3, np.linalg.norm(p - .4375*1.01, axis=1) - .03)
    V, F = sdf_to_mesh(field, 128, lipschitz=1.)
    W, G = sdf_to_mesh(field, 128, 'dense')
    assert trimesh.Trimesh(V, F, process=False).body_count == 2
    assert np.array_equal(V, W) and np.array_equal(F, G)


def test_torch_fields():
    torch = pytest.importorskip('torch')
    V, F = sdf_to_mesh(lambda p: torch.linalg.vector_norm(torch.from_numpy(p).float(), dim=1) - .8, 32)
    W, G = sdf_to_mesh(ball, 32)
    assert np.abs(V - W).max() < 1e-6 and np.array_equal(F, G)


@pytest.mark.parametrize('kwargs, message', [
    (dict(field=lambda p: ball(p) + 9), 'no surface.*outside'), (dict(field=lambda p: ball(p) - 9), 'no surface.*inside'),
    (dict(field=ball, mode='fast'), "mode 'fast'"), (dict(field=ball, resolution=1), 'at least 2'),
    (dict(field=lambda p: p), 'shape'), (dict(field=lambda p: p[:, 0]*np.nan), 'NaN')])
@pytest.mark.parametrize('mode', ['adaptive', 'dense'])
def test_refusals(kwargs, message, mode):
    with pytest.raises(InputError, match=message): sdf_to_mesh(**dict(dict(resolution=32, mode=mode), **kwargs))


# ---- a mesh as a field

CUBE = (np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float),
        np.array([[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1], [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]]))
SPACE = np.random.default_rng(5).uniform(-2, 2, (3000, 3))


def cube_sdf(p):
    q = np.abs(p) - 1
    return np.linalg.norm(q.clip(0), axis=1) + q.max(1).clip(None, 0)


@pytest.mark.parametrize('move, scale', [(0, 1), ((5e6, -3e6, 0), 1), (0, 1e-8), (0, 1e150)])
def test_distance_to_a_cube_anywhere(move, scale):
    V, F = CUBE
    got = mesh_to_sdf((V*scale) + move, F, (SPACE*scale) + move)/scale
    assert np.abs(got - cube_sdf(SPACE)).max() < 1e-8 and got.dtype == np.float64


def test_distance_to_many_triangles_by_brute_force():
    "A soup of random triangles: the unsigned distance is the smallest of those to each triangle, and its sign that of the exact solid angles."
    rng = np.random.default_rng(1)
    V, F = rng.normal(size=(90, 3)), np.arange(90).reshape(30, 3)
    points = rng.normal(size=(200, 3))
    nearest = np.stack([trimesh.triangles.closest_point(np.repeat(V[f][None], len(points), 0), points) for f in F])
    assert np.allclose(np.abs(mesh_to_sdf(V, F, points)), np.linalg.norm(nearest - points, axis=2).min(0), atol=1e-9)
    A, B, C = (V[oriented_faces(V, F)][:, k][:, None] - points for k in range(3))          # van Oosterom and Strackee 1983
    a, b, c = (np.linalg.norm(x, axis=2) for x in (A, B, C))
    angle = 2*np.arctan2((A*np.cross(B, C)).sum(2), a*b*c + (A*B).sum(2)*c + (B*C).sum(2)*a + (C*A).sum(2)*b).sum(0)/(4*np.pi)
    assert np.abs(MeshField(V, F).winding(points) - angle).max() < .02


def test_flipped_faces_change_nothing():
    V, F = sdf_to_mesh(sample_shape('toy', 3).sdf, 48)
    whole, flip = mesh_to_sdf(V, F, SPACE/2), np.random.default_rng(0).random(len(F)) < .3
    assert np.allclose(mesh_to_sdf(V, np.where(flip[:, None], F[:, ::-1], F), SPACE/2), whole, atol=1e-12)
    flip[0] = True                                                                                       # where the walk begins
    assert np.array_equal(oriented_faces(V, np.where(flip[:, None], F[:, ::-1], F)), F)
    assert np.allclose(mesh_to_sdf(V, F[:, ::-1], SPACE/2), whole, atol=1e-12)
    assert np.allclose(mesh_to_sdf(V[F].reshape(-1, 3), np.arange(F.size).reshape(-1, 3), SPACE/2), whole, atol=1e-12)
    extra = np.concatenate([V, [[9, 9, 9]]]), np.concatenate([F, F[:20, [0, 0, 1]]])                     # a vertex of no face, faces without area
    assert np.allclose(mesh_to_sdf(*extra, SPACE/2), whole, atol=1e-12)


def test_back_sides_of_a_closed_body_do_not_empty_it():
    "Every face a second time, looking inward, in another order and with other numbers for its corners; the sheet beside it stays a sheet."
    V, F = sdf_to_mesh(sample_shape('toy', 3).sdf, 32)
    order = np.random.default_rng(1).permutation(len(F))
    W, G = np.concatenate([V, V]), np.concatenate([F, F[order][:, ::-1] + len(V)])
    assert np.allclose(mesh_to_sdf(W, G, SPACE/2), mesh_to_sdf(V, F, SPACE/2), atol=1e-12)
    sheet = np.array([[3., 0, 0], [4, 0, 0], [4, 1, 0]]), np.array([[0, 1, 2], [2, 1, 0]])
    near = SPACE*[.5, .5, .01] + [3.5, .5, 0]
    assert (mesh_to_sdf(np.concatenate([W, sheet[0]]), np.concatenate([G, sheet[1] + len(W)]), near) > 0).all()


def test_open_and_overlapping_meshes_have_the_right_side():
    V, F = CUBE
    open_sdf = mesh_to_sdf(V, F[:10], SPACE)
    below = SPACE[:, 2] < .5                                                                             # away from the missing lid
    assert ((open_sdf < 0) == (cube_sdf(SPACE) < 0))[below].all()
    both = mesh_to_sdf(np.concatenate([V, V + .7]), np.concatenate([F, F + 8]), SPACE)
    assert ((both < 0) == (np.minimum(cube_sdf(SPACE), cube_sdf(SPACE - .7)) < 0)).all()


def test_there_and_back():
    shape = sample_shape('bottle', 0)
    V, F = shape.mesh(64)
    W, G = sdf_to_mesh(MeshField(V, F), 64)
    assert watertight(W, G) and np.abs(shape.sdf(W)).max() < .02


def test_without_libigl_the_message_names_the_extra(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'igl', None)
    with pytest.raises(InputError, match=r'memkit\[data\]'): mesh_to_sdf(*CUBE, SPACE)


@pytest.mark.parametrize('V, F, points, message', [
    (CUBE[0], CUBE[1], [0, 0, 0], r'expected \(q, 3\)'), (CUBE[0], CUBE[1], [[0, np.nan, 0]], 'finite'), (CUBE[0]*0, CUBE[1], SPACE, 'larger than a point'), (CUBE[0], CUBE[1] + 1, SPACE, 'expected 0 to 7')])
def test_mesh_field_refusals(V, F, points, message):
    with pytest.raises(InputError, match=message): mesh_to_sdf(V, F, points)


@pytest.mark.parametrize('seed', range(3))
def test_children_that_are_dropped_hold_no_surface(seed):
    "Corners of a coarse grid against all values of the next one, for fields whose slope is 1 everywhere."
    rng = np.random.default_rng(seed)
    centre, radius = rng.uniform(-.8, .8, (40, 3)), rng.uniform(.01, .3, 40)
    def field(p): return (np.linalg.norm(p[:, None] - centre, axis=2) - radius).min(1)
    coarse, fine = empty_grid(24, 1.), empty_grid(48, 1.)
    for grid in (coarse, fine): grid.ask(field, np.ones_like(grid.known), 1 << 15)
    keep, surface = near_surface(coarse, 1.), mixed_signs(fine)
    assert surface.sum() > 1000 and not (surface & ~keep).any()
    assert keep.sum() < .6*near_surface(coarse, 2.).sum()
