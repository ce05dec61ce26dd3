"""Samples: the same bytes alone, in a batch, in another order and after kill -9; failures that cost one sample; conditions of every kind; the released trajectory."""
import csv, hashlib, json, os, signal, subprocess, sys, time
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('diffusers')
from PIL import Image
from safetensors import safe_open

import memkit.generate as g
from memkit.clip import tiny_clip
from memkit.conditions import ByteText, ClassTable, ClipImage
from memkit.core import InputError
from memkit.dit import DiT
from memkit.mesh import load_mesh, mesh_health
from memkit.samples import MANIFEST, plan_samples, plan_table, read_manifest
from memkit.vecset import VecSet
from memkit.weights import random_weights

QUICK = dict(n_steps=4, resolution=24)


pytestmark = pytest.mark.usefixtures('one_thread')


def drawn(net, tag):
    net.load_state_dict(random_weights({k: tuple(v.shape) for k, v in net.state_dict().items() if k not in ('point_embed.basis', 'null_context')}, tag), strict=False)
    return net.eval()


def make(context_dim=8, conditioner=None, bias=-.15):
    vecset = drawn(VecSet(dim=64, depth=1, num_latents=16, latent_dim=4, num_inputs=128, frequencies=2), 'f')
    with torch.no_grad(): vecset.to_outputs[1].bias += bias
    return g.ShapePipeline(drawn(DiT(in_channels=4, hidden_size=32, depth=2, num_heads=2, context_dim=context_dim, num_moe_layers=1), 'dit'), vecset, conditioner, z_scale=1.37)


@pytest.fixture(scope='module')
def pipeline(): return make(conditioner=drawn(ClassTable(3, 8, ('bed', 'chair', 'mug')), 'table'))


@pytest.fixture(scope='module')
def folder(pipeline, tmp_path_factory):
    where = tmp_path_factory.mktemp('model')
    pipeline.save_pretrained(where)
    return where


def hashes(folder): return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob('*')) if p.is_file() and p.suffix in g.SUFFIXES and p.name[0] != '.'}


# ---------------------------------------------------------------------------------------------------------------- the same bytes

@pytest.mark.parametrize('suffix', ['.glb', '.obj', '.ply', '.pt'])
def test_a_seed_is_a_shape(suffix, pipeline, folder, tmp_path):
    plan = plan_samples(6, 'mug', 'class', seed=4)
    g.generate(pipeline, plan, tmp_path/'all', suffix, batch_size=4, **QUICK)
    want = hashes(tmp_path/'all')
    assert len(want) == len(set(want.values())) == 6
    seven = f'class_mug/sample_0000003{suffix}'
    ways = dict(alone=(pipeline, plan[3:4], 1), turned=(pipeline, plan[::-1], 3), one_by_one=(pipeline, plan, 1), loaded=(folder, plan[2:5], 4))
    for name, (model, some, batch) in ways.items():
        g.generate(model, some, tmp_path/name, suffix, batch_size=batch, **QUICK)
        got = hashes(tmp_path/name)
        assert seven in got and got == {k: want[k] for k in got}, name
    for k in list(want)[1::2]: (tmp_path/'all'/k).unlink()            # as if a run had been stopped
    g.generate(pipeline, plan, tmp_path/'all', suffix, batch_size=2, **QUICK)
    assert hashes(tmp_path/'all') == want


def test_company_does_not_change_a_sample(pipeline):
    "The same seed beside other conditions; and beside itself."
    alone = pipeline(['mug'], [7], output='latents', n_steps=4).latents[0]
    mixed = pipeline(['bed', 'mug', 'chair', 'mug', 'mug'], [7, 7, 7, 8, 7], output='latents', n_steps=4).latents
    assert torch.equal(mixed[1], alone) and torch.equal(mixed[4], alone)
    assert not torch.equal(mixed[0], alone) and not torch.equal(mixed[3], alone)
    together = pipeline.draw(['bed', 'mug', 'chair'], [7, 7, 7], g.Settings(n_steps=4))   # as an accelerator does it
    assert (together[1] - alone).abs().max() < 1e-4


def test_weights_at_odd_addresses(pipeline, folder):
    "A matrix that does not begin at a multiple of 64 bytes is multiplied by other instructions; loading must not depend on it."
    want, p = pipeline(['mug'], [7], **QUICK), make(conditioner=pipeline.conditioner)
    for t in p.vecset.parameters():
        odd = torch.empty(t.numel() + 1)[1:].view(t.shape)
        t.data = odd.copy_(t.data)
    assert {t.data_ptr() % 64 for t in p.vecset.parameters()} == {4}
    g.aligned(p.vecset)
    assert {t.data_ptr() % 64 for t in p.vecset.parameters()} == {0}
    got = p(['mug'], [7], **QUICK)
    for a, b in zip(got.meshes[0], want.meshes[0]): assert np.array_equal(a, b)
    loaded = g.load_pipeline(folder)
    assert {t.data_ptr() % 64 for part in (loaded.dit, loaded.vecset, loaded.conditioner) for t in part.parameters()} == {0}


def test_latents_at_odd_addresses(pipeline, monkeypatch):
    "A sample in the middle of a batch begins where it begins; its mesh is made from a copy."
    seen = []
    monkeypatch.setattr(pipeline.vecset, 'field', lambda z: seen.append(z.data_ptr() % 64) or (lambda p: np.linalg.norm(p, axis=1) - .5), raising=False)
    pipeline(['mug']*3, [6, 7, 8], n_latents=5, **QUICK)
    assert seen == [0, 0, 0]


RUN = '''
import sys, time, torch
torch.set_num_threads(1)
import memkit.generate as g
from memkit.generate import generate, plan_samples
saved = g.save_sample
def slowly(*args): # on a busy machine all 24 would be there before the killer has looked twice
    path = saved(*args)
    time.sleep(.1)
    return path
g.save_sample = slowly
generate(sys.argv[1], plan_samples(24, 'mug', 'class', seed=4), sys.argv[2], '.ply', batch_size=2, n_steps=4, resolution=24)
'''


@pytest.mark.skipif(os.name == 'nt', reason='there is no kill -9')
def test_killed_and_resumed(folder, tmp_path):
    out = tmp_path/'killed'
    child = subprocess.Popen([sys.executable, '-c', RUN, str(folder), str(out)], env=os.environ | dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1'), stderr=subprocess.PIPE)
    deadline = time.time() + 400
    while len(list(out.rglob('sample_*.ply'))) < 5 and child.poll() is None and time.time() < deadline: time.sleep(.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    there = hashes(out)
    assert 5 <= len(there) < 24, child.stderr.read().decode()[-500:]
    (out/'class_mug'/'.sample_0000020-ab12cd34.tmp.ply').write_bytes(b'half a me')          # what a kill while writing leaves
    rows = g.generate(folder, plan_samples(24, 'mug', 'class', seed=4), out, '.ply', batch_size=4, **QUICK)
    g.generate(folder, plan_samples(24, 'mug', 'class', seed=4), tmp_path/'calm', '.ply', batch_size=4, **QUICK)
    assert hashes(out) == hashes(tmp_path/'calm') and there.items() <= hashes(out).items()   # of another process, too
    assert len(rows) == len(read_manifest(out/'manifest.csv')) == 24 and [int(r['seed']) for r in rows] == list(range(4, 28))
    assert not list(out.rglob('*.tmp*'))


def test_an_error_in_the_middle_leaves_whole_files(pipeline, tmp_path, monkeypatch):
    made, save = [], g.save_sample
    def fail(path, *a):
        if len(made) == 3: raise OSError('no space left on device')
        made.append(save(path, *a))
    monkeypatch.setattr(g, 'save_sample', fail)
    with pytest.raises(OSError): g.generate(pipeline, plan_samples(6, 'mug', 'class'), tmp_path, batch_size=2, **QUICK)
    assert len(read_manifest(tmp_path/'manifest.csv')) == 2 and not list(tmp_path.rglob('*.tmp*'))
    monkeypatch.setattr(g, 'save_sample', save)
    rows = g.generate(pipeline, plan_samples(6, 'mug', 'class'), tmp_path, batch_size=2, **QUICK)
    assert len(hashes(tmp_path)) == 6 and all(r['ok'] == 'True' for r in rows)


# ---------------------------------------------------------------------------------------------------------------- meshes

def test_faces_point_outward_unless_asked(pipeline, tmp_path):
    def volume(path):
        V, F = load_mesh(path)
        return np.einsum('ij,ij', V[F[:, 0]], np.cross(V[F[:, 1]], V[F[:, 2]]))/6
    ball = make(conditioner=pipeline.conditioner)
    ball.vecset.field = lambda z: lambda points: np.linalg.norm(points, axis=1) - .5
    for name, legacy in dict(outward=False, inward=True).items(): g.generate(ball, plan_samples(1, 'mug', 'class'), tmp_path/name, legacy_winding=legacy, **QUICK)
    got = {k: volume(tmp_path/k/'class_mug'/'sample_0000000.glb') for k in ('outward', 'inward')}
    assert got['outward'] == pytest.approx(4/3*np.pi*.5**3, rel=.02) and got['inward'] == pytest.approx(-got['outward'], rel=1e-6)
    assert mesh_health(*load_mesh(tmp_path/'outward'/'class_mug'/'sample_0000000.glb')).watertight


def test_a_sample_without_surface_costs_only_itself(pipeline, tmp_path):
    far = make(conditioner=pipeline.conditioner, bias=.45)
    plan = plan_samples(12, 'mug', 'class')
    rows = g.generate(far, plan, tmp_path, **QUICK)
    failed = [r for r in rows if r['ok'] == 'False']
    assert 0 < len(failed) < 12 and len(hashes(tmp_path)) == 12 - len(failed)
    assert all('no surface' in r['reason'] and not (tmp_path/r['out_path']).exists() for r in failed)
    calls = []
    far.vecset.field = lambda z: calls.append(1) or (lambda p: np.ones(len(p)))
    assert g.generate(far, plan, tmp_path, **QUICK) == rows and not calls              # known to fail: not drawn again
    g.generate(far, plan, tmp_path, overwrite=True, **QUICK)
    assert len(calls) == 12


# ---------------------------------------------------------------------------------------------------------------- conditions

def test_text_from_a_table(tmp_path):
    pipeline = make(conditioner=drawn(ByteText(dim=8, max_bytes=32, width=16, depth=1), 'bytes'))
    (tmp_path/'t.csv').write_text('model_uid,cap3d_caption\nabc,a red chair\n,"a mug, blue"\nxyz,a red chair\n')
    rows = g.generate(pipeline, plan_table(tmp_path/'t.csv', pipeline.kind, seed=5), tmp_path/'out', batch_size=2, **QUICK)
    assert list(rows[0]) == list(MANIFEST) == next(csv.reader(open(tmp_path/'out'/'manifest.csv')))
    assert [(r['uid'], r['out_path'], r['cond_type'], r['cond_text'], r['csv_row'], r['seed'], r['step'], r['source']) for r in rows] == [
        ('abc', 'abc.glb', 'text', 'a red chair', '0', '5', '0', 't.csv'), ('', 'row0000001.glb', 'text', 'a mug, blue', '1', '6', '0', 't.csv'), ('xyz', 'xyz.glb', 'text', 'a red chair', '2', '7', '1', 't.csv')]
    a, b = pipeline(['a red chair', 'A  red chair'], [1, 1], output='latents', n_steps=4).latents
    assert torch.equal(a, b) and not torch.equal(a, pipeline('a blue mug', [1], output='latents', n_steps=4).latents[0])
    with pytest.raises(InputError, match='was made with cond_text'):
        g.generate(pipeline, [replace(plan_table(tmp_path/'t.csv', 'text', seed=5)[0], text='a green chair')], tmp_path/'out', **QUICK)


def test_guidance(pipeline):
    at = lambda scale: pipeline(['mug'], [3], output='latents', n_steps=4, guidance_scale=scale).latents
    assert torch.equal(at(0.), at(1.)) and not torch.equal(at(1.), at(5.)) and torch.equal(at(5.), pipeline(['mug'], [3], output='latents', n_steps=4).latents)
    free = make(context_dim=None)
    assert torch.equal(free(None, [3], output='latents', guidance_scale=9., n_steps=4).latents, free([None], [3], output='latents', n_steps=4).latents)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    clip = tiny_clip(tmp_path_factory.mktemp('clip')/'clip')
    return make(context_dim=64, conditioner=ClipImage(clip))


def test_sprites_and_photos(pictures, tmp_path):
    tiles = np.random.RandomState(0).randint(0, 255, (12, 16, 16, 3), np.uint8)
    Image.fromarray(tiles.reshape(-1, 16, 3)).save(tmp_path/'sprite.png')
    Image.fromarray(tiles[4]).save(tmp_path/'photo.png')
    (tmp_path/'broken.png').write_bytes(b'\x89PNG half a picture')
    draw = lambda name, seed: pictures([tmp_path/name], [seed], output='latents', n_steps=3).latents[0]
    import random
    views = {seed: random.Random(seed).randrange(12) for seed in range(40)}
    four = next(s for s, v in views.items() if v == 4)
    assert torch.equal(draw('sprite.png', four), draw('photo.png', four))                 # the view is chosen by the seed, a photo is itself
    other = next(s for s, v in views.items() if v != 4)
    assert not torch.equal(draw('sprite.png', other), draw('photo.png', other))
    pictures.conditioner.register_to_config(pick='index', index=4)
    assert torch.equal(draw('sprite.png', other), draw('photo.png', other))
    pictures.conditioner.register_to_config(pick='random', index=0)
    (tmp_path/'t.csv').write_text('uid,image_path\na,sprite.png\nb,broken.png\nc,gone.png\nd,photo.png\n')
    rows = g.generate(pictures, plan_table(tmp_path/'t.csv', 'image'), tmp_path/'out', '.pt', batch_size=4, n_steps=3)
    assert [r['ok'] for r in rows] == ['True', 'False', 'False', 'True'] and 'broken.png: not a picture' in rows[1]['reason']
    assert sorted(hashes(tmp_path/'out')) == ['a.pt', 'd.pt']
    assert torch.equal(torch.load(tmp_path/'out'/'d.pt', weights_only=True), draw('photo.png', 3))


# ---------------------------------------------------------------------------------------------------------------- the released sampler

def test_the_released_trajectory(golden, monkeypatch):
    with safe_open(golden/'model'/'dit_class.safetensors', 'pt') as f: ref, about = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
    from memkit.dit import released_options
    dit = DiT(**released_options(json.loads(about['dit']))).load_released({k[3:]: v for k, v in ref.items() if k.startswith('sd.')})
    table = ClassTable(16, 24)
    table.load_state_dict({k[8:]: v for k, v in ref.items() if k.startswith('cond_sd.')})
    pipeline = g.ShapePipeline(dit, None, table, z_scale=1.37, n_tokens=32)
    monkeypatch.setattr(g, 'draw_noise', lambda seeds, shape, device: ref['ode_noise'][list(seeds)])
    got = pipeline(ref['labels'].tolist(), [0, 1, 2], output='latents', n_steps=10, guidance_scale=5.).latents
    assert (got - ref['ode_end_scaled']).abs().max() < 2e-4


# ---------------------------------------------------------------------------------------------------------------- what is refused

def test_folders_are_not_mixed(pipeline, tmp_path):
    plan = plan_samples(2, 'mug', 'class', seed=5)
    g.generate(pipeline, plan, tmp_path, **QUICK)
    before = hashes(tmp_path)
    other = make(conditioner=pipeline.conditioner, bias=-.16)
    for model, some, how, why in ((pipeline, plan, dict(n_steps=5, resolution=24), 'n_steps 4, not 5'), (other, plan, QUICK, 'made with weights'), (pipeline, plan_samples(1, 'mug', 'class', 6), QUICK, "seed '5', not '6'"),
                                  (pipeline, plan, QUICK | dict(guidance_scale=1.), 'guidance_scale 5.0, not 1.0')):
        with pytest.raises(InputError, match=why): g.generate(model, some, tmp_path, **how)
    with pytest.raises(InputError, match='n_steps 4, not 5'): g.generate(pipeline, plan[:1], tmp_path, overwrite=True, n_steps=5, resolution=24)   # the other sample would stay
    assert hashes(tmp_path) == before
    g.generate(pipeline, plan, tmp_path, overwrite=True, n_steps=5, resolution=24)
    assert hashes(tmp_path) != before and not set(hashes(tmp_path).values()) & set(before.values())


@pytest.mark.parametrize('uid', ['../up', '/abs', 'a/../../b', ''])
def test_names_stay_inside(uid, tmp_path):
    pipeline = make(conditioner=drawn(ByteText(dim=8, max_bytes=32, width=16, depth=1), 'bytes'))
    (tmp_path/'t.csv').write_text(f'uid,caption\n{uid},a chair\n')
    if uid:
        with pytest.raises(InputError, match='this one leaves it'): g.generate(pipeline, plan_table(tmp_path/'t.csv', 'text'), tmp_path/'out', **QUICK)
        assert not (tmp_path/'out').exists()
    else: assert plan_table(tmp_path/'t.csv', 'text')[0].name == 'row0000000'


def test_a_model_folder_from_elsewhere_loads_nothing_but_memkit(folder, tmp_path):
    import shutil
    for index, why in ((dict(dit=['os', 'system']), 'os.system'), (dict(vecset=['diffusers', 'AutoencoderKL']), 'diffusers.AutoencoderKL'), (dict(dit=[None, None]), 'expected a dit')):
        bad = tmp_path/why.split('.')[0].replace(' ', '_')
        shutil.copytree(folder, bad)
        (bad/'model_index.json').write_text(json.dumps(json.loads((folder/'model_index.json').read_text()) | index))
        with pytest.raises(InputError, match=why): g.load_pipeline(bad)
    pickled = tmp_path/'pickled'
    shutil.copytree(folder, pickled)
    torch.save({}, pickled/'dit'/'diffusion_pytorch_model.bin')
    (pickled/'dit'/'diffusion_pytorch_model.safetensors').unlink()
    with pytest.raises(InputError, match='no DiT that can be loaded'): g.load_pipeline(pickled)
