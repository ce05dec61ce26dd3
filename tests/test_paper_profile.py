"""The profile `paper`: its recipe for a cluster names commands and options that exist, its plan says what is missing, and its stages run on prepared shapes at a toy size."""
import json
import re
import subprocess
import threading
from pathlib import Path

import pytest

pytest.importorskip('torch')
pytest.importorskip('diffusers')
pytest.importorskip('igl')
from typer.testing import CliRunner

from memkit.cli import app
from memkit import experiment
from memkit.autoencoder import train_vecset
from memkit.clip import tiny_clip
from memkit.core import InputError, Profile, load_profile
from memkit.denoiser import RECIPES
from memkit.experiment import VAE, preset_step, record_pairs, run_experiment
from memkit.isolated import run_isolated
from memkit.latents import FLUX_VAE, tiny_vae
from memkit.paper import paper_needs, require
from memkit.prepare import Recipe, prepare
from memkit.presets import EXPERIMENTS, base_preset, experiment_rows, listed_shapes, take_shapes
from memkit.runs import load_checkpoint
from memkit.shapes import shape_set
from memkit.splits import write_split, Split
from memkit.stages import POINTS, shape_prompts
from memkit.steps import all_steps, run_step, step_done, step_summary

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r'```bash\n(.*?)```', ''.join(''.join(c['source']) for c in json.loads((ROOT/'nbs'/'74_paper.ipynb').read_text(encoding='utf-8'))['cells']), re.S)

pytestmark = pytest.mark.usefixtures('one_thread')


def test_recipes_are_bash():
    assert len(BLOCKS) == 4
    for block in BLOCKS: assert subprocess.run(['bash', '-n'], input=block, text=True, capture_output=True).stderr == ''


@pytest.mark.parametrize('line', [l for b in BLOCKS for l in b.splitlines() if l.startswith('memkit ')])
def test_recipes_name_what_exists(line):
    words = line.split('#')[0].split()[1:]
    command = words[:2] if words[0] in ('data', 'captions', 'train') else words[:1]
    shown = CliRunner().invoke(app, [*command, '--help'], env=dict(COLUMNS='300', TERM='dumb')).output
    options = [w for w in words if w.startswith('--')]
    assert options and all(re.search(rf'{w}\b', shown) for w in options)


def test_array_names_the_experiments_of_the_profile():
    names = re.search(r'ALL=\((.*?)\)', ''.join(BLOCKS))[1].split()
    assert int(re.search(r'--array=0-(\d+)', ''.join(BLOCKS))[1]) == len(names) - 1
    for name in names: assert experiment_rows(name, load_profile('paper'))


def test_what_is_missing_is_named_before_anything_runs(monkeypatch):
    for k in ('MEMKIT_PREPARED', 'MEMKIT_LISTS', 'MEMKIT_AUTOENCODER', 'MEMKIT_VAE', 'MEMKIT_CLIP'): monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv('HF_HUB_CACHE', '/nonexistent')
    with pytest.raises(InputError, match='MEMKIT_PREPARED is not set'): require(load_profile('paper'))
    shown = CliRunner().invoke(app, ['reproduce', '--profile', 'paper', '--dry-run', 'fig_guidance'])
    assert 'MEMKIT_PREPARED is not set' in shown.output and 'train w = 1, seed 0' in shown.output and 'GPU days' in shown.output
    with pytest.raises(InputError, match='are missing'):
        from memkit.reproduce import reproduce
        reproduce(['fig_guidance'], 'paper')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Built-in shapes as a prepared folder and as released lists would have them; small networks where the released ones would be."
    root, shapes = tmp_path_factory.mktemp('paper'), shape_set(24, seed=5)
    ids = list(prepare(shapes, root/'prepared', Recipe(n_vol=64, n_near=64, n_surface=256, views=2, size=64), n_jobs=1).ids)
    at = {f'{s.category}-{s.seed}': s for s in shapes}
    for part, some in dict(train=ids[:16], test=ids[16:]).items():
        for level in ('phrase', 'sentence', 'paragraph'):
            path = root/'lists'/level/f'{part}.csv'
            path.parent.mkdir(parents=True, exist_ok=True)
            write_split(Split('x', tuple(some), tuple(at[i].category for i in some), {level: tuple(at[i].caption(level) for i in some)}), path)
        (root/'lists'/'top100').mkdir(exist_ok=True)
        rows = '\n'.join(f'{i},{at[i].category},a {at[i].category}' for i in some)
        (root/'lists'/'top100'/f'{part}.csv').write_text(f'uid,lvis_category,cap3d_caption\n{rows}\n', encoding='utf-8')
    train_vecset(take_shapes('autoencoder', 6), root/'run', verbose=False, steps=12, sample_every=0, tensorboard=False, data=dict(n_points=POINTS))
    tiny_vae(16, (16, 32, 32, 32)).save_pretrained(root/'vae')
    tiny_clip(root/'clip')
    return root


@pytest.fixture
def prepared(folder, monkeypatch):
    monkeypatch.setenv('MEMKIT_PREPARED', str(folder/'prepared'))
    monkeypatch.setenv('MEMKIT_LISTS', str(folder/'lists'))


def test_lists_are_cut_by_hash_and_share_nothing(prepared):
    train, test, fresh = (listed_shapes(w, n) for w, n in dict(train=8, test=4, fresh=4).items())
    assert not set(train.split.ids) & (set(fresh.split.ids) | set(test.split.ids)) and len(fresh) == 4
    assert listed_shapes('train', 4).split.ids == train.split.ids[:4]
    assert shape_prompts('sentence', test) == list(test.split.captions['sentence']) and len(shape_prompts('image', test)) == 4
    with pytest.raises(InputError, match='16 of the 16 shapes .* expected at least 17'): listed_shapes('train', 17)


TOY = Profile('toy', dict(load_profile('paper').values, device='cpu', train_shapes=4, n_test=4, n_gen=2, steps=2, batch_size=4, cells=12, draw_steps=2, n_latents=8, text='bytes', hidden=0, bits_of=8))


@pytest.fixture
def released(folder, prepared, monkeypatch):
    for name, where in dict(AUTOENCODER='run/vecset', VAE='vae', CLIP='clip').items(): monkeypatch.setenv(f'MEMKIT_{name}', str(folder/where))
    monkeypatch.setattr(experiment, '_recipe', lambda preset: 'tiny')


def test_the_chain_runs_on_prepared_shapes(released):
    record = run_experiment(base_preset(TOY), TOY)
    assert record['data'] == 'prepared' and record['n'] <= 4 and record['preset']['condition'] == 'sentence'
    assert any(s.function.endswith('train_recipe') for s in all_steps([preset_step(base_preset(TOY), TOY, 0)]))


def test_pictures_condition_and_are_learnt_from_prepared_shapes(released):
    row, = [r for r in experiment_rows('fig_conditioning', TOY) if r.condition == 'image']
    record = run_experiment(row, TOY)
    assert record['preset']['condition'] == 'image' and record['protocol']['distance'] == 'lfd'
    pictures, shapes = experiment_rows('fig_modality', TOY)
    assert (pictures.families, shapes.families) == (100, 100)   # whose captions are of one kind
    record = run_experiment(pictures, TOY)
    assert record['protocol']['distance'] == 'pixels' and (record['m'], record['n'], record['n_train']) == (2, 4, 4)
    gen, train, d = record_pairs(record)
    assert gen[0].shape == train[0].shape == (64, 64, 3) and d == sorted(record['d_gen'])
    assert run_experiment(shapes, TOY)['preset']['families'] == 100
    bits = experiment._bits_step(TOY)
    run_step(bits)
    bits = step_summary(bits)['bits']
    assert 0 < bits['class'] <= bits['image'] == 3


def test_where_the_networks_are_looked_for():
    assert VAE == FLUX_VAE
    assert {experiment._recipe(r) for n in EXPERIMENTS for r in experiment_rows(n, load_profile('paper'))} <= set(RECIPES)
    assert experiment._recipe(experiment_rows('fig_modality', load_profile('paper'))[0]) == 'imagegen'


def test_a_recipe_that_is_asked_to_stop_saves_what_it_has(released):
    "The end of a cluster's job is announced by SIGTERM, to the step; the training is a process below it."
    long = Profile('long', dict(TOY.values, steps=100_000))
    step = experiment.generator_step(base_preset(long), long, 0)
    for s in step.inputs.values(): run_step(s)
    stop, run = threading.Event(), step.folder.with_name(f'{step.folder.name}.part')/'run'
    def tick():
        if (run/'metrics.jsonl').is_file() and (run/'metrics.jsonl').stat().st_size: stop.set()
    assert run_isolated(step, stop=stop, tick=tick) == 'stopped'
    assert not step_done(step) and 10 <= load_checkpoint(run).step < 5000
