"""Latents: killed and resumed, damaged and foreign folders, the paper's files, scales, turned copies, pictures."""
import json, os, pickle, signal, subprocess, sys, time

os.environ.setdefault('HF_HUB_OFFLINE', '1')
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('diffusers')

from memkit.core import InputError, sha256_of
from memkit.latents import (LatentSet, decode_pictures, encode_clouds, encode_picture_set, encode_pictures, encode_set, encoder_record, load_vae, picture_grid, picture_tokens,
                            point_source, read_latents, tiny_vae, train_tiny_vae, turn_about_y, write_shards, z_scale)
from memkit.vecset import VecSet

ROOT = Path(__file__).resolve().parents[1]


pytestmark = pytest.mark.usefixtures('one_thread')


def toy(seed=0, **how):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VecSet(**dict(dim=64, depth=1, num_latents=8, latent_dim=4, num_inputs=64, eps_profile='vecsetx') | how).eval()


def clouds(n, points=100): return [(f's{i}', np.random.default_rng(i).normal(size=(points, 3)).astype(np.float32)) for i in range(n)]


def hashes(folder): return {p.name: sha256_of(p) for p in sorted(Path(folder).iterdir())}


SCRIPT = '''
import sys, time, types
sys.path.insert(0, {tests!r})
from test_latents import clouds, encode_set, toy
class Slow:
    def __init__(self, pts): self.pts = pts
    def __array__(self, dtype=None, copy=None):
        print('reading', flush=True); time.sleep({pause}); return self.pts
encode_set(toy(), [(k, Slow(p)) for k, p in clouds(10)], {out!r}, yaws=(0., 90.), n_points=64, shard=2, batch_size=2)
'''


def test_killed_and_resumed(tmp_path):
    whole = encode_set(toy(), clouds(10), tmp_path/'whole', yaws=(0., 90.), n_points=64, shard=2, batch_size=2)
    out = tmp_path/'killed'
    run = subprocess.Popen([sys.executable, '-c', SCRIPT.format(tests=str(ROOT/'tests'), pause=.3, out=str(out))], stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'})
    limit = time.time() + 120
    while len(list(out.glob('latents-*.safetensors'))) < 2 and time.time() < limit: time.sleep(.02)
    run.send_signal(signal.SIGKILL); run.wait(); run.stdout.close()
    made = {p.name: p.stat().st_mtime_ns for p in out.glob('latents-*.json')}
    assert 1 <= len(made) < 5
    with pytest.raises(InputError, match='interrupted, . of 5 shards'): LatentSet(out)
    (out/'.latents-00004-abc.tmp.safetensors').write_bytes(b'half a sha')              # what a kill within a write leaves
    resumed = encode_set(toy(), clouds(10), out, yaws=(0., 90.), n_points=64, shard=2, batch_size=2)
    assert hashes(out) == hashes(tmp_path/'whole') and not list(out.glob('.*'))       # the same bytes, nothing left over
    assert all((out/n).with_suffix('.safetensors').stat().st_mtime_ns <= t for n, t in made.items())   # what was whole has been kept
    assert torch.equal(resumed.sample(7, 3)['x_1'], whole.sample(7, 3)['x_1'])


def test_values_depend_on_id_and_seed_alone(tmp_path):
    vecset, all_of = toy(), clouds(6)
    a = encode_set(vecset, all_of, tmp_path/'a', n_points=64, shard=4, batch_size=1)
    b = encode_set(vecset, all_of[::-1], tmp_path/'b', n_points=64, shard=3, batch_size=1)
    for i in range(6): assert torch.equal(a.raw(i), b.raw(5 - i))
    other = encode_set(vecset, all_of, tmp_path/'c', n_points=64, seed=1)
    assert not torch.equal(a.raw(0), other.raw(0))
    same = point_source([('p', all_of[0][1]), ('q', all_of[0][1])], 64)
    assert not (same.load(0) == same.load(1)).all()                      # each shape draws its own points
    got = a.raw(2)
    pts = torch.from_numpy(point_source(all_of, 64).load(2))[None]
    with torch.no_grad(): assert torch.equal(got, vecset.encode(pts)[0])
    many = encode_set(vecset, all_of, tmp_path/'m', n_points=64, n_latents=12)
    assert many.raw(0).shape == (12, 4)
    with torch.no_grad(): torch.testing.assert_close(many.raw(2), vecset.encode(pts, 12)[0])


def test_turned_copies_are_turned_first(tmp_path):
    vecset, yaws = toy(), (0., 30., 270.)
    data = encode_set(vecset, clouds(2), tmp_path/'t', yaws=yaws, n_points=64)
    pts = point_source(clouds(2), 64).load(1).astype(np.float64)
    for k, yaw in enumerate(yaws):
        from scipy.spatial.transform import Rotation
        turned = Rotation.from_euler('y', yaw, degrees=True).apply(pts).astype(np.float32)
        assert np.abs(turn_about_y(pts, yaw) - turned).max() < 1e-6
        assert (data.raw(1, k) - encode_clouds(vecset, turned[None], 8)[0]).abs().max() < 1e-3
    picks = [next(k for k in range(3) if torch.equal(data.drawn(0, s), data.raw(0, k))) for s in range(60)]
    assert min(picks.count(k) for k in range(3)) >= 10


def test_real_meshes(real_meshes, tmp_path):
    files = {p.stem: p for p in sorted(real_meshes.glob('vase*.off'))[:2]}
    source = point_source(files, 500)
    for i in range(2):
        pts = source.load(i)
        assert pts.dtype == np.float32 and .8 < np.linalg.norm(pts, axis=1).max() <= 1 + 1e-5
    data = encode_set(toy(), files, tmp_path/'real', n_points=500)
    assert data.ids == ['vase0', 'vase1'] and data.raw(0).isfinite().all()


def test_damage_and_strangers(tmp_path):
    out = tmp_path/'d'
    encode_set(toy(), clouds(4), out, n_points=64, shard=2)
    shard, sound = out/'latents-00001.safetensors', (out/'latents-00001.safetensors').read_bytes()
    for broken in (sound[:-40], sound[:200] + b'\0' + sound[201:], b''):
        shard.write_bytes(broken)
        with pytest.raises(InputError, match='latents-00001.safetensors: checksum'): LatentSet(out)
    encode_set(toy(), clouds(4), out, n_points=64, shard=2)
    assert shard.read_bytes() == sound
    for change, word in (dict(seed=1), 'seed'), (dict(n_points=63), 'n_points'), (dict(yaws=(5.,)), 'yaws'), (dict(shard=3), 'shard'), (dict(n_latents=4), 'n_latents'):
        with pytest.raises(InputError, match=f'different: {word} '): encode_set(toy(), clouds(4), out, **dict(n_points=64, shard=2) | change)
    for model in (toy(1), toy(0, eps_profile='3dmem')):
        with pytest.raises(InputError, match='different: encoder'): encode_set(model, clouds(4), out, n_points=64, shard=2)
        with pytest.raises(InputError, match='made by another autoencoder'): LatentSet(out, encoder=model)
    LatentSet(out, encoder=toy())
    index = json.loads((out/'index.json').read_text())
    assert index['complete'] and [s['sha256'] for s in index['shards']] == [sha256_of(out/s['file']) for s in index['shards']]
    with pytest.raises(InputError, match='neither index.json'): LatentSet(tmp_path)


def test_one_bad_shape(tmp_path):
    bad = clouds(3); bad[1] = ('s1', np.full((100, 3), np.nan, np.float32))
    with pytest.raises(InputError, match='s1'): encode_set(toy(), bad, tmp_path/'a', n_points=64)
    data = encode_set(toy(), bad, tmp_path/'a', n_points=64, skip=True)
    assert data.ids == ['s0', 's2'] and 'NaN' in data.failed['s1'] and len(data) == 2
    good = encode_set(toy(), clouds(3), tmp_path/'b', n_points=64)
    assert torch.equal(data.raw(1), good.raw(2)) and torch.equal(data.subset(['s2']).raw(0), good.raw(2))


def test_scales(tmp_path):
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.normal(size=(7, 2, 5, 3)).astype(np.float32))*3
    write_shards(lambda rows: (values[rows], {}), [f'{i}' for i in range(7)], tmp_path/'v', dict(kind='test'), shard=3, labels=list('abcdefg'))
    data = LatentSet(tmp_path/'v')
    assert data.z_scale == pytest.approx(1/np.std(values[:, 0].numpy(), ddof=1), rel=1e-6)
    one = data.subset(['3', '5'])
    assert one.z_scale == pytest.approx(1/np.std(values[[3, 5], 0].numpy(), ddof=1), rel=1e-6) and one.labels == ['d', 'f']
    assert LatentSet(tmp_path/'v', z_scale=2.).sample(1, 0)['x_1'].equal(data.drawn(1, 0)*2)
    drawn = torch.stack([data.drawn(i, 9) for i in (4, 1, 6, 2)]).double().numpy()
    assert data.batch_scale([4, 1, 6, 2], [9]*4) == pytest.approx(1/drawn.std(ddof=1), rel=1e-6)
    assert data.batch_scale([4, 1, 6, 2], [9]*4, ranks=2) == pytest.approx(2/(drawn[:2].std(ddof=1) + drawn[2:].std(ddof=1)), rel=1e-6)
    twin = pickle.loads(pickle.dumps(data))                    # as a loader of another process gets it
    assert torch.equal(twin.sample(6, 5)['x_1'], data.sample(6, 5)['x_1']) and twin.sample(6, 5)['index'] == 6
    state = torch.random.get_rng_state()
    data.sample(0, 1)
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_papers_files(tmp_path):
    for uid in ('a_b', 'c'):
        for k in range(12): torch.save(torch.full((4, 2), float(k)), tmp_path/f'{uid}_aug{k}.pt')
    data = LatentSet(tmp_path, z_scale=1.)
    assert data.ids == ['a_b', 'c'] and data.raw(0, 11)[0, 0] == 11                     # aug10 comes after aug9
    assert len({data.drawn(1, s)[0, 0].item() for s in range(200)}) == 12
    grid = torch.arange(2*3*3.).view(2, 3, 3)
    for k in range(5): torch.save(dict(z=grid + 100*k), tmp_path/f'p_view{k:02d}.pt')
    picture = LatentSet(tmp_path).raw(2)
    assert torch.equal(picture, grid.flatten(1).T + 200)                                 # the middle view, row by row
    class Spy:
        def __reduce__(self): return (os.system, (f'touch {tmp_path}/was-run',))
    torch.save(dict(latents=torch.zeros(4, 2), spy=Spy()), tmp_path/'h_aug0.pt')
    with pytest.raises(InputError, match='nothing in it was run'): read_latents(tmp_path/'h_aug0.pt')
    assert not (tmp_path/'was-run').exists()


def test_pictures_have_the_layout_of_flux():
    tokens = torch.randn(2, 1024, 16, generator=torch.Generator().manual_seed(0))
    grid = picture_grid(tokens)
    assert grid.shape == (2, 16, 32, 32) and torch.equal(grid[1, :, 5, 9], tokens[1, 5*32 + 9]) and torch.equal(picture_tokens(grid), tokens)
    vae = tiny_vae(widths=(8, 16))
    vae.register_to_config(shift_factor=.3, scaling_factor=2.)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    with torch.no_grad(): want = (vae.encode(torch.from_numpy(pictures).permute(0, 3, 1, 2).float()/255*2 - 1).latent_dist.mode() - .3)*2
    got = encode_pictures(vae, pictures, batch_size=2)
    torch.testing.assert_close(got, want.view(3, 4, 16).transpose(1, 2), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(encode_pictures(vae, torch.from_numpy(pictures).permute(0, 3, 1, 2)/255), got)
    with torch.no_grad(): shown = (vae.decode(want/2 + .3).sample/2 + .5).clamp(0, 1)
    assert np.abs(decode_pictures(vae, got).transpose(0, 3, 1, 2)/255 - shown.numpy()).max() <= .5/255 + 1e-6
    for wrong in (pictures[0], pictures.astype(np.int64), torch.full((1, 3, 8, 8), -1.)):
        with pytest.raises(InputError, match='expected .b, h, w, 3. uint8'): encode_pictures(vae, wrong)


def test_a_tiny_vae_learns_and_is_the_same_again(tmp_path):
    rows = np.arange(16)
    pictures = np.stack([np.where(((rows[:, None] - a)**2 + (rows - b)**2 < 20)[..., None], [40, 90, 200], 255) for a in range(4, 12) for b in range(4, 12)]).astype(np.uint8)
    state = torch.random.get_rng_state()
    vae, run = train_tiny_vae(pictures, tmp_path/'run', steps=40, widths=(8, 16))
    again, same = train_tiny_vae(pictures, tmp_path/'same', steps=40, widths=(8, 16))
    losses = run.curve()[:, 1].tolist()
    assert losses == same.curve()[:, 1].tolist() and encoder_record(vae) == encoder_record(again) and torch.equal(state, torch.random.get_rng_state())
    assert losses[-1] < .35*losses[0]
    out = decode_pictures(vae, encode_pictures(vae, pictures))
    assert np.abs(out/255. - pictures/255).mean() < .5*np.abs(pictures/255 - pictures.mean(0)/255).mean()
    assert encode_pictures(vae, pictures).std().item() == pytest.approx(1, abs=1e-3)
    vae.save_pretrained(tmp_path/'vae')
    data = encode_picture_set(load_vae(tmp_path/'vae'), [(f'{i}', np.concatenate(pictures[i:i + 3])) for i in range(4)], tmp_path/'set', views='all')
    assert data.store.copies(0) == 3 and (data.raw(1, 1) - encode_pictures(vae, pictures[2:3])[0]).abs().max() < 1e-4
    middle = encode_picture_set(vae, {f'{i}': np.concatenate(pictures[i:i + 3]) for i in range(4)}, tmp_path/'middle')
    assert (middle.raw(2) - data.raw(2, 1)).abs().max() < 1e-4
    with pytest.raises(InputError, match='damaged.png'):
        (tmp_path/'damaged.png').write_bytes(b'x')
        encode_picture_set(vae, {'a': tmp_path/'damaged.png'}, tmp_path/'y')


def test_lists_of_shapes():
    listed = SimpleNamespace(ids=('s2', 's0'), labels=('x', 'y'), captions={'phrase': ('p', 'q')})
    source = point_source(clouds(4), 10, split=listed)
    assert source.ids == ['s2', 's0'] and source.labels == ['x', 'y'] and (source.load(0) == point_source(clouds(4), 10).load(2)).all()
    with pytest.raises(InputError, match='s9'): point_source(clouds(4), 10, split=SimpleNamespace(ids=('s9',), labels=(), captions={}))
    with pytest.raises(InputError, match='standard deviation'): z_scale(torch.zeros(4))
