"""Describing shapes: pictures of every source, a tiny vision-language model end to end, hostile pictures."""
import csv, json, struct, zlib

import numpy as np
import pytest
from PIL import Image

from memkit.describe import LENGTHS, describe_shapes, find_views, pick_views
from memkit.language import Backend, RecordedReplies, Recorder, Reply, write_recording
from memkit.render import sprite_sheet
from memkit.mesh import save_mesh
from memkit.shapes import shape_set
from memkit.splits import read_split


def tell(shape): return json.dumps({level: shape.caption(level) for level in LENGTHS})


class Truthful(Backend):
    "Knows the captions; keeps the pictures that it is shown."
    batch_size = 3
    def __init__(self, captions): super().__init__('truth'); self.captions, self.shown = captions, {}
    def generate(self, prompts):
        for p in prompts: self.shown[p.key] = p.images
        return self._count(0., [Reply(self.captions[p.key], 100, 50) for p in prompts])


def test_meshes_sheets_and_shapes_show_the_same_views(tmp_path):
    shapes = shape_set(4, seed=6)
    captions = {}
    for i, s in enumerate(shapes):
        key = f'{s.category}_{i:04d}'
        captions[key] = tell(s)
        V, F = s.mesh(64)
        (tmp_path/'sheets'/key/'images'/'model_normalized').mkdir(parents=True)
        Image.fromarray(sprite_sheet(V, F, size=40, color=(170, 170, 170))).save(tmp_path/'sheets'/key/'images'/'model_normalized'/'sprite_v12.png')
        if i % 2: save_mesh(tmp_path/'both'/f'{key}.obj', V, F)
    seen = {}
    for name, source in dict(shapes=shapes, sheets=tmp_path/'sheets').items():
        for policy in ('train', 'val'):
            backend = Truthful(captions)
            report = describe_shapes(source, tmp_path/f'{name}_{policy}.csv', backend, policy, size=40)
            assert report['status'] == dict(done=4)
            seen[name, policy] = backend.shown
    for policy in ('train', 'val'):
        for key in captions:
            a, b = (np.stack(seen[name, policy][key]) for name in ('shapes', 'sheets'))
            assert np.array_equal(a, b) and len(a) == 4
    assert any(not np.array_equal(seen['shapes', 'train'][k], seen['shapes', 'val'][k]) for k in captions)
    one, other = (read_split(tmp_path/f'{name}_train.csv') for name in ('shapes', 'sheets'))
    table = lambda split: {k: t for k, *t in zip(split.ids, *(split.captions[level] for level in LENGTHS))}
    assert table(one) == table(other) and len(table(one)) == 4
    assert dict(zip(one.ids, one.captions['sentence'])) == {k: json.loads(v)['sentence'] for k, v in captions.items()}
    assert one.extra['views'] == tuple(' '.join(map(str, pick_views(k))) for k in one.ids)
    assert list(find_views(tmp_path/'both')) == sorted(k for i, k in enumerate(captions) if i % 2)


def test_a_tiny_model_goes_through_and_its_nonsense_is_recorded(tiny_models, tmp_path):
    from memkit.local_models import LocalModel
    shapes = shape_set(3, seed=6)
    model = LocalModel(tiny_models['vision'], 'vision', device='cpu', max_new_tokens=4, batch_size=2)
    backend = Recorder(model, tmp_path/'said.jsonl')
    report = describe_shapes(shapes, tmp_path/'out.csv', backend, size=32, attempts=2)
    assert report['status'] == dict(failed=3) and report['speed']['rows'] == 6 and report['speed']['tokens_out'] > 0 and report['model'] == 'vision'
    rejected = list(csv.DictReader(open(tmp_path/'out.rejected.csv', newline='')))
    assert len(rejected) == 3 and all(r['attempts'] == '2' and r['reason'] and r['prompts'] == report['prompts'] for r in rejected)
    assert (tmp_path/'out.csv').read_text().count('\n') == 1
    rows = backend.meter.rows
    assert describe_shapes(shapes, tmp_path/'out.csv', backend, size=32, attempts=2)['status'] == dict(failed=3) and backend.meter.rows == rows, 'failures were asked about again'
    describe_shapes(shapes, tmp_path/'out.csv', backend, size=32, attempts=2, retry_failed=True)
    assert backend.meter.rows == 2*rows
    replay = describe_shapes(shapes, tmp_path/'replayed.csv', RecordedReplies(tmp_path/'said.jsonl'), size=32, attempts=2)
    assert replay['recorded'] and replay['refusals'] == report['refusals']


def png_of(width, height):
    "A PNG that claims a size and holds nothing to speak of."
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(b'\0'*100)) + chunk(b'IEND', b'')


@pytest.mark.parametrize('content, why', [
    (png_of(50_000, 600_000), 'cannot be read'), (png_of(2600, 12*2600), 'expected 12 square tiles'), (png_of(16, 100), 'expected 12 square tiles'),
    (png_of(16, 192), 'cannot be read'), (b'not a picture', 'cannot be read'), (b'', 'cannot be read')], ids=['bomb', 'large', 'no sheet', 'torn', 'text', 'empty'])
def test_hostile_pictures_cost_only_their_row(tmp_path, content, why):
    import re
    shape = shape_set(1, seed=1)[0]
    (tmp_path/'s').mkdir()
    (tmp_path/'s'/'evil.png').write_bytes(content)
    Image.fromarray(np.full((192, 16, 3), 90, np.uint8)).save(tmp_path/'s'/'good.png')
    report = describe_shapes(tmp_path/'s', tmp_path/'out.csv', Truthful(dict(good=tell(shape), evil=tell(shape))))
    assert report['status'] == dict(done=1, failed=1)
    row, = csv.DictReader(open(tmp_path/'out.rejected.csv', newline=''))
    assert row['id'] == 'evil' and re.search(why, row['reason']) and str(tmp_path) not in row['reason']


def test_captions_of_one_look_are_refused_for_what_they_lack(tmp_path):
    shapes = shape_set(6, seed=3)
    ids = [f'{s.category}_{i:04d}' for i, s in enumerate(shapes)]
    good = [json.loads(tell(s)) for s in shapes]
    said = [(ids[0], json.dumps(good[0] | dict(paragraph='Short.'))), (ids[1], json.dumps({k: good[1][k] for k in ('phrase', 'sentence')})), (ids[2], json.dumps(good[2])[:-5]),
            (ids[3], json.dumps(good[3] | dict(phrase='gray 3D model'))), (ids[4], '<think>hm</think>'), (ids[5], '```json\n' + json.dumps(good[5], indent=1) + '\n```')]
    report = describe_shapes(shapes, tmp_path/'out.csv', RecordedReplies(write_recording(tmp_path/'r.jsonl', 'x', 'by hand', said)), size=32, labels={k: k[:-5] for k in ids})
    split = read_split(tmp_path/'out.csv')
    assert split.ids == (ids[3], ids[5]) and split.labels == tuple(k[:-5] for k in split.ids)
    assert dict(zip(split.ids, split.extra['note']))[ids[3]].startswith('about the picture or the surface: gray, 3D model') and split.captions['phrase'][1] == good[5]['phrase']
    reasons = {r['id']: r['reason'] for r in csv.DictReader(open(tmp_path/'out.rejected.csv', newline=''))}
    assert [reasons[k].split(':')[0] for k in (ids[0], ids[1], ids[2], ids[4])] == ['paragraph of wrong length', 'wrong keys', 'no JSON object', 'no JSON object']
    assert sum(report['refusals'].values()) == 3*4 + 3
