"""Silhouettes against the reference's, bit by bit, and the rasteriser against its rule tried on every sample.

`data/render_golden.npz` holds, for 30 procedural meshes of ours and the 100 views, CRC-32 and area of the silhouettes which the public
light field extractor draws (off-screen Mesa llvmpipe 22.3.6), and 29 of the meshes: vertices in millionths, fan-triangulated faces."""
import gzip, hashlib, zlib

import numpy as np
import pytest

from memkit.core import InputError
from memkit.mesh import load_mesh
from memkit.render import _fill, lfd_cameras, render_maps, render_shaded, render_silhouettes, sprite_sheet, view_rows


@pytest.fixture(scope='module')
def reference(request):
    with np.load(request.config.rootpath/'tests'/'data'/'render_golden.npz') as z: return dict(z)


def crc(masks): return np.array([zlib.crc32(np.packbits(m).tobytes()) for m in masks.reshape(100, -1)], np.uint32).reshape(10, 10)


def test_cameras():
    eyes = lfd_cameras()
    assert hashlib.sha256(eyes.astype('<f8').tobytes()).hexdigest() == 'cfc55cb3dba59e72b97ae860c31fa202663e84c93dc92054ae89c3475dd2d12b'
    assert view_rows(eyes).dtype == np.float32


def test_silhouettes_equal_reference(reference):
    "0 of 2,900 pictures differ."
    wrong = {}
    for i, name in enumerate(reference['names']):
        if f'{name}_V' not in reference: continue
        masks = render_silhouettes(reference[f'{name}_V']/1e6, reference[f'{name}_F'].astype(np.int64))
        np.testing.assert_array_equal(masks.sum((2, 3)), reference['area'][i], err_msg=name)
        if (n := (crc(masks) != reference['crc32'][i]).sum()): wrong[str(name)] = int(n)
    assert not wrong


def test_full_reference(golden, tmp_path):
    "All 30 meshes from their files, the largest of 260,500 faces; five of them compared pixel by pixel."
    with np.load(golden/'lfd'/'golden.npz') as z: full = {k: z[k] for k in z.files if k == 'names' or k.startswith('sil')}
    for i, name in enumerate(full['names']):
        path = golden/'lfd'/'meshes'/f'{name}.obj'
        if not path.exists():
            (tmp_path/f'{name}.obj').write_bytes(gzip.decompress((golden/'lfd'/'meshes'/f'{name}.obj.gz').read_bytes()))
            path = tmp_path/f'{name}.obj'
        masks = render_silhouettes(*load_mesh(path))
        np.testing.assert_array_equal(crc(masks), full['silhouette_crc32'][i], err_msg=name)
        if f'silbits_{name}' in full: assert (np.packbits(masks.reshape(100, -1), axis=1) == full[f'silbits_{name}']).all()


def every_sample(x, y):
    "The coverage rule as it is written, on every sample of the picture; Python integers, no interval arithmetic."
    x, y = [int(v) for v in x], [int(v) for v in y]
    area = (x[0] - x[2])*(y[1] - y[2]) - (x[1] - x[2])*(y[0] - y[2])
    if area == 0: return np.zeros((256, 256), bool)
    order = (0, 1, 2) if area > 0 else (0, 2, 1)
    X, Y = np.meshgrid(256*np.arange(256), 256*np.arange(256))
    inside = np.ones((256, 256), bool)
    for a, b in zip(order, order[1:] + order[:1]):
        e = (x[b] - x[a])*(Y - y[a]) - (y[b] - y[a])*(X - x[a])
        inside &= (e > 0) | ((e == 0) & ((y[b] < y[a]) | ((y[b] == y[a]) & (x[b] < x[a]))))
    return inside[::-1]


@pytest.mark.parametrize('scale,step', [(256*6, 256), (256*6, 64), (256*40, 1), (256*250, 256), (256*250, 1), (600, 1)])
def test_rule_on_every_sample(scale, step):
    "Large, small and needle-like triangles, on the sample grid (ties at every turn), half off the picture."
    rng = np.random.default_rng(scale + step)
    for _ in range(120):
        corner = rng.integers(-3*256, 250*256, 2)//step*step
        x, y = (corner[:, None] + rng.integers(0, scale, (2, 3))//step*step)
        rows = np.zeros((256, 4), np.uint64)
        _fill(rows, *(np.int64(v) for xy in zip(x, y) for v in xy))
        got = np.unpackbits(rows.astype('<u8').view(np.uint8), axis=-1, bitorder='little').astype(bool)
        np.testing.assert_array_equal(got, every_sample(x, y))


def test_silhouettes_ignore_order_winding_and_doubles(reference):
    V, F = reference['soup_V']/1e6, reference['soup_F'].astype(np.int64)
    masks, rng = render_silhouettes(V, F), np.random.default_rng(1)
    mixed = rng.permuted(np.concatenate([F, F[::3]]), axis=1)
    assert (render_silhouettes(V, rng.permutation(mixed)) == masks).all()
    assert (render_silhouettes(V*2.0**400, F) == masks).all() and (render_silhouettes(V*2.0**-400, F) == masks).all()


def test_unusable_meshes():
    V, F = np.eye(3), np.array([[0, 1, 2]])
    for bad in [(V*np.nan, F), (V, F + 1), (V, F - 1), (V, F[:0]), (V[:, :2], F), (V*0, F)]:
        with pytest.raises(InputError): render_silhouettes(*bad)
    assert not render_silhouettes(np.array([[0, 0, 0], [1, 1, 1], [2, 2, 2.]]), F).any() # a line has no inside


def uv_sphere(n):
    a, b = np.linspace(0, np.pi, n + 1)[:, None], np.linspace(0, 2*np.pi, 2*n, endpoint=False)
    V = np.stack([np.sin(a)*np.sin(b), np.cos(a) + 0*b, np.sin(a)*np.cos(b)], -1).reshape(-1, 3)
    i, j = np.mgrid[:n, :2*n]
    p, q = i*2*n + j, i*2*n + (j + 1) % (2*n)
    return V, np.stack([p, p + 2*n, q, q, p + 2*n, q + 2*n], -1).reshape(-1, 3)


@pytest.mark.parametrize('fov', [0., 30., 90.])
def test_sphere_maps_in_closed_form(fov):
    "Depth, normal and size of a sphere; a sphere exactly fills the circle that `fit='sphere'` reserves."
    maps = render_maps(*uv_sphere(64), size=200, fov=fov, fit='sphere')
    hit, away = maps.face >= 0, 1/np.sin(np.radians(fov/2)) if fov else 2
    assert abs(maps.depth.min() - (away - 1)) < 2e-3
    assert np.isinf(maps.depth[~hit]).all() and (maps.face[~hit] == -1).all()
    np.testing.assert_allclose(np.linalg.norm(maps.normal[hit], axis=-1), 1, atol=1e-6)
    assert (maps.normal[hit]*maps.position[hit]).sum(-1).min() > .99 # outwards, and it is the position
    assert abs(hit.sum()/(np.pi*(100*.94)**2) - 1) < .01


def test_camera_axes():
    "Small tetrahedra at the ends of the axes: where each stands in the picture."
    corner, ends = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])*.06, np.concatenate([np.eye(3), -np.eye(3)])
    V, F = (ends[:, None] + corner).reshape(-1, 3), np.concatenate([np.array([[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]]) + 4*i for i in range(6)])

    def place(end, azimuth, elevation):
        r, c = np.nonzero(render_maps(V, F, azimuth, elevation, 101, fit='sphere').face//4 == end)
        return (round((c.mean() - 50)/43), round((50 - r.mean())/43))
    x, y, z = 0, 1, 2
    assert place(x, 0, 0) == (1, 0) and place(y, 0, 0) == (0, 1) and place(z, 0, 0) == (0, 0) # from the front
    assert place(z, 90, 0) == (-1, 0) and place(y, 90, 0) == (0, 1) and place(x, 90, 0) == (0, 0) # from +x
    assert place(x, 0, 90) == (1, 0) and place(z, 0, 90) == (0, -1) and place(y, 0, 90) == (0, 0) # from above


def test_nearest_triangle_wins():
    "Random triangles: the face map agrees with casting a ray through every pixel centre."
    rng = np.random.default_rng(4)
    V, F = rng.uniform(-1, 1, (90, 3)), np.arange(90).reshape(30, 3)
    maps = render_maps(V, F, 0, 0, 64, fov=0, fit='sphere')
    P = (V - (V.max(0) + V.min(0))/2); P /= np.linalg.norm(P, axis=1).max()
    at = ((np.arange(64) + .5)/32 - 1)/.94
    x, y = np.meshgrid(at, -at)
    best, face = np.full((64, 64), -np.inf), np.full((64, 64), -1)
    for i, (a, b, c) in enumerate(P[F]):
        area = (b[0] - a[0])*(c[1] - a[1]) - (b[1] - a[1])*(c[0] - a[0])
        v, w = ((x - a[0])*(c[1] - a[1]) - (y - a[1])*(c[0] - a[0]))/area, ((b[0] - a[0])*(y - a[1]) - (b[1] - a[1])*(x - a[0]))/area
        z = a[2] + v*(b[2] - a[2]) + w*(c[2] - a[2])
        closer = (v >= 0) & (w >= 0) & (v + w <= 1) & (z > best)
        best, face = np.where(closer, z, best), np.where(closer, i, face)
    same = maps.face == face
    assert same.mean() > .995 # snapping to 1/256 pixel decides a few samples on edges
    np.testing.assert_allclose((2 - maps.depth)[same & (face >= 0)], best[same & (face >= 0)], atol=.02)


def test_shaded_bytes(reference):
    "The same bytes in every run and on every machine; scale plays no part; light comes from the upper left, and less of it reaches a corner."
    V, F = uv_sphere(12)
    V = V.round(6)
    a = render_shaded(V, F, size=64)
    assert a.dtype == np.uint8 and a.shape == (64, 64, 3) and (a[0, 0] == 255).all()
    assert (render_shaded(V*2.0**-30, F, size=64) == a).all()
    assert a[16, 20].sum() > a[48, 44].sum() + 60
    assert zlib.crc32(a.tobytes()) == 959418710
    chair = render_shaded(reference['chair_V']/1e6, reference['chair_F'].astype(np.int64), size=64)
    assert zlib.crc32(chair.tobytes()) == 3775754021


def test_shading_of_user_meshes():
    "Loose triangles, random winding, doubled faces and stray vertices do not change a picture by more than rounding."
    V, F = uv_sphere(16)
    plain, rng = render_shaded(V, F, size=96).astype(int), np.random.default_rng(0)
    flipped = np.where(rng.random(len(F))[:, None] < .5, F, F[:, [0, 2, 1]])
    loose = np.vstack([V[flipped].reshape(-1, 3), [[1e9, 0, 0]]]), np.arange(3*len(F)).reshape(-1, 3)
    for case in [(V, flipped), loose, (V, np.concatenate([F, F[::-1]]))]: assert np.abs(render_shaded(*case, size=96) - plain).max() <= 2


@pytest.mark.parametrize('name,V', [('huge', np.eye(3)*1e150), ('tiny', np.eye(3)*1e-150), ('far', np.eye(3) + 1e6), ('line', np.outer([0, 1, 2.], [1, 1, 1])),
                                    ('needle', np.array([[0, 0, 0], [1e-9, 0, 0], [0, 1, 0]])), ('edge on', np.array([[0, 0, 0], [1, 0, 0], [0, 0, 1.]]))])
def test_awkward_shapes(name, V):
    F = np.array([[0, 1, 2], [2, 1, 0], [0, 0, 1]])
    for fov in (0, 30): assert render_shaded(V, F, elevation=0, size=32, fov=fov).shape == (32, 32, 3)
    assert sprite_sheet(V, F, 3, 16).shape == (48, 16, 3)
    if name in ('huge', 'tiny', 'far'): assert (render_shaded(V, F, size=32) < 255).any()


def test_bad_arguments():
    V, F = np.eye(3), np.array([[0, 1, 2]])
    for bad in [dict(size=0), dict(size=5000), dict(fov=-1), dict(fov=float('nan')), dict(fit='box'), dict(color=(1, 2)), dict(color=np.zeros((2, 3)))]:
        with pytest.raises(InputError): render_shaded(V, F, **bad)
    with pytest.raises(InputError): render_shaded(V*np.nan, F)
    with pytest.raises(InputError): sprite_sheet(V, F, n_views=0)


def test_sprite_tiles():
    "Tile i is the view at azimuth 360 i/n, at one scale."
    V, F = uv_sphere(8)
    V = V*[1, .5, .2]
    sheet = sprite_sheet(V, F, 4, 48).reshape(4, 48, 48, 3)
    for i in range(4): assert (sheet[i] == render_shaded(V, F, 90*i, 20, 48, fit='sphere')).all()
    width = [(t < 255).any((0, 2)).sum() for t in sheet]
    assert width[0] == width[2] > 3*width[1]


def test_real_meshes(real_meshes):
    "All 100: a picture with a shape that fills it, and silhouettes in most views."
    for path in sorted(real_meshes.glob('*.off')):
        V, F = load_mesh(path)
        seen = (render_shaded(V, F, size=64) < 250).any(-1)
        r, c = np.nonzero(seen)
        assert max(np.ptp(r), np.ptp(c)) > 50, path.name
        assert (render_silhouettes(V, F).sum((2, 3)) > 0).all(), path.name
