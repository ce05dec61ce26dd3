"""Checkpoints of other codes: every layout gives the same model, nothing incomplete or hostile gives one, sizes follow from shapes, released answers survive the conversion."""
import json

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('diffusers')
from safetensors import safe_open
from safetensors.torch import save_file

from memkit import convert as c
from memkit.clip import hf_to_openai, tiny_clip
from memkit.conditions import ClassTable
from memkit.core import InputError
from memkit.dit import DiT
from memkit.generate import Settings, load_pipeline
from memkit.vecset import VecSet
from memkit.weights import random_weights

TOKENS = dict(num_latents=16)


pytestmark = pytest.mark.usefixtures('one_thread')


def drawn(net, tag):
    net.load_state_dict(random_weights({k: tuple(v.shape) for k, v in net.state_dict().items() if k != 'point_embed.basis'}, tag), strict=False)
    return net.eval()


@pytest.fixture(scope='module')
def nets():
    return {'model.': drawn(DiT(in_channels=4, hidden_size=32, depth=2, num_heads=2, context_dim=8, num_moe_layers=1), 'dit'),
            'first_stage_model.autoencoder.': drawn(VecSet(dim=64, depth=1, latent_dim=4, num_inputs=128, **TOKENS), 'vecset'),
            'cond_stage_model.': drawn(ClassTable(3, 8), 'table')}


@pytest.fixture
def state(nets): return {f'{prefix}{k}': v.clone() for prefix, net in nets.items() for k, v in net.state_dict().items()} | {'z_scale_factor': torch.tensor(1.37)}


# ---------------------------------------------------------------------------------------------------------------- layouts

def lightning(folder, state): torch.save(dict(state_dict=state, epoch=3, global_step=9, optimizer_states=[{'state': {0: torch.zeros(2)}}]), folder/'last.ckpt'); return folder/'last.ckpt'
def bare(folder, state): torch.save(state, folder/'weights.bin'); return folder
def old_zip(folder, state): torch.save(dict(state_dict=state), folder/'old.pth', _use_new_zipfile_serialization=False); return folder/'old.pth'
def tensors(folder, state): save_file(state, folder/'model.safetensors'); return folder
def compiled(folder, state): return lightning(folder, {k.replace('model.', 'model._orig_mod.', 1) if k.startswith('model.') else k: v for k, v in state.items()})


def deepspeed(folder, state, tag='global_step500', prefix='_forward_module.'):
    (folder/tag).mkdir()
    torch.save(dict(module={prefix + k: v for k, v in state.items()}, dp_world_size=8, ds_config=dict(zero=2)), folder/tag/'mp_rank_00_model_states.pt')
    torch.save([1], folder/tag/'zero_pp_rank_0_mp_rank_00_optim_states.pt')
    (folder/'latest').write_text(tag)
    return folder


def merged(folder, state): # what zero_to_fp32.py leaves is preferred to the halved copy
    deepspeed(folder, {k: v.half() for k, v in state.items()})
    torch.save(state, folder/'pytorch_model.bin')
    return folder


def sharded(folder, state, suffix='bin', write=lambda s, p: torch.save(s, p)):
    names = list(state)
    for i in range(3): write({k: state[k] for k in names[i::3]}, folder/f'part-{i}.{suffix}')
    index = folder/('pytorch_model.bin.index.json' if suffix == 'bin' else 'model.safetensors.index.json')
    index.write_text(json.dumps(dict(metadata=dict(total_size=1), weight_map={k: f'part-{i % 3}.{suffix}' for i, k in enumerate(names)})))
    return folder


def sharded_safe(folder, state): return sharded(folder, state, 'safetensors', save_file)
def sharded_file(folder, state): return sharded(folder, state)/'pytorch_model.bin.index.json'
def ddp(folder, state): return lightning(folder, {f'module.{k}': v for k, v in state.items()})
def no_autoencoder_name(folder, state): return lightning(folder, {k.replace('first_stage_model.autoencoder.', 'first_stage_model.'): v for k, v in state.items()})


LAYOUTS = (lightning, bare, old_zip, tensors, compiled, ddp, deepspeed, merged, sharded, sharded_safe, sharded_file, no_autoencoder_name)


@pytest.mark.parametrize('layout', LAYOUTS, ids=lambda f: f.__name__)
def test_every_layout_gives_the_same_tensors(layout, state, nets, tmp_path):
    (tmp_path/'in').mkdir()
    found = c.read_checkpoint(layout(tmp_path/'in', state | {'val_fpd.total': torch.zeros(2)}))
    assert abs(found.z_scale - 1.37) < 1e-6 and [c.plain_name(k) for k in found.ignored] == ['val_fpd.total']
    for part, prefix in dict(dit='model.', vecset='first_stage_model.autoencoder.', conditioner='cond_stage_model.').items():
        want = nets[prefix].state_dict()
        assert set(found.parts[part]) == set(want)
        assert all(torch.equal(found.parts[part][k], v) for k, v in want.items())


def test_the_converted_model_is_the_model(state, nets, tmp_path):
    record = c.convert(lightning(tmp_path, state), tmp_path/'model', eps_profile='vecsetx', **TOKENS)
    pipeline = load_pipeline(tmp_path/'model')
    for part, prefix in dict(dit='model.', vecset='first_stage_model.autoencoder.', conditioner='cond_stage_model.').items():
        got = getattr(pipeline, part).state_dict()
        assert all(torch.equal(got[k], v) for k, v in nets[prefix].state_dict().items())
    assert pipeline.config.z_scale == pytest.approx(1.37, abs=1e-6) and pipeline.vecset.config.eps_profile == 'vecsetx'
    assert json.loads((tmp_path/'model'/'conversion.json').read_text())['parts']['dit'] == record['parts']['dit']
    assert record['sources'][0]['files'][0]['name'] == 'last.ckpt' and str(tmp_path) not in (tmp_path/'model'/'conversion.json').read_text()


def test_vecsetx_file_alone_and_beside_a_denoiser(state, nets, tmp_path):
    ae = nets['first_stage_model.autoencoder.'].state_dict()
    other = {k: v + 1 if k == 'to_outputs.1.bias' else v for k, v in ae.items()}
    torch.save(dict(model=other, optimizer={}, epoch=110, scaler={}), tmp_path/'checkpoint-110.pth')
    assert list(c.convert(tmp_path/'checkpoint-110.pth', tmp_path/'ae', **TOKENS)['parts']) == ['vecset']
    assert c.open_vecset(tmp_path/'ae').config.eps_profile == 'vecsetx'
    record = c.convert(lightning(tmp_path, state), tmp_path/'both', vecset=tmp_path/'checkpoint-110.pth', **TOKENS)
    assert torch.equal(load_pipeline(tmp_path/'both').vecset.to_outputs[1].bias, other['to_outputs.1.bias']) and len(record['sources']) == 2
    with pytest.raises(InputError, match='an autoencoder alone draws nothing'): c.open_pipeline(tmp_path/'checkpoint-110.pth')


# ---------------------------------------------------------------------------------------------------------------- what is refused

def without(state, *words): return {k: v for k, v in state.items() if not any(w in k for w in words)}


@pytest.mark.parametrize('spoil, message', [
    (lambda s: without(s, 'blocks.1.ff.experts.3.'), r'4 missing: blocks\.1\.ff\.experts\.3\.net\.0\.proj\.weight'),
    (lambda s: without(s, 'autoencoder.layers.0.1.norm'), r'2 missing: layers\.0\.1\.norm\.weight, layers\.0\.1\.norm\.bias'),
    (lambda s: s | {'model.blocks.0.extra.weight': torch.ones(1)}, r'1 unexpected: blocks\.0\.extra\.weight'),
    (lambda s: s | {'model.final_layer.linear.bias': torch.ones(5)}, r'final_layer\.linear\.bias \[5\] instead of \[4\]'),
    (lambda s: s | {'first_stage_model.autoencoder.to_outputs.1.bias': torch.tensor([torch.inf])}, 'NaN or infinity in to_outputs.1.bias'),
    (lambda s: s | {'z_scale_factor': torch.tensor(-1.)}, 'z_scale_factor is -1'),
    (lambda s: without(s, 'cond_stage_model'), 'holds no conditioner; expected text or image'),
    (lambda s: without(s, 'model.') | {'visual.proj': torch.ones(2)}, 'none of an autoencoder or a denoiser'),
    (lambda s: {k: v[:0] if v.ndim else v for k, v in s.items()}, 'run zero_to_fp32.py'),
])
def test_what_is_not_whole_is_refused_and_leaves_nothing(spoil, message, state, tmp_path):
    source = lightning(tmp_path, {k: v for k, v in spoil(state).items() if v is not None})
    with pytest.raises(InputError, match=message): c.convert(source, tmp_path/'out', **TOKENS)
    assert [p.name for p in tmp_path.iterdir()] == ['last.ckpt']


class Spy:
    def __init__(self, path): self.path = path
    def __reduce__(self): return (open, (str(self.path), 'w'))


@pytest.mark.parametrize('place', ['lightning', 'deepspeed', 'shard', 'latents of the optimiser'])
def test_programs_in_checkpoints_do_not_run(place, state, tmp_path):
    spy, folder = Spy(tmp_path/'it has run'), tmp_path/'in'
    folder.mkdir()
    if place == 'lightning': torch.save(dict(state_dict=state, hyper_parameters=spy), folder/'a.ckpt')
    elif place == 'deepspeed': deepspeed(folder, state); torch.save(dict(module=state, args=spy), folder/'global_step500'/'mp_rank_00_model_states.pt')
    elif place == 'shard': sharded(folder, state); torch.save(spy, folder/'part-1.bin')
    else: torch.save(dict(state_dict=state, optimizer_states=[spy]), folder/'a.ckpt', _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match='Nothing in it was run'): c.read_checkpoint(folder)
    assert not spy.path.exists()


def test_shards_stay_in_their_folder(state, tmp_path):
    folder = tmp_path/'in'
    folder.mkdir()
    sharded(folder, state)
    (folder/'part-2.bin').rename(tmp_path/'elsewhere.bin')
    with pytest.raises(InputError, match='1 of 3 shards are missing: part-2.bin'): c.read_checkpoint(folder)
    (folder/'part-2.bin').symlink_to(tmp_path/'elsewhere.bin')
    with pytest.raises(InputError, match='this one leaves it'): c.read_checkpoint(folder)
    index = json.loads((folder/'pytorch_model.bin.index.json').read_text())
    for name in ('../elsewhere.bin', str(tmp_path/'elsewhere.bin'), 'part-0.bin\0'):
        (folder/'pytorch_model.bin.index.json').write_text(json.dumps(dict(weight_map={k: v.replace('part-2.bin', name) for k, v in index['weight_map'].items()})))
        with pytest.raises((InputError, ValueError)): c.read_checkpoint(folder)
    (folder/'latest').write_text('../../etc')
    (folder/'pytorch_model.bin.index.json').unlink()
    with pytest.raises(InputError, match='this one leaves it'): c.read_checkpoint(folder)


def test_a_model_that_is_there_is_not_overwritten_unasked(state, tmp_path):
    source, out = lightning(tmp_path, state), tmp_path/'model'
    c.convert(source, out, **TOKENS)
    before = (out/'dit'/'diffusion_pytorch_model.safetensors').read_bytes()
    with pytest.raises(InputError, match='is already there'): c.convert(source, out, **TOKENS)
    broken = lightning(tmp_path, without(state, 'final_layer'))
    with pytest.raises(InputError, match='missing'): c.convert(broken, out, overwrite=True, **TOKENS)
    assert (out/'dit'/'diffusion_pytorch_model.safetensors').read_bytes() == before   # a failed conversion costs nothing
    lightning(tmp_path, state | {'z_scale_factor': torch.tensor(2.)})
    c.convert(source, out, overwrite=True, **TOKENS)
    assert load_pipeline(out).config.z_scale == 2
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'thesis.tex').write_text('x')
    with pytest.raises(InputError, match='was not written by convert'): c.convert(source, tmp_path/'mine', overwrite=True, **TOKENS)


# ---------------------------------------------------------------------------------------------------------------- conditioners

@pytest.mark.parametrize('kind', ['text', 'image'])
def test_a_whole_clip_inside(kind, state, tmp_path):
    from safetensors.torch import load_file
    clip = tiny_clip(tmp_path/'clip')
    inside = {f'cond_stage_model.{k}': v for k, v in hf_to_openai(load_file(clip/'model.safetensors')).items()}
    dit = drawn(DiT(in_channels=4, hidden_size=32, depth=2, num_heads=2, context_dim=64, num_moe_layers=1), 'wide')
    source = lightning(tmp_path, without(state, 'cond_stage_model', 'model.blocks', 'model.x_', 'model.t_', 'model.final') | inside | {f'model.{k}': v for k, v in dit.state_dict().items()})
    with pytest.raises(InputError, match="'text' or 'image'"): c.convert(source, tmp_path/'out', clip=clip, **TOKENS)
    c.convert(source, tmp_path/'out', condition=kind, clip=clip, **TOKENS)
    made = load_pipeline(tmp_path/'out')
    given = ['a red chair'] if kind == 'text' else [torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()]
    assert made.kind == kind and made.draw(given, [3], Settings(n_steps=2)).shape == (1, 16, 4)
    with pytest.raises(InputError, match="expected 'text' or 'image'"): c.convert(source, tmp_path/'no', condition='class', clip=clip, **TOKENS)


def test_unconditional_of_equal_width_has_to_be_said(tmp_path):
    free = drawn(DiT(in_channels=4, hidden_size=32, depth=2, num_heads=2, context_dim=None, num_moe_layers=0), 'free')
    source = lightning(tmp_path, {f'model.{k}': v for k, v in free.state_dict().items()})
    with pytest.raises(InputError, match='width and context both have 32 channels'): c.convert(source, tmp_path/'out')
    record = c.convert(source, tmp_path/'out', condition='none')
    assert any('no autoencoder' in n for n in record['notes']) and load_pipeline(tmp_path/'out').kind == ''


# ---------------------------------------------------------------------------------------------------------------- released sizes and answers

@pytest.mark.parametrize('name, size', [('baseline_text', 'B'), ('small', 'S'), ('large', 'L'), ('lvis16', 'B'), ('image', 'B'), ('imagegen', 'imagegen')])
def test_sizes_of_released_denoisers_follow_from_their_shapes(name, size, golden):
    keys = json.loads((golden/'model'/'keys'/f'dit_{name}.json').read_text())
    state = {k: torch.empty(v[0], device='meta') for k, v in keys['keys'].items()}
    sizes = c.dit_sizes(state, True, keys['denoiser'].get('grid_size'))
    assert sizes == {k: v for k, v in keys['denoiser'].items() if k in sizes} | dict(grid_size=keys['denoiser'].get('grid_size'))
    with torch.device('meta'): assert {k: list(v.shape) for k, v in DiT(**sizes).state_dict().items()} == {k: v[0] for k, v in keys['keys'].items()}
    assert c.name_of_sizes(sizes | dict(), c.DIT_SIZES) == f'size {size}'


@pytest.mark.parametrize('name, size', [('full_vecsetx_ckpt_model', 'released'), ('learnable_vec1024x32_dim1024_depth24_nb', 'learnable'), ('learnable_vec1024_dim1024_depth24', 'learnable_identity')])
def test_sizes_of_released_autoencoders_follow_from_their_shapes(name, size, golden):
    keys = json.loads((golden/'model'/'keys'/f'ae_{name}.json').read_text())['keys']
    found = c.split_parts({k: torch.empty(v[0], device='meta') for k, v in keys.items()})
    assert not found.ignored and len(found.parts['vecset']) == len(keys)
    with torch.device('meta'): made = VecSet(**c.released_config(found.parts['vecset']))
    assert {k: list(v.shape) for k, v in made.state_dict().items()} == {k: v[0] for k, v in keys.items()}
    assert c.name_of_sizes(dict(made.config, num_inputs=8192), c.VECSET_SIZES) == f'size {size}'


def test_released_networks_answer_the_same_after_conversion(golden, tmp_path):
    def reference(name):
        with safe_open(golden/'model'/f'{name}.safetensors', 'pt') as f: return {k: f.get_tensor(k) for k in f.keys()}
    dit, ae = reference('dit_class'), reference('ae_dim64')
    state = {f'model.{k[3:]}': v for k, v in dit.items() if k.startswith('sd.')} | {f'cond_stage_model.{k[8:]}': v for k, v in dit.items() if k.startswith('cond_sd.')}
    state |= {f'first_stage_model.{k[3:]}': v for k, v in ae.items() if k.startswith('sd.')} | {'z_scale_factor': torch.tensor(1.37)}
    c.convert(deepspeed(tmp_path, state), tmp_path/'model', num_latents=32)
    made = load_pipeline(tmp_path/'model')
    with torch.no_grad():
        assert (made.dit(dit['x'], dit['t'], made.conditioner.encode(dit['labels'].tolist())) - dit['out']).abs().max() < 2e-5
        assert (made.vecset.encode(ae['points']) - ae['latents']).abs().max() < 2e-5
        assert (made.vecset.decode(ae['latents'], ae['queries']) - ae['sdf']).abs().max() < 2e-5


# ---------------------------------------------------------------------------------------------------------------- repositories

def test_repositories(state, tmp_path, monkeypatch):
    import huggingface_hub as hub
    (tmp_path/'snapshot'/'class').mkdir(parents=True)
    lightning(tmp_path/'snapshot'/'class', state)
    asked, listed = [], ['README.md', 'class/last.ckpt']
    monkeypatch.setattr(hub, 'snapshot_download', lambda repo, revision=None, allow_patterns=None: asked.append((repo, revision, allow_patterns)) or str(tmp_path/'snapshot'))
    monkeypatch.setattr(hub.HfApi, 'list_repo_files', lambda self, repo, revision=None: listed)
    assert c.fetch_checkpoint('someone/model', revision='abc') == tmp_path/'snapshot'/'class'/'last.ckpt'
    assert asked[-1][:2] == ('someone/model', 'abc') and 'class/last.ckpt' in asked[-1][2]
    assert c.read_checkpoint(c.fetch_checkpoint('someone/model', 'class')).layout == 'file'
    listed.append('text/last.ckpt')
    with pytest.raises(InputError, match='2 checkpoint files; say which of: class/last.ckpt, text/last.ckpt'): c.fetch_checkpoint('someone/model')
    with pytest.raises(InputError, match='this one leaves it'): c.fetch_checkpoint('someone/model', '../../x')
    assert c.fetch_checkpoint('Zbalpha/VecSetX').name == 'checkpoint-110.pth'

    def unreachable(*a, **k): raise ConnectionError('no network')
    monkeypatch.setattr(hub, 'snapshot_download', unreachable)
    with pytest.raises(InputError, match='hf download someone/model class/last.ckpt --revision abc --local-dir FOLDER'): c.fetch_checkpoint('someone/model', 'class/last.ckpt', 'abc')
    monkeypatch.setattr(hub.HfApi, 'list_repo_files', unreachable)
    for name in ('pudashi/3DGenMem', 'someone/model'):
        with pytest.raises(InputError, match=f'hf download {name} --local-dir FOLDER'): c.open_pipeline(name)
