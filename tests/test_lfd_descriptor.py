"""The light field descriptor against the reference's bytes, its symmetries, and the cases in which the reference crashes or stays silent."""
import gzip

import numpy as np
import pytest
import trimesh

from memkit.contour import contour_fourier
from memkit.core import InputError, make_rng
from memkit.lfd import describe_views, lfd_descriptor, quantize, read_reference_files, round_coordinates, write_reference_files
from memkit.mesh import load_mesh
from memkit.region import art_coefficients, view_shapes
from memkit.render import render_silhouettes


@pytest.fixture(scope='module')
def meshes(request):
    with np.load(request.config.rootpath/'tests'/'data'/'render_golden.npz') as z:
        return {str(n): (z[f'{n}_V']/1e6, z[f'{n}_F'].astype(np.int64)) for n in z['names'] if f'{n}_V' in z}


@pytest.fixture(scope='module')
def descriptors(request):
    with np.load(request.config.rootpath/'tests'/'data'/'lfd_distance.npz') as z: return dict(zip(map(str, z['names']), z['descriptors']))


def views(mesh): return render_silhouettes(*mesh)


def box(*size):
    m = trimesh.creation.box(size)
    return np.array(m.vertices), np.array(m.faces)


def test_reference_bytes(meshes, descriptors):
    "29 procedural meshes of ours; 0 of 136,300 bytes differ."
    wrong = {name: int((lfd_descriptor(*mesh) != descriptors[name]).sum()) for name, mesh in meshes.items()}
    assert len(wrong) == 29 and not any(wrong.values()), {k: v for k, v in wrong.items() if v}


def test_full_reference(golden, tmp_path):
    "All 30 from their files: 0 of 141,000 bytes differ, and the coefficients before truncation agree with those of an instrumented build."
    with np.load(golden/'lfd'/'golden.npz') as z: g = {k: z[k] for k in z.files if not k.startswith('silbits')}
    want = np.concatenate([g['art'], g['fd'], g['cir'][..., None], g['ecc'][..., None]], -1)
    wrong, far = 0, 0.
    for i, name in enumerate(g['names']):
        path = golden/'lfd'/'meshes'/f'{name}.obj'
        if not path.exists():
            (tmp_path/f'{name}.obj').write_bytes(gzip.decompress((golden/'lfd'/'meshes'/f'{name}.obj.gz').read_bytes()))
            path = tmp_path/f'{name}.obj'
        masks = render_silhouettes(*load_mesh(path))
        got, n_empty = describe_views(masks)
        wrong += (got != want[i]).sum()
        assert n_empty == (g['silhouette_area'][i] == 0).sum()
        masks = masks.reshape(100, 256, 256)
        shapes, radius = view_shapes(masks), np.repeat(g['radius'][i], 10)
        assert (shapes.centre == g['centre_xy'][i].reshape(100, 2)).all()
        assert np.abs(shapes.reach.reshape(10, 10).max(1) - g['radius'][i]).max() < 1e-9
        fd = np.array([contour_fourier(m, c) for m, c in zip(masks, shapes.centre)])
        for ours, theirs in [(art_coefficients(masks, shapes, radius), g['raw_art'][i, ..., 1:]), (fd, g['raw_fd'][i]),
                             (shapes.circularity, g['raw_cir'][i]), (shapes.eccentricity, g['raw_ecc'][i])]:
            far = max(far, np.abs(ours - theirs.reshape(ours.shape))[shapes.area > 0].max())
    assert wrong == 0 and far < 1e-6


def test_art_by_interpolation_of_each_pixel():
    "The adjoint form against the rule as written: four table entries for every covered pixel."
    rng = make_rng(0, 'art')
    p, r = np.array([(p, r) for p in range(12) for r in range(3)][1:]).T
    b, a = np.mgrid[:102, :102] - 50
    rho = np.hypot(a, b)[..., None]
    table = np.where((rho < 50) & (a < 51)[..., None] & (b < 51)[..., None], np.cos(rho*3.141592653*r/50)*np.exp(1j*p*np.arctan2(b, a)[..., None]), 0)
    for share in (.5, .02):
        masks = rng.random((3, 40, 64)) < share
        shapes = view_shapes(masks)
        got = art_coefficients(masks, shapes)
        for mask, (cx, cy), c in zip(masks, shapes.centre, got):
            y, x = np.nonzero(mask)
            u, v = (np.clip((t - m)*50/shapes.reach.max() + 50, 0, 100) for t, m in ((x, cx), (y, cy)))
            i, j = u.astype(int), v.astype(int)
            f, g = (u - i)[:, None], (v - j)[:, None]
            value = table[j, i]*(1-f)*(1-g) + table[j, i+1]*f*(1-g) + table[j+1, i]*(1-f)*g + table[j+1, i+1]*f*g
            np.testing.assert_allclose(c, np.abs(value.mean(0)), atol=1e-13)


def test_art_of_a_few_pixels():
    "The farthest pixel lies on the rim of the table, where all waves are 0; the one in the middle has 1."
    for n, c in [(1, 1), (2, 0), (3, 1/3)]:
        line = np.zeros((2, 9, 9), bool); line[0, 4, 3:3 + n] = True
        np.testing.assert_allclose(art_coefficients(line, view_shapes(line)), [[c]*35, [0]*35], atol=1e-13)
        assert view_shapes(line).eccentricity.tolist() == [n > 1, 0]


def test_geometry_by_the_formulas():
    masks = make_rng(1, 'geometry').random((4, 30, 50)) < np.array([.9, .5, .05, 0])[:, None, None]
    masks[0, 0, 0] = masks[0, -1, -1] = True                          # up to the border: outside is not uncovered
    shapes = view_shapes(masks)
    for k, mask in enumerate(masks[:3]):
        y, x = np.nonzero(mask)
        X, Y = x - (x.min() + x.max())/2, y - (y.min() + y.max())/2
        around = np.lib.stride_tricks.sliding_window_view(np.pad(mask, 1, constant_values=True), (3, 3)).all((2, 3))
        rim = (mask & ~around).sum()
        assert shapes.rim[k] == rim and shapes.area[k] == mask.sum() and shapes.reach[k] == np.sqrt((X*X + Y*Y).max())
        assert shapes.circularity[k] == min(1, 12.5663704*mask.sum()/rim**2)
        np.testing.assert_allclose(shapes.moments[k], [(X*X).sum(), (Y*Y).sum(), (X*Y).sum()], rtol=0)
        xx, yy, xy = shapes.moments[k]
        assert shapes.eccentricity[k] == min(1, ((xx - yy)**2 + 4*xy**2)/(xx + yy)**2)
    assert shapes.circularity[3] == shapes.eccentricity[3] == 0 and (shapes.centre[3] == -1).all()


def test_mirrored_views(meshes):
    """A silhouette from the opposite corner is the mirror image: circularity, eccentricity and the region's even orders are the same, the contour up to where the walk starts.

    Odd orders differ by the middle node of the reference's table, where the angle is taken as 0."""
    even = np.array([p % 2 == 0 for p in range(12) for r in range(3)][1:] + [False]*12)
    for name in ('hedgehog', 'soup', 'mug'):
        masks = views(meshes[name])
        a, b = describe_views(masks)[0].astype(int), describe_views(masks[..., ::-1])[0].astype(int)
        assert (a[..., even] == b[..., even]).all() and np.abs(a - b)[..., :35].max() <= 1 and (a[..., 45:] == b[..., 45:]).all()
        assert np.median(np.abs(a - b)[..., 35:45]) <= 1


def test_size_and_place_do_not_matter(meshes):
    "Powers of two are exact; anything else rounds a vertex by 1e-16 and, rarely, one snapped coordinate by 1/256 pixel."
    for name in ('chair', 'soup'):
        V, F = meshes[name]
        d = lfd_descriptor(V, F)
        assert (lfd_descriptor(V*2.**20, F) == d).all() and (lfd_descriptor(V, F[::-1, ::-1]) == d).all()
        other = lfd_descriptor(V*57.3 + [1000, -350, 4200], F).astype(int)
        assert (other != d).mean() < .02 and np.abs(other - d).mean() < .05


def test_unused_and_repeated_vertices(meshes):
    V, F = meshes['torus']
    d = lfd_descriptor(V, F)
    assert (lfd_descriptor(np.vstack([V, [[50, 50, 50]]]), F) == d).all()
    assert (lfd_descriptor(V[F].reshape(-1, 3), np.arange(3*len(F)).reshape(-1, 3)) == d).all()
    assert (lfd_descriptor(V, np.vstack([F, F[:7], [[3, 3, 5]]])) == d).all()


def test_sphere_looks_the_same_from_everywhere():
    m = trimesh.creation.icosphere(5)
    d = lfd_descriptor(np.array(m.vertices), np.array(m.faces)).reshape(100, 47).astype(int)
    assert np.ptp(d, axis=0).max() <= 4
    assert abs(d[:, 45] - 256*np.pi**2/16).max() <= 4 and d[:, 46].max() == 0 and d[:, 35:45].max() <= 2


def test_nothing_rendered():
    with pytest.raises(InputError, match=r'bar\.obj: nothing is visible in any of the 100 views'): lfd_descriptor(*box(.003, 1, .003), name='bar.obj')
    d, n = lfd_descriptor(*box(.003, 1, .003), allow_empty=True, return_empty=True)
    assert n == 100 and not d.any() and d.dtype == np.uint8
    assert lfd_descriptor(*box(.03, 1, .03), return_empty=True)[1] == 0


def test_flat_shapes_count_their_empty_views(meshes, descriptors):
    d, n = lfd_descriptor(*meshes['flat_disk_y'], return_empty=True)
    assert n == 2 and (d.any(-1) == 0).sum() == 2 and (d == descriptors['flat_disk_y']).all()


def test_a_set_without_radius():
    "Specks of at most one pixel in every view, made by a far degenerate face: the reference crashes."
    V = np.array([[0, 0, 0], [.004, 0, .004], [0, .004, .004], [-.5, -.5, -.5], [.5, .5, .5], [0, 0, 0]])
    d, n = lfd_descriptor(V, np.array([[0, 1, 2], [3, 4, 5]]), return_empty=True)
    masks = render_silhouettes(V, np.array([[0, 1, 2], [3, 4, 5]]))
    assert masks.sum((2, 3)).max() == 1 and 0 < n < 100 and n == 100 - masks.sum()
    assert (d[masks.any((2, 3))] == [255]*35 + [0]*10 + [255, 0]).all() and (d[~masks.any((2, 3))] == 0).all()


@pytest.mark.parametrize('V, F, why', [
    (np.zeros((0, 3)), np.zeros((0, 3), int), 'vert'), (np.eye(3), np.zeros((0, 3), int), 'face'), (np.eye(3), [[0, 1, 3]], 'vertex 3'),
    (np.eye(3), [[0, 1, -1]], 'vertex -1'), (np.eye(3)*np.nan, [[0, 1, 2]], 'finite'), (np.ones((3, 3)), [[0, 1, 2]], 'extent'),
])
def test_damaged_meshes_are_named(V, F, why):
    with pytest.raises(InputError, match=f'x/y.obj: .*{why}'): lfd_descriptor(V, F, name='x/y.obj')


def test_rounding_is_what_printing_does():
    rng = make_rng(0, 'rounding')
    V = np.concatenate([rng.normal(size=3000)*10.**rng.integers(-9, 9, 3000), rng.integers(0, 10**6, 3000)/1e3 + 5e-9, rng.integers(-99, 99, 300)/2.**9, [0, -1e300, 1e16]])
    for decimals in (8, 3):
        assert (round_coordinates(V, decimals) == [float(f'{v:.{decimals}f}') for v in V]).all()
    V, F = box(1, .74, .4)
    assert (lfd_descriptor(V, F, round_decimals=8) == lfd_descriptor(V, F)).all()
    assert (lfd_descriptor(V*1e-7, F, round_decimals=8) == lfd_descriptor(np.rint(V*10), F)).all()      # small meshes are damaged
    assert (lfd_descriptor(V*1e-7, F, round_decimals=8) != lfd_descriptor(V, F)).any()


def test_quantize():
    c = np.array([0, 1/256, np.nextafter(1/256, 0), 255/256, 1, 9, np.inf, np.nan])
    assert quantize(c).tolist() == [0, 1, 0, 255, 255, 255, 255, 0]


def test_reference_files(tmp_path, descriptors):
    d = descriptors['hedgehog']
    write_reference_files(tmp_path, 'sub/hedgehog', d)
    stem = str(tmp_path/'sub'/'hedgehog_q8_v1.8.')
    art, fd, cir, ecc = (np.fromfile(stem + kind, np.uint8) for kind in ('art', 'fd', 'cir', 'ecc'))
    assert art[(3*10 + 7)*35 + 11] == d[3, 7, 11] and fd[(9*10 + 1)*10 + 4] == d[9, 1, 39] and cir[42] == d[4, 2, 45] and ecc[99] == d[9, 9, 46]
    assert (read_reference_files(tmp_path, 'sub/hedgehog') == d).all()
    for kind, n in [('art', 3500), ('fd', 1000), ('cir', 100), ('ecc', 100)]:
        path = tmp_path/'sub'/f'hedgehog_q8_v1.8.{kind}'
        whole = path.read_bytes()
        for other in (whole[:-1], whole + b'\0', b''):
            path.write_bytes(other)
            with pytest.raises(InputError, match=rf'hedgehog_q8_v1.8.{kind}: {len(other)} bytes; expected {n}'): read_reference_files(tmp_path, 'sub/hedgehog')
        path.unlink()
        with pytest.raises(InputError, match=f'{kind}: no such file'): read_reference_files(tmp_path, 'sub/hedgehog')
        path.write_bytes(whole)
    for bad in (d.astype(int), d[:9], d[..., :46]):
        with pytest.raises(InputError, match='no light field descriptor'): write_reference_files(tmp_path, 'x', bad)
    with pytest.raises(InputError, match='leaves it'): write_reference_files(tmp_path/'sub', '../../x', d)
    with pytest.raises(InputError, match='leaves it'): read_reference_files(tmp_path/'sub', '../../x')
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == []


def test_any_memory_order(meshes):
    masks = views(meshes['rings'])
    assert (describe_views(np.asfortranarray(masks))[0] == describe_views(masks)[0]).all()
    assert (describe_views(masks[:2, :3].astype(np.uint8))[0].shape) == (2, 3, 47)
