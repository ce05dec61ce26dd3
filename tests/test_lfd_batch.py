"""Descriptors drawn in torch are the bytes of the processor's; only timing was left to a GPU."""
import numpy as np
import pytest

torch = pytest.importorskip('torch')
from memkit.database import build_database
from memkit.embed import embed_folder
from memkit.lfd import lfd_descriptor
from memkit.lfd_batch import DeviceLfd, draw_silhouettes, lfd_descriptors
from memkit.mesh import save_mesh
from memkit.render import render_silhouettes
from memkit.shapes import sample_shape


def soup(seed, n, size):
    "Loose triangles of all sizes and slants, slivers and points among them."
    rng = np.random.default_rng(seed)
    V = (rng.uniform(-1, 1, (n, 1, 3)) + rng.normal(0, size, (n, 3, 3))*rng.choice([1, 1e-3, 0], (n, 3, 1), p=[.8, .15, .05])).reshape(-1, 3)
    return V, np.arange(3*n).reshape(-1, 3)


@pytest.mark.parametrize('seed, n, size', [(0, 300, .02), (1, 40, .6), (2, 6, 3.)])
def test_silhouettes_of_loose_triangles(seed, n, size):
    V, F = soup(seed, n, size)
    assert (draw_silhouettes(V, F, part=999).numpy() == render_silhouettes(V, F).reshape(100, 256, 256)).all()


def test_descriptors(tmp_path):
    meshes = [sample_shape('guitar', 5).mesh(20), soup(3, 60, .3), (np.eye(3), np.array([[0, 1, 2]]))]
    for found, mesh in zip(lfd_descriptors(meshes, n_jobs=2), meshes): assert (found == lfd_descriptor(*mesh)).all()


def test_a_folder_gives_the_database_of_the_processor(tmp_path):
    (tmp_path/'meshes').mkdir()
    for i in range(3): save_mesh(tmp_path/'meshes'/f'm{i}.ply', *soup(i, 20, .4))
    save_mesh(tmp_path/'meshes'/'thin.ply', np.array([[0, 0, 0], [1, 0, 0], [.5, 1e-9, 1e-9]]), np.array([[0, 1, 2]]))
    drawn = embed_folder(tmp_path/'meshes', DeviceLfd('cpu'), tmp_path/'drawn', batch_size=2, n_jobs=1)
    plain = build_database(tmp_path/'meshes', tmp_path/'plain', n_jobs=1)
    assert drawn.ids == plain.ids and set(drawn.failures) == set(plain.failures) == {'thin'}
    assert {p.name for p in (tmp_path/'drawn').glob('descriptors-*.npy')} == {p.name for p in (tmp_path/'plain').glob('descriptors-*.npy')}
