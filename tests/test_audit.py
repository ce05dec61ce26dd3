"""The audit on real meshes: planted copies are found, fresh shapes are not accused."""
import csv, json, re, shutil

import numpy as np
import pytest

from memkit.audit import audit
from memkit.core import InputError, make_rng
from memkit.mesh import load_mesh, save_mesh
from memkit.shapes import replicate, shape_set


def rotation(axis, degrees):
    axis, t = np.asarray(axis, float)/np.linalg.norm(axis), np.deg2rad(degrees)
    K = np.cross(np.eye(3), axis)
    return np.eye(3) - np.sin(t)*K + (1 - np.cos(t))*K @ K


def random_rotation(rng):
    q = rng.normal(size=4); w, x, y, z = q/np.linalg.norm(q)
    return np.array([[1 - 2*(y*y + z*z), 2*(x*y - w*z), 2*(x*z + w*y)], [2*(x*y + w*z), 1 - 2*(x*x + z*z), 2*(y*z - w*x)], [2*(x*z - w*y), 2*(y*z + w*x), 1 - 2*(x*x + y*y)]])


@pytest.fixture(scope='module')
def real_audit(real_meshes, tmp_path_factory):
    "One run over the 20 classes: files 0-2 train, 3 test, 4 gen, and copies of the files 0, turned three ways."
    root = tmp_path_factory.mktemp('audit')
    for name in ('train', 'test', 'fresh', 'turned30', 'turned', 'noisy'): (root/name).mkdir()
    for p in sorted(real_meshes.glob('*.off')): shutil.copy(p, root/{'3': 'test', '4': 'fresh'}.get(p.stem[-1], 'train')/p.name)
    for p in sorted(real_meshes.glob('*0.off')):
        V, F = load_mesh(p); rng = make_rng(0, p.stem)
        turned = V @ random_rotation(rng).T
        size = np.ptp(turned[F.ravel()], axis=0).max()
        for name, W in (('turned30', V @ rotation([0, 1, 0], 30).T), ('turned', turned), ('noisy', turned + rng.normal(size=V.shape)*.005*size)):
            save_mesh(root/name/f'{p.stem}.off', W, F)
    report = audit(gen={n: root/n for n in ('fresh', 'turned30', 'turned', 'noisy')}, train=root/'train', test=root/'test', out=root/'out')
    return root, report


def sources_found(report, name): return sum(r['id'] == r['neighbour'] for r in report[name].rows)


def test_fresh_shapes_are_not_accused(real_audit):
    j = real_audit[1]['fresh']
    assert j.verdict != 'copying' and j.zu.auc_ci[0] < .5


def test_copies_turned_by_30_degrees_are_copying(real_audit):
    j = real_audit[1]['turned30']
    assert j.verdict == 'copying' and j.zu.auc >= .88 and j.zu.z_u < 0
    assert sources_found(real_audit[1], 'turned30') == 20


def test_sources_of_arbitrarily_turned_copies_are_found(real_audit):
    assert sources_found(real_audit[1], 'turned') >= 19
    assert sources_found(real_audit[1], 'noisy') >= 17
    assert real_audit[1]['turned'].zu.auc == pytest.approx(.67, abs=.005), 'the page quotes this figure'


def test_the_record_is_complete(real_audit):
    root, report = real_audit
    record = json.loads((root/'out'/'report.json').read_text())
    assert {g['name'] for g in record['generators']} == {'fresh', 'turned30', 'turned', 'noisy'}
    for g in record['generators']:
        assert {'z_u', 'auc', 'auc_ci', 'm', 'n', 'min_detectable_auc', 'fd', 'verdict', 'verdict_text'} <= set(g)
        assert (g['m'], g['n']) == (20, 20) and g['fd_label'].startswith('FD[lfd94')
    assert record['n_train'] == 60 and 'lower bound' in record['protocol']['rotation']
    with open(root/'out'/'neighbours.csv', newline='') as f: rows = list(csv.DictReader(f))
    assert len(rows) == 20*5


def test_the_page_is_one_file(real_audit):
    page = (real_audit[0]/'out'/'report.html').read_text()
    assert not re.findall(r'(?:src|href)\s*=\s*["\']?(?!data:|#)[^"\'\s>]+', page), 'something is fetched'
    assert 'Closer' in page or 'closest pairs' in page
    assert str(real_audit[0]) not in page


HOSTILE = '<img src=x onerror=alert(1)>.obj'


def write_set(folder, n, seed):
    for s in shape_set(n, seed=seed): save_mesh(folder/f'{s.category}.obj', *s.mesh(32))
    return folder


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    "Folders with every fault at once: a hostile name, an unreadable mesh, two held-out shapes that are training shapes; and groups."
    root = tmp_path_factory.mktemp('toys')
    for name, n, seed in (('model', 6, 2), ('train', 8, 0), ('test', 6, 1)): write_set(root/name, n, seed)
    next((root/'model').iterdir()).rename(root/'model'/HOSTILE)
    (root/'model'/'broken.obj').write_text('v 0 0 zero\n')
    for p in list((root/'train').iterdir())[:2]: shutil.copy(p, root/'test'/f'leak_{p.name}')
    names = sorted({p.stem for d in ('model', 'test') for p in (root/d).iterdir()})
    (root/'groups.csv').write_text('id,group\n' + '\n'.join(f'{n},{"even" if i % 2 else "odd"}' for i, n in enumerate(names)))
    return dict(gen=root/'model', train=root/'train', test=root/'test', out=root/'out', groups=root/'groups.csv', n_jobs=1)


@pytest.fixture(scope='module')
def toy_audit(toys): return audit(**toys)


def test_a_second_run_describes_nothing_and_agrees(toys, toy_audit, monkeypatch):
    stamps = {p: p.stat().st_mtime_ns for p in (toys['out']/'descriptors').rglob('*.npy')}
    monkeypatch.setattr('memkit.database.map_isolated', lambda f, items, *rest: iter(()) if not items else pytest.fail('described again'))
    assert audit(**toys)['model'].zu.to_dict() == toy_audit['model'].zu.to_dict()
    assert stamps and stamps == {p: p.stat().st_mtime_ns for p in (toys['out']/'descriptors').rglob('*.npy')}


def test_one_generator_stands_at_the_top_of_the_record(toy_audit):
    record = json.loads((toy_audit.out/'report.json').read_text())
    assert record['verdict'] in ('copying', 'no evidence', 'underpowered')
    assert record['z_u'] == record['generators'][0]['z_u']


def test_held_out_shapes_that_are_training_shapes_are_reported(toy_audit):
    assert [r['d1'] for r in toy_audit.leaks] == [0, 0]
    assert '2 of 8 held-out shapes are nearly training shapes' in (toy_audit.out/'report.html').read_text()


def test_a_hostile_name_is_escaped(toy_audit):
    page = (toy_audit.out/'report.html').read_text()
    assert '<img src=x' not in page and '&lt;img src=x' in page


def test_an_unreadable_mesh_is_listed_and_counted_out(toys, toy_audit):
    assert toy_audit['model'].zu.to_dict()['m'] == 6 and list(toy_audit['model'].shapes.failures) == ['broken']
    page = (toy_audit.out/'report.html').read_text()
    assert 'zero' in page and str(toys['gen']) not in page


def test_groups_make_a_table(toy_audit):
    assert {c['cell'] for c in toy_audit['model'].cells} == {'even', 'odd'}


def test_copies_of_training_shapes_are_copying_whatever_their_names(toys, tmp_path):
    shutil.copytree(toys['train'], tmp_path/'copies')
    for p in (tmp_path/'copies').iterdir(): p.rename(p.with_name(f'x{p.name}'))
    report = audit(**{**toys, 'gen': tmp_path/'copies', 'test': toys['gen'], 'groups': None})
    assert report['copies'].verdict == 'copying'
    assert all(r['d1'] == 0 for r in report['copies'].rows)


def test_missing_folder_is_one_clear_error(toys, tmp_path):
    with pytest.raises(InputError, match='nowhere'): audit(**{**toys, 'train': tmp_path/'nowhere', 'out': tmp_path/'out'})
    assert not (tmp_path/'out'/'report.html').exists()


def test_arbitrarily_turned_copies_are_seen_by_the_pose_refined_distance_and_warned_of_with_chamfer(toys, tmp_path):
    for i, s in enumerate(shape_set(8, seed=0)): save_mesh(tmp_path/'turned'/f'{s.category}.obj', *replicate(*s.mesh(32), 'rotation', 'uniform', seed=i))
    sets = {**toys, 'gen': tmp_path/'turned', 'test': write_set(tmp_path/'test', 8, 1), 'groups': None, 'out': tmp_path/'out'}
    posed = audit(**sets, metric='lfd_pose')
    assert posed['turned'].verdict == 'copying' and posed['turned'].zu.auc > .98
    assert [r['neighbour'] for r in posed['turned'].rows] == [r['id'] for r in posed['turned'].rows]
    blind = audit(**sets, metric='cd')
    assert blind['turned'].verdict != 'copying'
    record = json.loads((tmp_path/'out'/'report.json').read_text())
    assert 'may be turned' in record['warning'] and 'Warning' in (tmp_path/'out'/'report.html').read_text()
