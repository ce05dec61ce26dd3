"""The commands that make shapes: every flag of the paper's script is known, help needs no PyTorch, what is wrong is one line, and the way from a checkpoint or from nothing to meshes works."""
import csv, json, os, subprocess, sys

import pytest

from memkit import cli_make as m
from memkit.cli import main
from memkit.core import InputError

FLAGS = '''--config --ckpt --csv --num_samples --out_dir --batch_size --seed --device --dtype --output_type --overwrite --class_id --text --image_path --lvis_mapping_json
--cond_from_ckpt_mode --guidance_scale --no_ema --torch_compile --allow_missing_conditioner --manifest --z_scale_factor --auto_z_from_std --calib_latents
--calib_surface_dir --calib_take --image_views --image_pick --image_index'''.split()   # of the paper's inference.py


def options(*path):
    import typer
    command = typer.main.get_command(m.app)
    for name in path: command = command.commands[name]
    return {o: p for p in command.params for o in (*p.opts, *p.secondary_opts)}


def test_every_flag_of_the_paper_is_known_in_both_spellings():
    known = options('generate')
    assert not [f for f in FLAGS if f not in known]
    shown = {f for f in FLAGS if not known[f].hidden}
    assert set(FLAGS) - shown == {'--config', '--cond_from_ckpt_mode', '--allow_missing_conditioner', '--no_ema'}
    assert not [f for f in shown if '_' in f and f.replace('_', '-').replace('--', '--', 1) not in known]
    defaults = {f: known[f].default for f in ('--batch_size', '--seed', '--guidance_scale', '--n_steps', '--resolution', '--calib_take')}
    assert defaults == {'--batch_size': 4, '--seed': 0, '--guidance_scale': 5., '--n_steps': 50, '--resolution': 256, '--calib_take': 8}
    assert str(known['--out_dir'].default) == 'samples'


def test_help_and_missing_libraries_without_torch():
    code = '''
import sys
for name in ('torch', 'diffusers', 'transformers', 'safetensors'): sys.modules[name] = None
from memkit.cli import main
for args in (['--help'], ['convert', '--help'], ['train', '--help'], ['train', 'autoencoder', '-h'], ['train', 'denoiser', '-h'], ['encode', '--help'], ['generate', '--help'],
             ['convert', 'x.ckpt', '--out', 'y'], ['generate', '--model', 'x'], ['encode', 'builtin:1', '--vecset', 'v', '--out', 'l'], ['train', 'autoencoder', 'builtin:1', '--out', 'r']):
    try: main(args)
    except SystemExit as e: print('exit', e.code)
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | dict(COLUMNS='120'))
    assert [l for l in done.stdout.splitlines() if l.startswith('exit ')] == ['exit 0']*7 + ['exit 2']*4, done.stderr
    assert all(word in done.stdout for word in ('convert', 'train', 'encode', '--guidance_scale', '--csv', 'autoencoder'))
    assert done.stderr.strip().splitlines() == ['memkit: this command needs torch, which is not installed: pip install "memkit[make]"']*4


# ---------------------------------------------------------------------------------------------------------------- with PyTorch

@pytest.fixture(scope='module')
def torch():
    torch = pytest.importorskip('torch')
    pytest.importorskip('diffusers')
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def checkpoint(torch, tmp_path_factory):
    "A Lightning checkpoint of a class model, as the paper's trainer writes it."
    from memkit.conditions import ClassTable
    from memkit.dit import DiT
    from memkit.vecset import VecSet
    from memkit.weights import random_weights
    nets = {'model': DiT(in_channels=4, hidden_size=32, depth=2, num_heads=2, context_dim=8, num_moe_layers=1), 'cond_stage_model': ClassTable(16, 8),
            'first_stage_model.autoencoder': VecSet(dim=64, depth=1, num_latents=16, latent_dim=4, num_inputs=128, frequencies=2)}
    tags = {'model': 'dit', 'cond_stage_model': 'table', 'first_stage_model.autoencoder': 'f'}
    state = {}
    for prefix, net in nets.items():
        weights = random_weights({k: tuple(v.shape) for k, v in net.state_dict().items() if k != 'point_embed.basis'}, tags[prefix])
        state |= {f'{prefix}.{k}': weights.get(k, v) for k, v in net.state_dict().items()}
    state['first_stage_model.autoencoder.to_outputs.1.bias'] -= .2
    path = tmp_path_factory.mktemp('released')/'class.ckpt'
    torch.save(dict(state_dict=state | {'z_scale_factor': torch.tensor(1.37)}), path)
    return path


@pytest.fixture(scope='module')
def model(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp('converted')/'model'
    assert run('convert', checkpoint, '--out', out, '--num_latents', 16)[0] == 0
    return out


def run(*args, capsys=None):
    with pytest.raises(SystemExit) as e: main([str(a) for a in args])
    said = capsys.readouterr() if capsys else None
    return e.value.code, said and said.out, said and said.err


QUICK = ('--device', 'cpu', '--n_steps', 3, '--resolution', 16)


def test_the_flags_of_the_paper(model, tmp_path, capsys):
    code, out, err = run('generate', '-c', 'configs/LVIS-16.yaml', '--ckpt', model, '--class_id', 2, '--num_samples', 3, '--out_dir', tmp_path/'o', '--batch_size', 2, '--seed', 11, '--dtype', 'fp32',
                         '--output_type', 'trimesh', '--guidance_scale', 5., '--no_ema', '--cond_from_ckpt_mode', 'auto', '--manifest', tmp_path/'m.csv', *QUICK, capsys=capsys)
    assert code in (0, 1) and [l.split()[1] for l in err.splitlines() if 'has no effect' in l] == ['--config', '--cond_from_ckpt_mode', '--no_ema']
    rows = list(csv.DictReader(open(tmp_path/'m.csv')))
    assert [r['out_path'] for r in rows] == [f'class_2/sample_000000{i}.glb' for i in range(3)] and [(r['cond_type'], r['cond_id'], r['seed'], r['batch_size']) for r in rows] == [('class', '2', str(11 + i), '2') for i in range(3)]
    good = [r for r in rows if r['ok'] == 'True']
    assert good and all((tmp_path/'o'/r['out_path']).is_file() for r in good) and f'{len(good)} of 3 samples' in out
    assert code == (len(good) < 3) and err.count('no mesh: ') == 3 - len(good)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/'o').rglob('*.glb')}
    run('generate', '--model', model, '--class', 2, '-n', 3, '--out', tmp_path/'o', '--seed', 11, '--manifest', tmp_path/'m.csv', *QUICK)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path/'o').rglob('*.glb')} == before                                   # what is there is not made again


def test_a_table_of_classes_by_name(model, tmp_path, capsys):
    (tmp_path/'t.csv').write_text('model_uid,lvis_category\nu1,chair\nu2,vase\n')
    code, out, err = run('generate', '--model', model, '--csv', tmp_path/'t.csv', '--out', tmp_path/'o', '--output_type', 'pt', *QUICK, capsys=capsys)
    assert (code, err) == (0, '') and sorted(p.name for p in (tmp_path/'o').iterdir()) == ['manifest.csv', 'settings.json', 'u1.pt', 'u2.pt']
    (tmp_path/'map.json').write_text('{"chair": 15, "vase": 2}')
    assert run('generate', '--model', model, '--csv', tmp_path/'t.csv', '--lvis_mapping_json', tmp_path/'map.json', '--out', tmp_path/'p', '--output_type', 'latents', *QUICK)[0] == 0
    assert (tmp_path/'p'/'u1.pt').read_bytes() != (tmp_path/'o'/'u1.pt').read_bytes()
    settings = [json.loads((tmp_path/k/'settings.json').read_text()) for k in 'op']
    assert settings[0] == settings[1] and settings[0]['guidance_scale'] == 5.


def test_scales(model, torch, tmp_path):
    torch.save(torch.tensor([[0., 2.], [4., 6.]]), tmp_path/'z.pt')
    got = {}
    for name, flags in dict(own=(), given=('--z_scale_factor', 2.74), measured=('--auto_z_from_std', '--calib_latents', tmp_path/'z.pt')).items():
        assert run('generate', '--model', model, '--class', 2, '--out', tmp_path/name, '--output_type', 'pt', *flags, *QUICK)[0] == 0
        got[name] = torch.load(tmp_path/name/'class_2'/'sample_0000000.pt', weights_only=True)
    assert torch.allclose(got['given']*2, got['own']) and torch.allclose(got['measured'], got['own']*1.37*torch.tensor([0., 2, 4, 6]).std(), atol=1e-5)


@pytest.mark.parametrize('args, message', [
    (['--class', '16'], 'class 16: expected a number from 0 to 15 or one of box'),
    (['--class', 'boat'], "class 'boat': expected a number"),
    (['--text', 'a chair'], 'this model is conditioned by class'),
    ([], 'expected --class or --csv'),
    (['--class', '1', '--csv', 'x.csv'], '--class, --csv: expected one of them'),
    (['--csv', 'gone.csv'], 'gone.csv: cannot be read as CSV'),
    (['--class', '1', '--output_type', 'voxels'], 'expected mesh or latents'),
    (['--class', '1', '--dtype', 'fp8'], "dtype 'fp8'"),
    (['--class', '1', '--method', 'rk4'], "method 'rk4': expected euler, heun"),
    (['--class', '1', '--z_scale_factor', '-1'], '--z_scale_factor -1.0: expected a positive number'),
    (['--class', '1', '--auto_z_from_std'], 'calibration: expected latents or a folder of meshes'),
    (['--class', '1', '--device', 'cuda:7'], 'device cuda:7: PyTorch sees none'),
])
def test_what_is_wrong_is_one_line(args, message, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run('generate', '--model', model, *(['--device', 'cpu'] if '--device' not in args else []), *args, capsys=capsys)
    assert code == 2 and err.startswith('memkit: ') and message in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path/'samples').exists()


def test_models_that_are_not_there(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import huggingface_hub as hub
    def unreachable(*a, **k): raise ConnectionError('no network')
    for name in ('snapshot_download', 'hf_hub_download'): monkeypatch.setattr(hub, name, unreachable)
    monkeypatch.setattr(hub.HfApi, 'list_repo_files', unreachable)
    for args, message in ((['generate', '--model', 'pudashi/3DGenMem', '--class', 1], 'hf download pudashi/3DGenMem --local-dir FOLDER'), (['generate', '--model', 'nowhere', '--class', 1], 'no such file or folder'),
                          (['convert', 'Zbalpha/VecSetX', '--out', 'm'], 'hf download Zbalpha/VecSetX point_vec1024x32_dim1024_depth24_sdf_nb/checkpoint-110.pth'), (['convert', 'nothing.ckpt', '--out', 'm'], 'no such file or folder'),
                          (['convert', checkpoint, '--out', 'm', '--condition', 'smell'], 'expected class, text, image or none'), (['encode', 'builtin:2', '--vecset', 'nowhere', '--out', 'l'], 'no such file or folder'),
                          (['train', 'autoencoder', 'nowhere', '--out', 'r'], 'no such folder'), (['train', 'denoiser', 'nowhere', '--out', 'r'], 'nowhere'), (['train', 'autoencoder', 'builtin:1', '--out', 'r', '--set', 'stepz=1'], 'stepz')):
        code, out, err = run(*args, capsys=capsys)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1, (args, err)
    assert not list(tmp_path.iterdir())


def test_from_nothing_to_a_mesh(tmp_path, capsys, torch):
    sets = lambda *words: [x for w in words for x in ('--set', w)]
    for args in (['train', 'autoencoder', 'builtin:4:mug,vase', '--out', tmp_path/'ae', *sets('steps=30', 'batch_size=4', 'warmup=2', 'sizes.dim=32', 'sizes.depth=1', 'sizes.num_latents=8', 'tensorboard=false')],
                 ['encode', 'builtin:4:mug,vase', '--vecset', tmp_path/'ae', '--out', tmp_path/'z', '--yaws', '0,90', '--device', 'cpu'],
                 ['train', 'denoiser', tmp_path/'z', '--vecset', tmp_path/'ae', '--out', tmp_path/'gen', *sets('steps=4', 'batch_size=4', 'train.tensorboard=false', 'train.sample_every=0', 'train.valid_every=0', 'dit.hidden_size=32', 'dit.depth=2', 'dit.num_moe_layers=0')],
                 ['generate', '--model', tmp_path/'gen', '--class', 'vase', '--out', tmp_path/'s', '--format', 'ply', *QUICK]):
        code, out, err = run(*args, capsys=capsys)
        assert code == 0 or (args[0] == 'generate' and code == 1 and 'no surface' in err), err
    rows = list(csv.DictReader(open(tmp_path/'s'/'manifest.csv')))
    assert [(r['cond_id'], r['out_path']) for r in rows] == [('vase', 'class_vase/sample_0000000.ply')]
    again = run('train', 'denoiser', tmp_path/'z', '--vecset', tmp_path/'ae', '--out', tmp_path/'gen', *sets('train.steps=4', 'train.batch_size=3'), capsys=capsys)
    assert again[0] == 2 and 'batch_size' in again[2]   # another configuration does not go on in the same folder
    for args, message in ((['generate', '--model', tmp_path/'ae', '--out', tmp_path/'no'], 'ae: a run of `memkit train autoencoder`, which draws nothing by itself'),
                          (['convert', tmp_path/'gen', '--out', tmp_path/'no'], 'gen: a model of memkit already'),
                          (['train', 'denoiser', tmp_path/'z', '--out', tmp_path/'no', *sets('stepz=4')], '--set stepz: expected steps, batch_size'),
                          (['train', 'denoiser', tmp_path/'z', '--out', tmp_path/'no', '--condition', 'text', '--clip', tmp_path/'z'], 'expected a CLIP folder of transformers')):
        code, out, err = run(*args, capsys=capsys)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1, (args, err)
    assert not (tmp_path/'no').exists()


def test_pictures_of_prepared_shapes_are_a_condition(tmp_path, capsys, torch):
    pytest.importorskip('igl')
    from memkit.clip import tiny_clip
    clip, quiet = tiny_clip(tmp_path/'clip'), [x for w in ('steps=4', 'batch_size=4', 'train.tensorboard=false', 'train.sample_every=0', 'train.valid_every=2', 'dit.hidden_size=32', 'dit.depth=2', 'dit.num_moe_layers=0') for x in ('--set', w)]
    prepared = ['--n-vol', 64, '--n-near', 64, '--n-surface', 256, '--views', 3, '--size', 32, '--jobs', 1]
    train = ['train', 'denoiser', tmp_path/'z', '--vecset', tmp_path/'ae', '--condition', 'image', '--clip', clip]
    for args in (['data', 'prepare', '--shapes', 6, '--out', tmp_path/'p', *prepared],
                 ['train', 'autoencoder', 'builtin:4:mug,vase', '--out', tmp_path/'ae', *(x for w in ('steps=4', 'batch_size=4', 'sizes.dim=32', 'sizes.depth=1', 'sizes.num_latents=8', 'tensorboard=false') for x in ('--set', w))],
                 ['encode', tmp_path/'p', '--vecset', tmp_path/'ae', '--out', tmp_path/'z', '--device', 'cpu'],
                 [*train, '--out', tmp_path/'gen', '--pictures', tmp_path/'p', '--valid', tmp_path/'z', *quiet]):
        code, out, err = run(*args, capsys=capsys)
        assert code == 0, err
    sprite = next((tmp_path/'p'/'sprites').iterdir())
    assert run('generate', '--model', tmp_path/'gen', '--image', sprite, '--out', tmp_path/'s', '--output_type', 'latents', *QUICK)[0] == 0
    for args, message in ((train, 'expected --pictures FOLDER'), ([*train, '--pictures', tmp_path/'z'], 'z: not a prepared folder'),
                          (['train', 'denoiser', tmp_path/'z', '--condition', 'class', '--pictures', tmp_path/'p'], '--pictures: the condition is class')):
        code, out, err = run(*args, '--out', tmp_path/'no', capsys=capsys)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1, (args, err)
    assert not (tmp_path/'no').exists()
