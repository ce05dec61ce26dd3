"""Meshes become training data: right distances, nothing lost when killed, nothing written where it must not be."""
import io, json, os, signal, struct, subprocess, sys, time, zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

import memkit.prepare
from memkit.core import InputError
from memkit.mesh import find_meshes, load_mesh, mesh_health, save_mesh
from memkit.prepare import Recipe, file_stem, prepare, prepared_shapes
from memkit.sampling import NEAR, mesh_samples, read_samples, shape_samples, write_samples
from memkit.shapes import CATEGORIES, sample_shape
from memkit.solids import box

TINY = Recipe(n_vol=300, n_near=300, n_surface=200, views=2, size=32)
FEW = dict(n_vol=2000, n_near=2000, n_surface=1000)


def ray_parity(V, F, points, direction):
    "Is the number of faces that a ray from each point meets odd?"
    A, B, C = V[F[:, 0]], V[F[:, 1]], V[F[:, 2]]
    e, g = B - A, C - A
    h = np.cross(direction, g)
    det = (e*h).sum(1)
    real = np.abs(det) > 1e-14
    A, e, g, h, det = (x[real] for x in (A, e, g, h, det))
    hits = []
    for part in np.array_split(points, len(points)//32 + 1):
        s = part[:, None] - A
        q = np.cross(s, e)
        u, v, t = (s*h).sum(2)/det, (q@direction)/det, (q*g).sum(2)/det
        hits.append(((u > 0) & (v > 0) & (u + v < 1) & (t > 0)).sum(1))
    return np.concatenate(hits) % 2 == 1


def parts(V, F):
    "The faces of each connected part, corners in one place being one."
    place = np.unique(V, axis=0, return_inverse=True)[1].reshape(-1)[F]
    links = coo_matrix((np.ones(2*len(F)), (place[:, [0, 0]].ravel(), place[:, [1, 2]].ravel())), shape=(place.max() + 1,)*2)
    label = connected_components(links, directed=False)[1][place[:, 0]]
    return [F[label == k] for k in np.unique(label)]


def cuboid(w=1., h=1., d=1.):
    V = np.array([[x, y, z] for x in (-w/2, w/2) for y in (-h/2, h/2) for z in (-d/2, d/2)])
    return V, np.array([[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1], [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]])


@pytest.fixture
def meshes(tmp_path):
    "Six cuboids."
    for k in range(6): save_mesh(tmp_path/f'meshes/cuboid{k}.off', *cuboid(1, 1 + k, 2))
    return tmp_path/'meshes'


# ---- the samples

@pytest.mark.parametrize('variant', ['sphere', 'box'])
def test_cuboid_has_the_distances_of_its_closed_form(variant):
    V, F = cuboid(1, 2, 3)
    a = mesh_samples(40*V + [3e6, 0, -5], F, seed=1, variant=variant, **FEW)
    assert np.allclose(a['shifts'], [3e6, 0, -5]) and a['scale'] == pytest.approx((14**.5/2)**-1/40 if variant == 'sphere' else .99/60)
    s = 40*a['scale']
    exact = box(s, 2*s, 3*s)
    for kind in ('vol', 'near'): assert np.abs(exact(a[f'{kind}_points'].astype(float)) - a[f'{kind}_sdf']).max() < 2e-6
    assert np.abs(exact(a['surface_points'].astype(float))).max() < 2e-6
    assert {k: (v.shape, v.dtype.str) for k, v in a.items()} == dict(shifts=((3,), '<f8'), scale=((), '<f8'), vol_points=((2000, 3), '<f4'), vol_sdf=((2000,), '<f4'),
        near_points=((2000, 3), '<f4'), near_sdf=((2000,), '<f4'), surface_points=((1000, 3), '<f4'))
    reach = np.abs(a['vol_points']).max() if variant == 'box' else np.linalg.norm(a['vol_points'], axis=1).max()/3**.5
    assert .95 < reach <= 1.000001
    # near points: |distance| of Gaussian offsets from a flat face is half-normal
    assert [np.sqrt((a['near_sdf'][part]**2).mean()) for part in (slice(0, 1000), slice(1000, None))] == pytest.approx(NEAR, rel=.12)


@pytest.mark.parametrize('category', CATEGORIES[::3])
def test_built_in_shapes_keep_their_own_field(category):
    shape = sample_shape(category, 4)
    a = shape_samples(shape, 7, resolution=64, **FEW)
    back = lambda p: p/a['scale'] + a['shifts']
    for kind in ('vol', 'near'): assert np.abs(shape.sdf(back(a[f'{kind}_points'].astype(float)))*a['scale'] - a[f'{kind}_sdf']).max() < 1e-6
    off = np.abs(shape.sdf(back(a['surface_points'].astype(float))))
    assert np.quantile(off, .99) < 1e-3 and np.median(off) < 1e-5
    assert .9 < np.linalg.norm(a['surface_points'], axis=1).max() < 1.03
    b = shape_samples(shape, 7, resolution=64, **FEW)
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert not np.array_equal(a['vol_points'], shape_samples(shape, 8, resolution=64, **FEW)['vol_points'])


def test_mesh_and_closed_form_agree():
    "A shape that is exact inside and out, against its own fine mesh."
    shape = sample_shape('mug', 2)
    V, F = shape.mesh(128)
    a = mesh_samples(V, F, **FEW)
    exact = shape.sdf(a['near_points'].astype(float)/a['scale'] + a['shifts'])*a['scale']
    clear = np.abs(exact) > .01
    assert ((exact < 0) == (a['near_sdf'] < 0))[clear].all() and np.abs(a['near_sdf'][exact > 0] - exact[exact > 0]).max() < .02


def test_signs_of_closed_real_meshes(real_meshes):
    "Against ray parity of each part: at most one sign in a thousand is wrong, of every mesh that is closed."
    wrong, asked = {}, 0
    for name, path in find_meshes(real_meshes).items():
        V, F = load_mesh(path)
        if not mesh_health(V, F).watertight: continue
        a = mesh_samples(V, F, n_vol=240, n_near=260, n_surface=200)
        points, sdf = np.concatenate([a['vol_points'], a['near_points']]).astype(float), np.concatenate([a['vol_sdf'], a['near_sdf']])
        inside = np.zeros(len(points), bool)
        for part in parts(V, F): inside |= ray_parity((V - a['shifts'])*a['scale'], part, points, np.array([.36, .48, .8]))
        wrong[name], asked = int((inside != (sdf < 0)).sum()), asked + len(points)
    assert len(wrong) == 20 and max(wrong.values()) <= 1 and sum(wrong.values()) <= asked/2000, wrong


# ---- killed, crashed, hung

RUN = 'import sys; from memkit.prepare import *; prepare(sys.argv[1], sys.argv[2], Recipe(n_vol=300, n_near=300, n_surface=200, views=2, size=32), n_jobs=1); assert not {"torch", "igl"} & set(sys.modules)'


def content(out):
    "What a run leaves, without times."
    records = json.loads((out/'manifest.json').read_text())['shapes']
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob('*.*')) if p.suffix in ('.npz', '.png') or 'tmp' in p.name}, \
        [{k: v for k, v in r.items() if 'seconds' not in k} for r in records]


def test_killed_runs_go_on_and_end_the_same(meshes, tmp_path):
    prepare(meshes, tmp_path/'whole', TINY, n_jobs=2)
    out, command = tmp_path/'killed', [sys.executable, '-c', RUN, str(meshes), str(tmp_path/'killed')]
    for at_least in (1, 3):
        child = subprocess.Popen(command)
        while child.poll() is None and len(list(out.glob('samples/c*.npz'))) < at_least: time.sleep(.005)
        child.send_signal(signal.SIGKILL); child.wait()
        assert not (out/'manifest.json').exists(), 'it was to be killed before the end'
        with pytest.raises(InputError, match='not been finished'): prepared_shapes(out)
    kept = {p.name: p.stat().st_mtime_ns for p in out.glob('samples/cuboid0.npz')}
    (out/'samples/.cuboid5-x.tmp.npz').write_bytes(b'half a file')
    subprocess.run(command, check=True)
    assert content(out) == content(tmp_path/'whole')
    assert kept == {p.name: p.stat().st_mtime_ns for p in out.glob('samples/cuboid0.npz')} and len(kept) == 1
    with pytest.raises(InputError, match='n_vol is 300 there and 301 now'): prepare(meshes, out, Recipe(n_vol=301, n_near=300, n_surface=200, views=2, size=32))


def troubled(recipe, out, job):
    if job[0] == 'cuboid1': os.kill(os.getpid(), signal.SIGKILL)
    if job[0] == 'cuboid2': time.sleep(60)
    return memkit.prepare._prepare_one(recipe, out, job)


def test_a_crash_and_a_hang_cost_one_shape_each(meshes, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(memkit.prepare, 'partial', lambda _, *a: partial(troubled, *a))
        made = prepare(meshes, tmp_path/'out', TINY, n_jobs=2, time_limit=4)
    assert made.ids == ['cuboid0', 'cuboid3', 'cuboid4', 'cuboid5']
    assert 'SIGKILL' in made.failures['cuboid1'] and 'no result within 4 s' in made.failures['cuboid2']
    assert prepare(meshes, tmp_path/'out', TINY, n_jobs=1).failures == made.failures        # remembered, not tried again …
    assert len(prepare(meshes, tmp_path/'out', TINY, n_jobs=1, retry=True)) == 6            # … unless asked


def test_what_cannot_be_written_is_no_fault_of_the_mesh(meshes, tmp_path, monkeypatch):
    out = tmp_path/'out'
    out.mkdir(); (out/'samples').write_text('in the way')
    with pytest.raises(OSError, match='could not be written'): prepare(meshes, out, TINY, n_jobs=1)
    (out/'samples').unlink()
    with pytest.raises(InputError, match='cannot be a folder'): prepare(meshes, meshes/'cuboid0.off', TINY, n_jobs=1)
    with monkeypatch.context() as m:
        m.setattr(memkit.prepare, 'find_spec', lambda _: None)
        with pytest.raises(InputError, match='pip install "memkit'): prepare(meshes, out, TINY, n_jobs=1)
        assert not prepare([sample_shape('mug', 1)], out.parent/'shapes', TINY, n_jobs=1).failures
    with monkeypatch.context() as m:
        m.setattr(memkit.prepare.shutil, 'disk_usage', lambda _: type('', (), dict(free=1000)))
        with pytest.raises(InputError, match='0.0 GB are free'): prepare(meshes, out, TINY, n_jobs=1)
    assert len(prepare({'a': meshes/'cuboid0.off'}, out, TINY, n_jobs=1)) == 1


# ---- sources and files that are not to be trusted

def test_hostile_names_stay_inside(meshes, tmp_path):
    source = {name: meshes/'cuboid0.off' for name in ('../../x', '/etc/x', '=HYPERLINK("x")', '+1', 'a'*5000, 'con', '..', 'ü ☃\n', 'a/b', 'a_b', 'x\0y', 'c.npz', 'C:\\x')}
    made = prepare(source, tmp_path/'out', TINY, n_jobs=1)
    assert set(made.ids) == set(source)
    files = {made.path(k, kind).resolve() for k in made.ids for kind in ('samples', 'sprite')}
    assert len(files) == 2*len(source) and all((tmp_path/'out').resolve() in f.parents for f in files)
    assert {p.name for p in tmp_path.iterdir()} == {'meshes', 'out', 'memkit-home'} & {p.name for p in tmp_path.iterdir()}
    assert not [line for line in (tmp_path/'out/manifest.csv').read_text().splitlines() if line[:1] in '=+-@' and line]
    assert made.load('../../x')['scale'] == made.load('a/b')['scale']
    with pytest.raises(InputError, match='12 shapes that are not in the source'): prepare({'a/b': meshes/'cuboid0.off'}, tmp_path/'out', TINY, n_jobs=1)
    assert prepare({'a/b': meshes/'cuboid0.off'}, tmp_path/'out', TINY, n_jobs=1, prune=True).ids == ['a/b']
    assert len(list((tmp_path/'out/samples').iterdir())) == 1


def test_file_stems_differ_when_ids_do():
    ids = ['a/b', 'a_b', 'a b', 'A', file_stem('a/b'), file_stem(file_stem('a/b')), '', '.', 'x'*101, 'x'*102, 'aux.obj', '\udcff', 'ÿ']
    assert len({file_stem(i) for i in ids}) == len(ids)


def zipped(**members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, data in members.items(): z.writestr(f'{name}.npy', data)
    return out.getvalue()


def npy(array, shape=None):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, dict(descr=array.dtype.str, fortran_order=False, shape=array.shape if shape is None else shape))
    return out.getvalue() + array.tobytes()


def test_hostile_samples_are_refused(tmp_path):
    a = mesh_samples(*cuboid(), n_vol=50, n_near=50, n_surface=50)
    sound = {k: npy(v) for k, v in a.items()}
    path = tmp_path/'x.npz'
    def refused(match, data, **kwargs):
        path.write_bytes(data)
        with pytest.raises(InputError, match=match): read_samples(path, **kwargs)
    path.write_bytes(zipped(**sound))
    assert all(np.array_equal(v, a[k]) for k, v in read_samples(path, dict(vol=50, near=50, surface=50)).items())
    refused('unpacks to 2.1 GB', bomb(sound))
    refused(r'holds float32 \(1000000000000,\)', zipped(**sound | dict(vol_sdf=npy(a['vol_sdf'], (10**12,)))))           # an array of four terabytes
    refused('holds float32', zipped(**sound | dict(vol_sdf=sound['vol_sdf'][:-4])))
    refused('expected samples of one shape', zipped(**{k: v for k, v in sound.items() if k != 'scale'}))
    refused('expected samples of one shape', zipped(**sound, **{'../../evil': b'x'}))
    refused('vol_points has shape', zipped(**sound | dict(vol_points=npy(a['vol_points'].T.copy()))))
    refused('NaN or infinity', zipped(**sound | dict(near_sdf=npy(a['near_sdf']*np.nan))))
    refused('holds object', zipped(**sound | dict(scale=npy(np.zeros((), '<f8')).replace(b"'<f8'", b"'|O' "))))
    refused('expected samples', zipped(**sound)[:300])
    refused('expected samples', b'')
    refused('vol_points has shape', zipped(**sound), counts=dict(vol=51, near=50, surface=50))


def bomb(sound):
    "A member whose directory entry claims two gigabytes: refused before a byte of it is unpacked."
    raw, name = bytearray(zipped(**sound)), b'vol_points.npy'
    for signature, place in ((b'PK\x01\x02', 24), (b'PK\x03\x04', 22)):
        at = -1
        while (at := raw.find(signature, at + 1)) >= 0:
            if raw[at + (46 if place == 24 else 30):][:len(name)] == name: struct.pack_into('<I', raw, at + place, 2_100_000_000)
    return bytes(raw)


def test_a_manifest_cannot_point_outside_and_damage_is_seen(meshes, tmp_path):
    made = prepare(meshes, tmp_path/'out', TINY, n_jobs=1)
    manifest = tmp_path/'out/manifest.json'
    text = manifest.read_text()
    for wrong in (text.replace('samples/cuboid0.npz', '../meshes/cuboid0.off'), text.replace('samples/cuboid0.npz', '/etc/passwd'), text[:500], '[]', text.replace('prepared 1', 'prepared 9')):
        manifest.write_text(wrong)
        with pytest.raises(InputError, match='manifest.json'): prepared_shapes(tmp_path/'out')
    manifest.write_text(text)
    write_samples(made.path('cuboid3'), made.load('cuboid4'))
    with pytest.raises(InputError, match='not what was written'): prepared_shapes(tmp_path/'out').load('cuboid3')
    made.path('cuboid3').unlink()
    with pytest.raises(InputError, match='is missing'): prepared_shapes(tmp_path/'out').load('cuboid3')
    assert prepare(meshes, tmp_path/'out', TINY, n_jobs=1).load('cuboid3')['scale'] == made.load('cuboid3')['scale']
