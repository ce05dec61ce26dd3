"""Small lists in the formats of the released ones, with every fault of theirs planted. The counts returned are by construction, not by memkit."""
import csv, hashlib, random
from pathlib import Path

CLASSES = ['figurine', 'car_(automobile)', 'sword', 'vase']
POOL = CLASSES + ['Christmas_tree', 'wheel', 'toilet']


def uid(i, xl): return hashlib.sha256(f'shape {i}'.encode()).hexdigest()[:64 if xl else 32]


def write(path, header, rows, crlf):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='', encoding='utf-8') as f:
        csv.writer(f, lineterminator='\r\n' if crlf else '\n').writerows([header, *rows])
    return path


def make_lists(folder):
    "The ten lists of a smaller world: 1,280 test shapes, 3,000 training shapes. Returns what must be found."
    folder, draw = Path(folder), random.Random(7)
    shape = lambda i, names=CLASSES: (uid(i, i % 3 == 0), names[min(int(draw.random()**2*len(names)), len(names) - 1)])
    test = [(*shape(i), f'{"small" if i % 2 else "large"} thing {i % 600}') for i in range(1280)]
    test[100] = (*test[100][:2], '')                   # the empty caption
    test[7] = (*test[7][:2], 'café chair')              # not ASCII
    view = lambda u: f'/PATH/TO/images/{"Objaverse" if len(u) == 32 else "ObjaverseXL"}/{u}/images/model_normalized/sprite_v12.png'
    full = ('model_uid', 'lvis_category', 'cap3d_caption', 'view_path')
    top = lambda name, rows: write(folder/f'{name}.csv', full, [(*r, view(r[0])) for r in rows], False)
    top('top16/test', test)
    val = draw.sample(range(1280), 50)
    top('top16/val', [test[i] for i in val])
    inside = [r for r in draw.sample(test, 300)][:24]
    top('top100/val', mixed := sorted(inside + [(*shape(i, POOL[4:]), f'odd {i}') for i in range(9000, 9026)]))
    part = [test[i] for i in range(1280) if i % 32 < 8][:250]
    rest = [test[i] for i in range(1280) if i % 32 >= 8]
    phrase_val = part[:48] + rest[:2]
    train = [shape(i) for i in range(2000, 5000)]
    phrase = lambda u, c: f'{c.split("_")[0]} {int(u[:4], 16) % 3}'
    for level, words in [('phrase', phrase), ('sentence', lambda u, c: f'A {phrase(u, c)} with "{int(u[:6], 16) % 40}" parts, grey.'), ('paragraph', lambda u, c: f'A {phrase(u, c)} of number {u[:8]}. ' + 'It stands on a grey ground. '*8)]:
        for name, rows in [('train', train)] if level == 'phrase' else []: write(folder/f'{level}/{name}.csv', ('model_uid', 'lvis_category', 'caption'), [(u, c, words(u, c)) for u, c, *_ in rows], True)
        for name, rows in [('val', phrase_val), ('test', part)]: write(folder/f'{level}/{name}.csv', ('model_uid', 'lvis_category', 'caption'), [(u, c, words(u, c)) for u, c, *_ in rows], True)
    known = {phrase(u, c) for u, c in train}
    ids = {r[0] for r in [*test, *train, *mixed]}
    return dict(rows={'top16/test': 1280, 'top16/val': 50, 'top100/val': 50, 'phrase/train': 3000, 'phrase/val': 50, 'phrase/test': 250, 'sentence/val': 50, 'sentence/test': 250, 'paragraph/val': 50, 'paragraph/test': 250},
                distinct=len(ids), xl={'top16/test': sum(len(r[0]) == 64 for r in test), 'phrase/train': sum(len(r[0]) == 64 for r in train)},
                classes={'top16/test': {c: sum(r[1] == c for r in test) for c in CLASSES}},
                shared={('top16/val', 'top16/test'): 50, ('phrase/val', 'phrase/test'): 48, ('phrase/val', 'top16/test'): 50, ('phrase/test', 'top16/test'): 250, ('top100/val', 'top16/test'): 24,
                        ('top16/val', 'phrase/val'): len({test[i][0] for i in val} & {r[0] for r in phrase_val}), ('phrase/train', 'top16/test'): 0, ('phrase/test', 'sentence/test'): 250},
                seen=sum(phrase(u, c) in known for u, c, *_ in part), empty_id=test[100][0])
