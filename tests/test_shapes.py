"""The built-in data set keeps its promises: closed meshes, true distances, determinism, captions that can be checked."""
import hashlib
import re
import subprocess
import sys

import numpy as np
import pytest
import trimesh

from memkit.core import InputError, make_rng
from memkit.furniture import sample_params
from memkit.replicas import REPLICAS, dodecahedron_turns, plant_replicas, replicate
from memkit.shapes import CATEGORIES, FAMILIES, LEVELS, Shape, sample_shape, shape_set

POINTS = np.random.default_rng(0).uniform(-1.1, 1.1, (4000, 3))
each_category = pytest.mark.parametrize('category', CATEGORIES)


def solids(mesh):
    "Outer pieces of a mesh; a hollow inside has negative volume and is not one."
    return [m for m in mesh.split(only_watertight=False) if m.volume > 0]


@each_category
@pytest.mark.parametrize('resolution', [64, 96])
def test_meshes_are_closed_whole_and_inside_the_unit_ball(category, resolution):
    for seed in range(100, 108):
        V, F = sample_shape(category, seed).mesh(resolution)
        mesh = trimesh.Trimesh(V, F, process=False)
        assert mesh.is_watertight and mesh.is_winding_consistent and mesh.volume > 0, (category, seed)
        assert len(solids(mesh)) == 1, (category, seed, 'a part came off')
        assert np.linalg.norm(V, axis=1).max() <= 1
        assert np.abs((V.min(0) + V.max(0))/2).max() < .25, 'far from centred'
        assert np.ptp(V, axis=0).max() > .9, 'fills too little of the ball'


@each_category
def test_numpy_and_torch_agree(category):
    torch = pytest.importorskip('torch')
    for seed in range(6):
        sdf = sample_shape(category, seed).sdf
        a = sdf(POINTS)
        assert a.shape == (len(POINTS),) and a.dtype == np.float64
        b = sdf(torch.from_numpy(POINTS))
        assert isinstance(b, torch.Tensor) and np.abs(b.numpy() - a).max() < 1e-6
        c = sdf(torch.from_numpy(POINTS).float())
        assert c.dtype == torch.float32 and np.abs(c.numpy() - a).max() < 1e-4
        assert np.array_equal(sdf(POINTS.reshape(40, 100, 3)), a.reshape(40, 100))


@each_category
def test_distances_are_1_lipschitz(category):
    rng = np.random.default_rng(1)
    for seed in range(8):
        sdf = sample_shape(category, seed).sdf
        step = rng.normal(size=POINTS.shape)*10.**rng.uniform(-5, 0, (len(POINTS), 1))
        slope = np.abs(sdf(POINTS + step) - sdf(POINTS))/np.linalg.norm(step, axis=1)
        assert slope.max() <= 1 + 1e-6, (category, seed)


@each_category
def test_torch_gradient_is_finite_and_at_most_one(category):
    torch = pytest.importorskip('torch')
    p = torch.from_numpy(np.concatenate([POINTS[:1000], np.zeros((1, 3))])).requires_grad_()
    sample_shape(category, 5).sdf(p).sum().backward()
    norm = p.grad.norm(dim=1)
    assert torch.isfinite(norm).all() and norm.max() <= 1 + 1e-6
    assert norm.median() > .2       # a lower bound, but not a flat one


@each_category
def test_the_bound_never_exceeds_the_distance_to_the_mesh(category):
    from scipy.spatial import cKDTree
    shape = sample_shape(category, 9)
    V, F = shape.mesh(96)
    nearest = cKDTree(np.concatenate([V, V[F].mean(1)])).query(POINTS)[0]
    assert (np.abs(shape.sdf(POINTS)) <= nearest + 2.02/96).all()


@each_category
def test_every_parameter_changes_the_shape(category):
    space, build, _ = FAMILIES[category]
    assert len(space) >= 8
    p, dead = np.random.default_rng(2).uniform(-1, 1, (4000, 3)), set(space)
    for seed in range(60):
        if not dead: break
        rng = make_rng(seed, 'params')
        base, other = sample_params(space, rng), sample_params(space, rng)
        solid = build(base)
        q = (np.add(solid.hi, solid.lo) + p*np.subtract(solid.hi, solid.lo))/2
        for name in list(dead):
            if not np.array_equal(build(type(base)({**base, name: other[name]}))(q), solid(q)): dead.discard(name)
    assert not dead, f'{category}: nothing depends on {sorted(dead)}'


@each_category
def test_nearest_neighbours_within_a_category_differ(category):
    p = np.random.default_rng(3).uniform(-.8, .8, (6000, 3))
    inside = [sample_shape(category, s).sdf(p) < 0 for s in range(20)]
    differ = [min((a ^ b).sum()/(a | b).sum() for j, b in enumerate(inside) if j != i) for i, a in enumerate(inside)]
    assert np.median(differ) > .15, (category, np.round(differ, 2))


def test_categories_can_be_told_apart():
    "A descriptor of six numbers (moments and box) and the nearest neighbour among others: far better than chance, 1/16."
    def describe(shape):
        V, F = shape.mesh(40)
        m = trimesh.Trimesh(V, F, process=False)
        box = np.ptp(V, axis=0)
        rings = [(np.linalg.norm(V[:, [0, 2]], axis=1)[(V[:, 1] > q0*box[1]) & (V[:, 1] <= q1*box[1])]) for q0, q1 in ((-.6, -.25), (-.25, 0), (0, .25), (.25, .6))]
        return np.concatenate([box, [m.volume, m.area/5], *([r.mean() if len(r) else 0, r.std() if len(r) else 0] for r in rings)])
    shapes = shape_set(16*8, seed=4)
    X = np.stack([describe(s) for s in shapes]); X = (X - X.mean(0))/X.std(0)
    label = np.array([s.category for s in shapes])
    d = np.linalg.norm(X[:, None] - X[None], axis=2); np.fill_diagonal(d, np.inf)
    assert (label[d.argmin(1)] == label).mean() > .6


def test_same_seed_same_shape_in_another_process():
    code = ("from memkit.shapes import *; import hashlib\n"
            "for s in shape_set(16, seed=5): V, F = s.mesh(32); print(hashlib.sha256(V.tobytes() + F.tobytes() + repr(sorted(s.params.items())).encode() + s.caption('paragraph').encode()).hexdigest())")
    there = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    here = []
    for s in shape_set(16, seed=5):
        V, F = s.mesh(32)
        here.append(hashlib.sha256(V.tobytes() + F.tobytes() + repr(sorted(s.params.items())).encode() + s.caption('paragraph').encode()).hexdigest())
    assert there == here and len(set(here)) == 16


def test_sets_are_balanced_prefix_stable_and_disjoint():
    a, b = shape_set(64), shape_set(64, seed=1)
    assert [s.category for s in a] == list(CATEGORIES)*4 and shape_set(20) == a[:20]
    assert not {repr(s.params) for s in a} & {repr(s.params) for s in b}
    assert len({repr(s.params) for s in a}) == 64
    assert {s.category for s in shape_set(5, categories='mug')} == {'mug'}
    assert Shape(a[7].category, dict(a[7].params)).solid(POINTS).tolist() == a[7].sdf(POINTS).tolist()


@each_category
def test_captions_are_well_formed_and_vary(category):
    said = {level: set() for level in LEVELS}
    for seed in range(60):
        shape = sample_shape(category, seed)
        for level in LEVELS: said[level].add(shape.caption(level))
        phrase, sentence, paragraph = map(shape.caption, LEVELS)
        assert 1 <= len(phrase.split()) <= 7 and not phrase.endswith('.')
        assert 5 <= len(sentence.split()) <= 30 and paragraph.startswith(sentence) and len(paragraph.split()) > len(sentence.split()) + 8
        for text in (sentence, paragraph):
            assert text[0].isupper() and text.endswith('.') and '  ' not in text and '..' not in text and ' ,' not in text and ' .' not in text
            assert not re.search(r'\b[Aa] [aeio]\w|\b[Aa]n [^aeiouAEIOU]|\bNone\b|\bno \w+s run', text), text
    assert len(said['phrase']) >= 4 and len(said['phrase']) <= len(said['sentence']) <= len(said['paragraph'])
    assert len(said['paragraph']) >= 50


# words that must be in the paragraph exactly when the parameters say so
FACTS = {
    'chair': [('armchair', lambda p: p.arms != 'none'), ('pedestal', lambda p: p.legs == 'pedestal'), ('rungs', lambda p: p.back == 'ladder'), ('round seat', lambda p: p.round_seat)],
    'table': [('shelf', lambda p: p.shelf and p.legs in ('square', 'panel')), ('apron', lambda p: p.apron and p.legs in ('square', 'tapered')), ('trestles', lambda p: p.legs == 'trestle'), ('oval', lambda p: p.top == 'oval')],
    'bed': [('no footboard', lambda p: p.footboard == 'none'), ('canopy', lambda p: p.posts == 'canopy'), ('three pillows', lambda p: p.pillows == 3), ('arched', lambda p: p.headboard == 'arched')],
    'bookshelf': [('looked through', lambda p: not p.back), ('moulding', lambda p: p.crown), ('three rows', lambda p: p.shelves == 3), ('plinth', lambda p: p.base == 'plinth')],
    'lamp': [('globe', lambda p: p.shade == 'globe'), ('tripod', lambda p: p.base == 'tripod'), ('arched tube', lambda p: p.stem == 'arched'), ('joint', lambda p: p.stem == 'jointed')],
    'mug': [('eight-sided', lambda p: p.sides == 8), ('square handle', lambda p: p.handle == 'square'), ('two bands', lambda p: p.bands == 2), ('spreads out', lambda p: p.foot == 'flared')],
    'vase': [('no handles', lambda p: p.handles == 'none'), ('two knobs', lambda p: p.handles == 'knobs'), ('stem', lambda p: p.pedestal == 'stem'), ('four-sided', lambda p: p.sides == 4)],
    'teapot': [('over the lid', lambda p: p.handle == 'overhead'), ('pear-shaped', lambda p: p.body == 'pear'), ('four round feet', lambda p: p.foot == 'feet'), ('straight spout', lambda p: p.spout == 'straight')],
    'bottle': [('sloped shoulder', lambda p: p.shoulder == 'sloped'), ('cork', lambda p: p.cap == 'cork'), ('no handle', lambda p: not p.handle), ('no collar', lambda p: not p.collar), ('sunk', lambda p: p.label == 'sunk')],
    'car': [('roof rack', lambda p: p.roof == 'rack'), ('cargo bed', lambda p: p.style == 'pickup'), ('Bumpers stand out', lambda p: p.bumper), ('spare wheel', lambda p: p.style == 'jeep')],
    'airplane': [('biplane', lambda p: p.wings == 'double'), ('like a T', lambda p: p.tail == 'T'), ('wheels hang', lambda p: p.gear), ('four jets', lambda p: p.engines == 'four jets' and p.wings != 'double')],
    'sword': [('ridge', lambda p: p.ridge), ('curved blade', lambda p: p.blade == 'curved'), ('disc-shaped guard', lambda p: p.guard == 'disc'), ('smooth', lambda p: p.rings == 0)],
    'gun': [('A scope', lambda p: p.scope), ('silencer', lambda p: p.muzzle == 'silencer'), ('revolver', lambda p: p.kind == 'revolver'), ('skeleton stock', lambda p: p.kind in ('rifle', 'carbine') and p.stock == 'skeleton')],
    'guitar': [('sound hole', lambda p: p.body in ('acoustic', 'cutaway')), ('slotted head', lambda p: p.head == 'slotted'), ('covers part', lambda p: p.guard), ('two pickups', lambda p: p.pickups == 2 and p.body not in ('acoustic', 'cutaway'))],
    'figurine': [('holding', lambda p: p.held != 'nothing'), ('crown', lambda p: p.hat == 'crown'), ('cape', lambda p: p.clothes == 'cape'), ('square base', lambda p: p.base == 'square')],
    'toy': [('robot', lambda p: p.kind == 'robot'), ('locomotive', lambda p: p.kind == 'train'), ('a hat', lambda p: p.hat and p.kind not in ('train', 'rings')), ('five rings', lambda p: p.kind == 'rings' and p.count == 5)],
}


@each_category
def test_captions_state_the_parameters(category):
    seen = set()
    for seed in range(120):
        shape = sample_shape(category, seed)
        for words, holds in FACTS[category]:
            assert (words in shape.caption('paragraph')) == bool(holds(shape.params)), (words, shape.params, shape.caption('paragraph'))
            seen.add((words, bool(holds(shape.params))))
    assert len(seen) == 2*len(FACTS[category]), 'a fact was never true or never false'


def test_refusals():
    with pytest.raises(InputError, match="category 'sofa'"): sample_shape('sofa', 0)
    with pytest.raises(InputError, match='parameters missing'): Shape('mug', {'height': 2.})
    with pytest.raises(InputError, match='caption level'): sample_shape('mug', 0).caption('poem')
    with pytest.raises(InputError, match='at least one'): shape_set(3, categories=[])
    with pytest.raises(InputError, match='replica family'): replicate(*sample_shape('mug', 0).mesh(32), 'melt', '1')
    with pytest.raises(InputError, match='replica level'): replicate(*sample_shape('mug', 0).mesh(32), 'noise', '1')


# ---------------------------------------------------------------- known copies

ALL_LEVELS = [(f, l) for f, levels in REPLICAS.items() for l in levels]


@pytest.fixture(scope='module')
def original(): return sample_shape('teapot', 2).mesh(64)


@pytest.fixture(scope='module')
def other(): return sample_shape('mug', 2).mesh(64)


@pytest.mark.parametrize('family, level', ALL_LEVELS)
def test_every_copy_is_a_mesh_and_repeats(original, other, family, level):
    V, F = replicate(*original, family, level, 7, other)
    W, G = replicate(*original, family, level, 7, other)
    assert np.array_equal(V, W) and np.array_equal(F, G)
    assert np.isfinite(V).all() and F.min() >= 0 and F.max() < len(V) and len(F) > 100
    assert V.dtype == np.float64 and F.dtype == np.int64
    assert not (V.shape == original[0].shape and np.array_equal(V, original[0]) and F.shape == original[1].shape and np.array_equal(F, original[1])), 'nothing was changed'


@pytest.mark.parametrize('level', REPLICAS['remesh'])
def test_remeshing_keeps_the_surface(original, level):
    from scipy.spatial import cKDTree
    V, F = replicate(*original, 'remesh', level)
    a, b = (trimesh.sample.sample_surface(trimesh.Trimesh(*m, process=False), 4000, seed=0)[0] for m in (original, (V, F)))
    gap = max(np.median(cKDTree(a).query(b)[0]), np.median(cKDTree(b).query(a)[0]))
    assert gap < (.06 if '10%' in level else .035)
    if level.startswith('voxel'): assert trimesh.Trimesh(V, F, process=False).is_watertight


def test_rotations_are_rotations(original):
    V, F = original
    pick = np.random.default_rng(0).integers(len(V), size=(500, 2))
    length = lambda X: np.linalg.norm(X[pick[:, 0]] - X[pick[:, 1]], axis=1)
    for level in REPLICAS['rotation']:
        W = replicate(V, F, 'rotation', level, 3)[0]
        assert np.allclose(length(W), length(V), atol=1e-9)
        assert trimesh.Trimesh(W, F, process=False).volume == pytest.approx(trimesh.Trimesh(V, F, process=False).volume)
        if level.startswith('yaw'): assert np.allclose(W[:, 1], V[:, 1])


def test_dodecahedral_turns_form_a_group():
    R = dodecahedron_turns()
    assert R.shape == (60, 3, 3) and np.allclose(R @ R.transpose(0, 2, 1), np.eye(3), atol=1e-9)
    products = (R[:, None] @ R[None]).reshape(-1, 3, 3)
    assert np.abs(products[:, None] - R[None]).max((2, 3)).min(1).max() < 1e-4


def test_noise_has_its_size(original):
    V, F = original
    r = np.linalg.norm(V - (V.min(0) + V.max(0))/2, axis=1).max()
    for level in ('sigma 0.5%', 'sigma 4%'):
        assert np.std(replicate(V, F, 'noise', level)[0] - V) == pytest.approx(float(level[6:-1])/100*r, rel=.05)
    assert np.linalg.norm(replicate(V, F, 'deform', 'bend 8%')[0] - V, axis=1).max() == pytest.approx(.08*r)


def test_planted_copies_know_their_source():
    sources = {f'{s.category}-{i}': s for i, s in enumerate(shape_set(6))}
    wanted = [('similarity', 'shift'), ('noise', 'sigma 1%'), ('part', 'swap')]
    copies = list(plant_replicas(sources, wanted, seed=1))
    assert [(c.source, c.family, c.level) for c in copies] == [(k, *w) for k in sources for w in wanted]
    alone = list(plant_replicas({k: sources[k] for k in list(sources)[2:3]}, [wanted[1]], seed=1))[0]
    assert np.array_equal(alone.V, copies[7].V)
    assert not np.array_equal(next(plant_replicas(sources, [wanted[1]], seed=2)).V, copies[1].V)
    # the nearest original of a mildly noisy copy, by extent and area alone, is its source
    def feature(V, F): return np.r_[np.sort(np.ptp(V, axis=0)), V.std(0)]
    originals = {k: feature(*s.mesh()) for k, s in sources.items()}
    for c in copies:
        if c.family == 'similarity': assert min(originals, key=lambda k: np.abs(originals[k] - feature(c.V, c.F)).max()) == c.source


def test_unknown_plants_are_refused():
    with pytest.raises(InputError, match='expected a family'): plant_replicas({}, ['melt'])
    with pytest.raises(InputError, match='or a pair'): plant_replicas({}, [('noise', '1')])
