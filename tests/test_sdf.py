"""Fields become meshes: the coarse-to-fine way gives what the dense one gives, for far fewer questions."""
import numpy as np
import pytest
import trimesh

from memkit.core import InputError
from memkit.sdf import sdf_to_mesh
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


def test_twenty_times_fewer_questions_at_256():
    factors = []
    for category in CATEGORIES[::4]:
        field = Counted(sample_shape(category, 3).sdf)
        sdf_to_mesh(field, 256)
        factors.append(257**3/field.points)
    assert np.median(factors) >= 20, factors


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
