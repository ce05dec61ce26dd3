"""Encoders: outputs of reference networks, names and shapes of released checkpoints, hostile and incomplete files, folders embedded in batches."""
import hashlib, json, os, pickle, subprocess, sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip('torch')
from safetensors import safe_open
from safetensors.torch import save_file

from memkit.core import InputError
from memkit.database import build_database, descriptor_of, load_database
from memkit.embed import embed_folder, embedding_stats, encoder_distance
from memkit.features import check_like
from memkit.mesh import save_mesh
from memkit.pointnet2 import PointNet2, ball_query, load_pointnet2, pointnet2_forward, pointnet2_shapes
from memkit.retrieval import nearest
from memkit.uni3d import UNI3D, Uni3D, Uni3DConfig, cosine_distance, farthest_centers, group_points, group_tokens, load_uni3d, uni3d_forward, uni3d_shapes
from memkit.views import ViewEncoder, best_view_distance, load_views, shape_views, to_pixels
from memkit.weights import check_weights, linear, part, random_weights, read_weights, weights_hash

STYLES = {
    'tiny': Uni3DConfig(24, 2, 3, 'glu', 64, True, 4, 0, groups=16, group_size=8, token=32, out=32),
    'base': Uni3DConfig(32, 2, 2, 'swiglu', 85, False, 4, 0, groups=12, group_size=8, token=32, out=40),
    'giant': Uni3DConfig(32, 1, 2, 'gelu', 139, True, 4, 0, groups=10, group_size=6, token=32, out=48)}
FULL = {'tiny': 'ti', 'small': 's', 'base': 'b', 'large': 'l', 'giant': 'g'}
BOX = np.array([[x, y, z] for x in (0., 1.) for y in (0., 1.) for z in (0., 1.)]) - .5
QUADS = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
FACES = np.array([t for a, b, c, d in QUADS for t in ((a, b, c), (a, c, d))])


pytestmark = pytest.mark.usefixtures('one_thread')


def box(x=1., y=1., z=1.): return BOX*[x, y, z], FACES


def reference(data, name):
    with safe_open(data/f'model_{name}.safetensors', 'pt') as f: return {k: f.get_tensor(k) for k in f.keys()}, f.metadata()


def off(got, want): return float((got - want).abs().max()/want.abs().max())


def sizes_of(*shapes): return {k: list(v) for s in shapes for k, v in s.items()}


def toy(fill=.4, n_points=400, tag='toy', name='uni3d-toy'):
    c = STYLES['tiny']
    return Uni3D(name, c, random_weights(uni3d_shapes(c)[0], tag), n_points, fill)


# ---------------------------------------------------------------------------------------------------------------- reference outputs

@pytest.mark.parametrize('style', STYLES)
def test_uni3d_equals_the_reference_network(data, style):
    c, (ref, about) = STYLES[style], reference(data, f'uni3d_{style}')
    stored = json.loads(about['state_shapes'])
    read, besides = uni3d_shapes(c)
    assert sizes_of(read, besides) == {**stored, 'logit_scale': []}
    w = check_weights(random_weights(stored, about['tag']), read, besides)
    with torch.inference_mode():
        assert torch.equal(farthest_centers(ref['points'], c.groups), ref['fps_idx'])
        centers, groups = group_points(ref['points'], ref['rgb'], c.groups, c.group_size)
        assert torch.equal(centers, ref['centers'])
        assert off(group_tokens(part(w, 'point_encoder.encoder.'), groups), ref['group_tokens']) < 1e-5
        out = uni3d_forward(w, c, ref['points'], ref['rgb'])
        assert off(out, ref['embedding']) < 1e-5
        assert off(out/out.norm(dim=-1, keepdim=True), ref['embedding_normalized']) < 1e-5
        assert off(uni3d_forward(w, c, ref['points'], torch.zeros_like(ref['rgb'])), ref['embedding_rgb0']) < 1e-5


def test_pointnet2_equals_the_reference_network(data):
    ref, about = reference(data, 'pointnet2')
    read, rest = pointnet2_shapes()
    full = random_weights({**read, **rest}, about['tag'])
    w = check_weights(full, read, rest)
    with torch.inference_mode():
        released = pointnet2_forward(w, ref['points'], torch.arange(3))
        assert off(released, ref['features']) < 1e-5
        assert off(torch.log_softmax(linear(full, 'fc3', released.relu()), -1), ref['log_probs']) < 1e-5
        alone = pointnet2_forward(w, ref['points'][2:])
        assert off(alone, ref['features_item2_alone']) < 1e-5
        assert off(pointnet2_forward(w, ref['points'])[2:], ref['features_item2_alone']) < 1e-5, 'depends on the place in the batch'
        assert off(alone, ref['features'][2:]) > 1e-4, 'the reference no longer shows the fault it was made to show'


@pytest.mark.parametrize('name', [*STYLES, 'pointnet2'])
def test_every_tensor_that_is_demanded_is_used(data, name):
    if name == 'pointnet2': shapes, forward, pts = pointnet2_shapes()[0], pointnet2_forward, reference(data, name)[0]['points'][:1]
    else:
        ref = reference(data, f'uni3d_{name}')[0]
        shapes, pts = uni3d_shapes(STYLES[name])[0], ref['points'][:1]
        forward = lambda w, p: uni3d_forward(w, STYLES[name], p, ref['rgb'][:1])
    w = {k: v.requires_grad_() for k, v in random_weights(shapes, 'grad').items()}
    forward(w, pts).square().sum().backward()
    assert [k for k, v in w.items() if v.grad is None or not v.grad.abs().sum() > 0] == []


# ------------------------------------------------------------------------------------------------------- names and shapes of releases

def lines_of(read, besides): return sorted(f'{k} {list(v)} {"int64" if k.endswith("num_batches_tracked") else "float32"}' for k, v in {**read, **besides}.items())


@pytest.mark.parametrize('size', FULL)
def test_names_and_shapes_of_full_size_uni3d(data, size):
    lines, stored = lines_of(*uni3d_shapes(UNI3D[FULL[size]])), json.loads((data/'model_keys.json').read_text())[f'uni3d_{size}']
    assert (len(lines), hashlib.sha256('\n'.join(lines).encode()).hexdigest()) == (stored['n_keys'], stored['sha256'])


def test_names_and_shapes_of_pointnet2(data):
    lines, stored = lines_of(*pointnet2_shapes()), json.loads((data/'model_keys.json').read_text())['pointnet2_pointe']
    assert (len(lines), hashlib.sha256('\n'.join(lines).encode()).hexdigest()) == (stored['n_keys'], stored['sha256'])


@pytest.mark.parametrize('size', [*FULL, 'pointnet2'])
def test_names_and_shapes_equal_the_full_lists(golden, size):
    folder = golden/'model'/'keys'
    if size == 'pointnet2': stored, mine = json.loads((folder/'pointnet2_pointe.json').read_text())['keys'], pointnet2_shapes()
    else: stored, mine = json.loads((folder/f'uni3d_{size}.json').read_text())['keys'], uni3d_shapes(UNI3D[FULL[size]])
    assert sizes_of(*mine) == {k: shape for k, (shape, _) in stored.items()}


@pytest.mark.parametrize('size', FULL)
def test_full_size_network_runs_on_the_meta_device(size):
    c = UNI3D[FULL[size]]
    w = {k: torch.empty(v, device='meta') for k, v in uni3d_shapes(c)[0].items()}
    pts = torch.empty(2, 600, 3, device='meta')
    assert uni3d_forward(w, replace(c, groups=8), pts, pts).shape == (2, 1024)


# ------------------------------------------------------------------------------------------------------------------------ checkpoints

@pytest.fixture(scope='module')
def ti():
    "A checkpoint with the names and shapes of uni3d-ti, random."
    return {k: v.half() for k, v in random_weights(sizes_of(*uni3d_shapes(UNI3D['ti'])), 'released').items()}


def test_one_network_in_many_containers(tmp_path, ti):
    read, besides = uni3d_shapes(UNI3D['ti'])
    want = weights_hash(check_weights(ti, read, besides))
    prefixed = {f'module.{k}': v for k, v in ti.items()}
    for i, content in enumerate((ti, prefixed, dict(module=ti), dict(module=prefixed, ds_version='0.9', epoch=3), dict(state_dict=dict(ti)), dict(model=dict(module=prefixed)))):
        torch.save(content, tmp_path/f'{i}.pt')
        assert load_uni3d('ti', tmp_path/f'{i}.pt').weights == want, i
    save_file({k: v.contiguous() for k, v in ti.items()}, tmp_path/'model.safetensors')
    assert load_uni3d('ti', tmp_path/'model.safetensors').weights == want
    torch.save({k: v for k, v in ti.items() if k in read}, tmp_path/'stripped.pt')
    assert load_uni3d('ti', tmp_path/'stripped.pt').weights == want
    ti2 = {**ti, 'point_encoder.trans2embed.bias': ti['point_encoder.trans2embed.bias'] + .01}
    torch.save(ti2, tmp_path/'other.pt')
    assert load_uni3d('ti', tmp_path/'other.pt').weights != want


@pytest.mark.parametrize('spoil, message', [
    (lambda s: s.pop('point_encoder.visual.fc_norm.weight'), '1 missing: point_encoder.visual.fc_norm.weight'),
    (lambda s: s.update({'point_encoder.encoder.first.0.weight': torch.zeros(1)}), '1 unexpected: point_encoder.encoder.first.0.weight'),
    (lambda s: s.update({'point_encoder.visual.pos_embed': torch.zeros(1, 5, 192)}), 'point_encoder.visual.pos_embed [1, 5, 192] instead of [1, 257, 192]'),
    (lambda s: s['point_encoder.cls_pos'].fill_(torch.inf), 'NaN or infinity in point_encoder.cls_pos')])
def test_checkpoints_with_a_fault_are_refused(tmp_path, ti, spoil, message):
    state = {k: v.clone() for k, v in ti.items()}
    spoil(state)
    torch.save(dict(module=state), tmp_path/'model.pt')
    with pytest.raises(InputError) as e: load_uni3d('ti', tmp_path/'model.pt')
    assert message in str(e.value) and 'model.pt as uni3d-ti' in str(e.value)


@pytest.mark.parametrize('size', ['s', 'b', 'l', 'g'])
def test_another_size_is_refused_by_name(tmp_path, ti, size):
    torch.save(dict(module=ti), tmp_path/'model.pt')
    with pytest.raises(InputError, match=f'model.pt as uni3d-{size}: 191 tensors do not fit a network that reads'): load_uni3d(size, tmp_path/'model.pt')


class Spy:
    def __reduce__(self): return os.mkdir, (os.environ['MEMKIT_SPY'],)


def test_no_program_in_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.setenv('MEMKIT_SPY', str(tmp_path/'ran'))
    for i, content in enumerate((dict(module={}, spy=Spy()), Spy())):
        torch.save(content, tmp_path/f'{i}.pt')
        with pytest.raises(InputError, match='Nothing in it was run'): read_weights(tmp_path/f'{i}.pt')
    (tmp_path/'plain.pt').write_bytes(pickle.dumps(Spy(), 2))
    with pytest.raises(InputError, match='Nothing in it was run'): read_weights(tmp_path/'plain.pt')
    assert not (tmp_path/'ran').exists()


def test_numbers_of_old_and_new_numpy_beside_the_weights_are_harmless(tmp_path):
    torch.save(dict(model_state_dict=dict(a=torch.ones(1)), acc=np.float64(.9), epoch=np.int64(3), flag=np.bool_(True)), tmp_path/'new.pt', _use_new_zipfile_serialization=False)
    raw = (tmp_path/'new.pt').read_bytes()
    assert b'numpy._core.multiarray\n' in raw
    (tmp_path/'old.pt').write_bytes(raw.replace(b'numpy._core.multiarray\n', b'numpy.core.multiarray\n'))
    for name in ('new.pt', 'old.pt'): assert list(read_weights(tmp_path/name)) == ['a']


@pytest.mark.parametrize('content', [b'', b'PK\x03\x04 broken zip', b'<html>404</html>', bytes(range(256))*8])
@pytest.mark.parametrize('suffix', ['.pt', '.safetensors'])
def test_damaged_files_are_named(tmp_path, content, suffix):
    (tmp_path/f'model{suffix}').write_bytes(content)
    with pytest.raises(InputError, match=f'model{suffix}: cannot be read as data'): read_weights(tmp_path/f'model{suffix}')


def test_truncated_checkpoint(tmp_path, ti):
    torch.save(ti, tmp_path/'model.pt')
    raw = (tmp_path/'model.pt').read_bytes()
    for share in (.1, .5, .99):
        (tmp_path/'model.pt').write_bytes(raw[:int(len(raw)*share)])
        with pytest.raises(InputError, match='cannot be read as data'): load_uni3d('ti', tmp_path/'model.pt')


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "An offline Hugging Face cache of our own."
    constants = pytest.importorskip('huggingface_hub.constants')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'hub'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    return tmp_path/'hub'


def test_published_file_is_found_in_the_cache_by_repository_and_revision(hub, ti):
    from memkit.uni3d import UNI3D_REVISION
    place = hub/'models--BAAI--Uni3D'/'snapshots'/UNI3D_REVISION/'modelzoo'/'uni3d-ti'
    place.mkdir(parents=True)
    torch.save(dict(module=ti), place/'model.pt')
    encoder = load_uni3d('ti', n_points=600)
    assert encoder.name == 'uni3d-ti' and encoder.describe(*box(1, 2, 3)).shape == (1024,)
    with pytest.raises(InputError, match='hf download BAAI/Uni3D modelzoo/uni3d-ti/model.pt --revision 000'): load_uni3d('ti', revision='000')


def test_without_weights_the_message_says_what_to_download(hub, tmp_path):
    for size in UNI3D:
        with pytest.raises(InputError) as e: load_uni3d(f'{size}-no-lvis')
        assert f'hf download BAAI/Uni3D modelzoo/uni3d-{size}-no-lvis/model.pt' in str(e.value) and 'FD[lfd94] needs no weights' in str(e.value)
    with pytest.raises(InputError, match=r'point-e/pointnet\.pt\. FD\[lfd94\] needs none'): load_pointnet2(tmp_path/'pointnet.pt')
    with pytest.raises(InputError, match='hf download openai/clip-vit-base-patch16'): load_views('openai/clip-vit-base-patch16')
    with pytest.raises(InputError, match='a folder without modelzoo/uni3d-g/model.pt'): load_uni3d('g', tmp_path)


def test_without_torch_everything_imports_and_says_what_to_install(tmp_path):
    (tmp_path/'model.pt').write_bytes(b'x')
    code = f'''
import sys
sys.modules["torch"] = None
import memkit.weights, memkit.uni3d, memkit.pointnet2, memkit.views, memkit.embed
from memkit.core import InputError
for load in (lambda: memkit.uni3d.load_uni3d("g", {str(tmp_path/"model.pt")!r}), lambda: memkit.pointnet2.load_pointnet2({str(tmp_path/"model.pt")!r})):
    try: load()
    except InputError as e: print(e)
assert "transformers" not in sys.modules
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('torch cannot be imported') == 2 and done.stdout.count('pip install "memkit[make]"') == 2


# ---------------------------------------------------------------------------------------------------------------------- preprocessing

@pytest.mark.parametrize('encoder', [toy(), PointNet2(random_weights(pointnet2_shapes()[0], 'p'), 600), PointNet2(random_weights(pointnet2_shapes()[0], 'p'), 600, 'box')], ids=['uni3d', 'mean', 'box'])
def test_declared_invariances_hold_and_rotation_is_seen(encoder):
    V, F = box(1, 2, 3.5)
    turn = np.array([[.36, .48, -.8], [-.8, .6, 0], [.48, .64, .6]])
    finer = np.concatenate([F[1:], [[F[0, 0], F[0, 1], 8], [F[0, 1], F[0, 2], 8], [F[0, 2], F[0, 0], 8]]]), np.concatenate([V, [V[F[0]].mean(0)]])
    rows = [encoder.describe(*m) for m in ((V, F), (V*7 + [3, -2, 5], F), (finer[1], finer[0]), (V @ turn.T, F))]
    d = encoder.pairwise(rows[:1], rows)[0]
    assert {'translation', 'scale', 'tessellation'} == set(encoder.invariant)
    assert d[0] == 0 and d[1] < 1e-5 and d[2] < d[3]/3


def test_points_near_the_origin_are_never_centres():
    pts = torch.tensor([[[1., 0, 0], [.03, 0, 0], [-1., 0, 0], [0, .04, 0], [0, 0, .5]]])
    assert farthest_centers(pts, 5)[0].tolist()[:4] == [0, 2, 4, 3] and 1 not in farthest_centers(pts, 5)[0].tolist()
    near = pts*.01
    assert farthest_centers(near, 3)[0].tolist() == [0, 0, 0]      # as the CUDA code does when nothing may be chosen
    assert sorted(farthest_centers(near, 5, blind=-1)[0].tolist()) == [0, 1, 2, 3, 4]


def test_ball_query_against_a_loop():
    rng = np.random.default_rng(5)
    pts = rng.uniform(-1, 1, (2, 60, 3)).astype(np.float32)
    for radius, size in ((.3, 4), (.8, 16), (3., 8), (.01, 3), (3., 99)):
        got = ball_query(torch.from_numpy(pts), torch.from_numpy(pts[:, 10:15]), radius, size).numpy()
        for b in range(2):
            for i, center in enumerate(pts[b, 10:15]):
                inside = [j for j in range(60) if np.linalg.norm(pts[b, j] - center) <= radius][:size]
                assert got[b, i].tolist() == inside + [inside[0]]*(size - len(inside))


def test_label_and_protocol_say_everything_that_decides_the_values():
    a = toy()
    others = [toy(fill=0.), toy(n_points=401), toy(tag='other'), toy(name='uni3d-other')]
    assert len({x.protocol for x in (a, *others)}) == 5
    assert a.protocol.startswith(f'uni3d-toy, xyz+0.4rgb, 400pt; weights {a.weights};')
    p = PointNet2(random_weights(pointnet2_shapes()[0], 'p'), 600)
    assert len({p.protocol, replace(p, center='box').protocol, replace(p, n_points=700).protocol}) == 3


def test_a_row_does_not_depend_on_its_neighbours():
    for encoder in (toy(), PointNet2(random_weights(pointnet2_shapes()[0], 'p'), 600)):
        stack = np.stack([encoder.prepare(*box(1, y, 2)) for y in (.5, 1, 3)])
        assert np.array_equal(encoder.embed(stack)[[2, 0]], encoder.embed(stack[[2, 0]]))


def test_cosine_distance_against_scipy():
    from scipy.spatial.distance import cdist
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 40)).astype(np.float32), rng.normal(size=(5, 40)).astype(np.float32)
    assert np.allclose(cosine_distance(a, b), cdist(a, b, 'cosine'), atol=1e-7)
    assert (cosine_distance(a, 3*a).diagonal() == 0).all() and np.isclose(cosine_distance(a, -a).diagonal(), 2).all()
    views = rng.normal(size=(3, 12, 8))
    want = [[cdist(x, y, 'cosine').min() for y in views[:2]] for x in views]
    assert np.allclose(best_view_distance(views, views[:2]), want, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------------------------ views

@pytest.fixture(scope='module')
def vision(tmp_path_factory):
    "Folders of tiny CLIP (text and image, as published) and DINOv2 models, random."
    pytest.importorskip('transformers')
    from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model
    root, small = tmp_path_factory.mktemp('vision'), dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        clip = CLIPModel(CLIPConfig(text_config=dict(**small, vocab_size=99, bos_token_id=0, eos_token_id=1, pad_token_id=1), vision_config=dict(**small, image_size=48, patch_size=16), projection_dim=24)).eval()
        dino = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=42, patch_size=14)).eval()
    clip.save_pretrained(root/'clip'), dino.save_pretrained(root/'dino')
    return root, clip, dino


def test_clip_views_equal_transformers_own_pipeline(vision):
    from PIL import Image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    root, clip, _ = vision
    encoder = load_views(root/'clip', 'best')
    assert (encoder.family, encoder.size, encoder.name) == ('clip', 48, 'clip-best12')
    V, F = box(1, 2, 3)
    processor = CLIPImageProcessorPil(size=dict(shortest_edge=48), crop_size=dict(height=48, width=48))
    pixels = processor([Image.fromarray(v) for v in shape_views(V, F, 48)], return_tensors='pt')['pixel_values']
    assert torch.allclose(pixels, to_pixels(torch.from_numpy(shape_views(V, F, 48)), 'clip'), atol=1e-6)
    with torch.inference_mode(): want = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
    want = want/want.norm(dim=-1, keepdim=True)
    assert off(torch.from_numpy(encoder.describe(V, F)), want) < 1e-5
    mean = load_views(root/'clip', 'mean')
    assert off(torch.from_numpy(mean.describe(V, F)), want.mean(0)) < 1e-5 and mean.weights == encoder.weights and mean.protocol != encoder.protocol


def test_dinov2_views_take_the_class_token(vision):
    root, _, dino = vision
    encoder, (V, F) = load_views(root/'dino', size=56), box(1, 2, 3)
    with torch.inference_mode(): want = dino(pixel_values=to_pixels(torch.from_numpy(shape_views(V, F, 56)), 'dinov2')).pooler_output
    assert off(torch.from_numpy(encoder.describe(V, F)), (want/want.norm(dim=-1, keepdim=True)).mean(0)) < 1e-5
    assert load_views(root/'dino').size == 224


def test_incomplete_vision_weights_are_refused(vision, tmp_path):
    _, clip, dino = vision
    for i, (model, lost) in enumerate(((clip, 'visual_projection'), (dino, 'layer.1.norm2'))):
        model.save_pretrained(tmp_path/str(i), state_dict={k: v for k, v in model.state_dict().items() if lost not in k})
        with pytest.raises(InputError, match=rf'tensors are missing or misshapen, such as .*{lost}'): load_views(tmp_path/str(i))
    wrong = {k: v for k, v in dino.state_dict().items()}
    wrong['layernorm.weight'] = torch.ones(16)
    dino.save_pretrained(tmp_path/'wrong', state_dict=wrong)
    with pytest.raises(InputError, match='1 tensors are missing or misshapen, such as layernorm.weight'): load_views(tmp_path/'wrong')


# ---------------------------------------------------------------------------------------------------------------------------- folders

@pytest.fixture
def meshes(tmp_path):
    folder = tmp_path/'meshes'
    for i, size in enumerate(((1, 1, 1), (1, 2, 1), (1, 2, 3), (4, 1, 1), (5, 5, 1))): save_mesh(folder/f'box{i}.obj', *box(*size))
    (folder/'broken.obj').write_text('f 1 2 3\n')
    return folder


class Counting(Uni3D):
    def embed(self, stack):
        self.sizes = [*getattr(self, 'sizes', []), len(stack)]
        return super().embed(stack)


def counting(): return Counting('uni3d-toy', STYLES['tiny'], toy().state, 400)


def files(folder): return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}


def test_same_bytes_for_any_batch_size_and_for_one_mesh_at_a_time(meshes, tmp_path):
    one = embed_folder(meshes, toy(), tmp_path/'a', 1, n_jobs=1)
    embed_folder(meshes, toy(), tmp_path/'b', 4, n_jobs=2)
    build_database(meshes, tmp_path/'c', toy(), n_jobs=1)
    build_database(meshes, tmp_path/'d', encoder_distance(toy()), n_jobs=1)
    assert files(tmp_path/'a') == files(tmp_path/'b') == files(tmp_path/'c') == files(tmp_path/'d')
    assert one.ids == [f'box{i}' for i in range(5)] and list(one.failures) == ['broken'] and not (tmp_path/'a'/'journal.bin').exists()


def test_only_what_is_new_or_changed_passes_the_network(meshes, tmp_path):
    first, second, third = counting(), counting(), counting()
    embed_folder(meshes, first, tmp_path/'db', 2, n_jobs=1)
    assert first.sizes == [2, 2, 1]
    save_mesh(meshes/'new.obj', *box(1, 9, 9))
    save_mesh(meshes/'box1.obj', *box(1, 2.5, 1))
    (meshes/'box4.obj').unlink()
    db = embed_folder(meshes, second, tmp_path/'db', 8, n_jobs=1)
    assert second.sizes == [2] and db.ids == ['box0', 'box1', 'box2', 'box3', 'new']
    fresh = embed_folder(meshes, third, tmp_path/'fresh', n_jobs=1)
    assert np.array_equal(db.array, fresh.array) and files(tmp_path/'db') == files(tmp_path/'fresh')
    nothing = counting()
    embed_folder(meshes, nothing, tmp_path/'db', n_jobs=1)
    assert not hasattr(nothing, 'sizes')
    embed_folder(meshes, nothing, tmp_path/'db', n_jobs=1, rebuild=True)
    assert nothing.sizes == [5]


def test_killed_in_the_middle_and_resumed(meshes, tmp_path):
    code = f'''
import os
from pathlib import Path
import torch; torch.set_num_threads(1)
from test_encoders import Counting, counting, embed_folder
class Killed(Counting):
    def embed(self, stack):
        if len(getattr(self, "sizes", [])) == 1: os.kill(os.getpid(), 9)
        return super().embed(stack)
e = counting()
embed_folder({str(meshes)!r}, Killed(e.name, e.config, e.state, e.n_points), {str(tmp_path/"db")!r}, 2, n_jobs=1)
'''
    tests = Path(__file__).parent
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': os.pathsep.join((str(tests.parent), str(tests)))})
    assert done.returncode == -9, done.stderr
    rest = counting()
    db = embed_folder(meshes, rest, tmp_path/'db', 8, n_jobs=1)
    embed_folder(meshes, toy(), tmp_path/'whole', n_jobs=1)
    assert rest.sizes == [3] and len(db) == 5 and files(tmp_path/'db') == files(tmp_path/'whole')


def test_unlike_embeddings_are_not_mixed(meshes, tmp_path):
    db = embed_folder(meshes, toy(), tmp_path/'db', n_jobs=1)
    before = files(tmp_path/'db')
    for other in (toy(fill=0.), toy(n_points=500), toy(tag='other')):
        with pytest.raises(InputError, match='not by uni3d-toy'): embed_folder(meshes, other, tmp_path/'db', n_jobs=1)
        with pytest.raises(InputError, match='unlike features'): check_like(embedding_stats(db), embedding_stats(replace(db, descriptor=descriptor_of(other))))
    assert {k: v for k, v in files(tmp_path/'db').items() if k != 'journal.bin'} == before
    assert np.array_equal(load_database(tmp_path/'db').array, db.array)


def test_a_row_that_is_not_finite_fails_alone(meshes, tmp_path):
    class Odd(Uni3D):
        def embed(self, stack):
            rows = super().embed(stack)
            if len(rows) > 1: rows[1] = np.nan
            return rows
    odd = Odd('uni3d-toy', STYLES['tiny'], toy().state, 400)
    db = embed_folder(meshes, odd, tmp_path/'db', 3, n_jobs=1)
    assert db.ids == ['box0', 'box2', 'box3'] and 'NaN' in db.failures['box1'] and set(db.failures) == {'box1', 'box4', 'broken'}
    assert len(embed_folder(meshes, toy(), tmp_path/'db', n_jobs=1)) == 3
    assert len(embed_folder(meshes, toy(), tmp_path/'db', n_jobs=1, retry_failed=True)) == 5


def test_retrieval_by_embedding_finds_the_copy(meshes, tmp_path):
    db, distance = embed_folder(meshes, toy(), tmp_path/'db', n_jobs=1), encoder_distance(toy())
    copies = np.stack([distance.describe(*box(2, 4, 6)), distance.describe(*box(10, 10, 2))])
    found = nearest(copies, db.array, distance=distance.pairwise)
    index, d = found[0], found[1]
    assert [db.ids[i] for i in np.asarray(index)[:, 0]] == ['box2', 'box4'] and (np.asarray(d) < 1e-5).all()


def test_frechet_distance_sees_the_fill_colour(tmp_path, meshes):
    from memkit.fpd import frechet_distance
    grey, black = (toy(fill).embed(np.stack([toy().prepare(*box(1, 1 + i/4, 1 + i % 3)) for i in range(12)])) for fill in (.4, 0.))
    assert frechet_distance(grey, black) > 2*frechet_distance(grey[::2], grey[1::2])


def test_views_with_twelve_vectors_have_no_frechet_statistics(vision, meshes, tmp_path):
    best = load_views(vision[0]/'clip', 'best')
    db = embed_folder(meshes, best, tmp_path/'best', 2, n_jobs=1)
    assert db.array.shape == (5, 12, 24)
    assert (encoder_distance(best).pairwise(db.array, db.array).diagonal() == 0).all()
    with pytest.raises(InputError, match="expected one vector"): embedding_stats(db)
    mean = embed_folder(meshes, load_views(vision[0]/'clip'), tmp_path/'mean', 2, n_jobs=1)
    assert embedding_stats(mean).label == 'FD[clip-mean12, 12x48px, unit views, l2norm=no, ddof=0]'
