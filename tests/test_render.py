"""Silhouettes against the reference's, bit by bit, and the rasteriser against its rule tried on every sample.

`data/render_golden.npz` holds, for 30 procedural meshes of ours and the 100 views, CRC-32 and area of the silhouettes which the public
light field extractor draws (off-screen Mesa llvmpipe 22.3.6), and 29 of the meshes: vertices in millionths, fan-triangulated faces."""
import gzip, hashlib, zlib

import numpy as np
import pytest

from memkit.core import InputError
from memkit.mesh import load_mesh
from memkit.render import _fill, lfd_cameras, render_silhouettes, view_rows


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
