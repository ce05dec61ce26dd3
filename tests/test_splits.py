"""Lists of shapes: the traps of the released ones planted in small copies, hostile files, subsets that stay."""
import collections, json, math, os, subprocess, sys, time
from pathlib import Path

import pytest
from hypothesis import example, given, settings, strategies as st

from memkit.cards import differences, measure_released, released_statistics
from memkit.core import InputError
from memkit.leakage import check_splits
from memkit.splits import RELEASED, Split, read_split, released_split, write_split
from released_like import make_lists


def memkit(*args, **kw): return subprocess.run([sys.executable, '-m', 'memkit', *map(str, args)], capture_output=True, text=True, timeout=120, **kw)


@pytest.fixture(scope='module')
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp('lists')
    return folder, make_lists(folder)


@pytest.fixture(scope='module')
def report(planted): return check_splits(*(released_split(n, planted[0]) for n in RELEASED))


def test_counts_are_those_that_were_planted(planted, report):
    truth, f = planted[1], report.facts
    assert {k: v['rows'] for k, v in f.items()} == truth['rows'] and all(v['distinct'] == v['rows'] for v in f.values())
    assert report.distinct == truth['distinct'] and not report.conflicts
    assert {k: f[k]['kinds']['objaverse-xl'] for k in truth['xl']} == truth['xl']
    assert f['top16/test']['classes'] == truth['classes']['top16/test']
    assert f['top16/test']['line_ends'] == 'LF' and f['phrase/train']['line_ends'] == 'CRLF'
    assert list(f['top16/test']['captions']) == ['cap3d'] and list(f['sentence/val']['captions']) == ['sentence'], 'the same level under both names of the column'
    assert f['top16/test']['captions']['cap3d']['empty'] == 1 and f['top16/test']['captions']['cap3d']['not_ascii'] == 1


def test_overlaps_and_patterns_are_found(planted, report):
    found = {frozenset((o['a'], o['b'])): o for o in report.overlaps}
    for pair, n in planted[1]['shared'].items(): assert found.get(frozenset(pair), dict(shared=0))['shared'] == n, pair
    part = found[frozenset(('phrase/test', 'top16/test'))]
    assert part['pattern'] == dict(modulus=32, remainders=list(range(8)), filled=1., last=part['pattern']['last']) and part['same_order']
    assert found[frozenset(('top100/val', 'top16/test'))]['by_class'] and not found[frozenset(('top16/val', 'phrase/val'))]['by_class']
    assert found[frozenset(('phrase/test', 'paragraph/test'))]['same_rows']
    assert found[frozenset(('top16/val', 'top16/test'))]['pattern'] is None, 'a random half is no pattern'
    said = '\n'.join(map(str, report.findings))
    assert 'fault: top16/val and top16/test: 50 shapes (100.0% of the validation list)' in said
    assert 'modulo 32 is 0 to 7' in said and planted[1]['empty_id'] in said and 'two different lists of the same name' in said
    assert not report.ok
    seen = {(s['a'], s['level']): s['n'] for s in report.seen}
    assert seen['phrase/test', 'phrase'] == planted[1]['seen']


def test_patterns_are_periodic_and_random_samples_are_not():
    import numpy as np
    from memkit.leakage import slice_pattern
    assert slice_pattern(range(0, 200, 2), 200)['modulus'] == 2 and slice_pattern([i for i in range(900) if i % 12 in (1, 5, 7, 8, 10, 11)], 900)['modulus'] == 12
    rng = np.random.default_rng(0)
    assert not [1 for _ in range(100) if slice_pattern(np.sort(rng.choice(500, 60, replace=False)), 500)]


def test_a_planted_leak_and_a_conflict_are_faults(planted):
    train, test = released_split('phrase/train', planted[0]), released_split('phrase/test', planted[0])
    assert check_splits(train, test).ok
    leak = Split('phrase/train', train.ids + test.ids[:3], train.labels + ('wheel',)*3)
    faults = [str(f) for f in check_splits(leak, test).findings if f.kind == 'fault']
    assert any('3 shapes are in both: what is held out has been trained on' in f for f in faults) and any('3 shapes have two labels' in f for f in faults)
    twice = Split('test', test.ids + test.ids[:2])
    assert any('2 ids stand more than once' in str(f) for f in check_splits(twice).findings)


def test_levels_are_joined_by_id_and_a_carved_val_leaks_nothing(planted):
    both = released_split('phrase+sentence+paragraph/test', planted[0])
    assert set(both.captions) == {'phrase', 'sentence', 'paragraph'} and all(c[0].startswith(f'A {p}') for p, c in zip(both.captions['phrase'], zip(both.captions['sentence'])))
    train, val = released_split('phrase/train', planted[0]).carve_val(300)
    test = released_split('top16/test', planted[0])
    assert check_splits(train, val, test).ok and len(val) == 300
    full, got = collections.Counter(train.labels) + collections.Counter(val.labels), collections.Counter(val.labels)
    assert all(abs(got[c] - .1*n) < 1 for c, n in full.items()), 'Webster keeps every class within one seat'
    small = Split('s', tuple(f'id{i}' for i in range(100)), ('a',)*94 + ('b',)*6)
    assert collections.Counter(small.subset(10, stratify='proportional').labels) == dict(a=9, b=1), 'six tenths of a seat are a seat'


def test_statistics_are_measured_as_they_are_written_down(planted):
    "The functions behind the cards, on lists whose figures are known by construction."
    got, truth = measure_released({n: released_split(n, planted[0]) for n in RELEASED}), planted[1]
    assert got['distinct'] == truth['distinct'] and got['captions_seen']['phrase/test'] == truth['seen']
    assert got['overlaps']['top100/val, top16/test']['by_class'] and got['overlaps']['phrase/train, top16/test']['shared'] == 0
    assert set(got['granularity']) == {'class', 'phrase', 'sentence', 'paragraph', 'cap3d'} and got['granularity']['cap3d']['rows'] == 250
    part = released_split('phrase/test', planted[0])
    counts = collections.Counter(part.labels)
    assert got['granularity']['class']['entropy_bits'] == pytest.approx(sum(n/250*math.log2(250/n) for n in counts.values()))
    known = dict(lists={'top16/test': dict(rows=1280, classes=dict(vase=truth['classes']['top16/test']['vase'] + 1))})
    assert len(differences(known, got)) == 1


def test_released_lists_agree_with_the_statistics_that_memkit_quotes():
    "Place the ten lists in a folder and name it in MEMKIT_LISTS."
    folder = os.environ.get('MEMKIT_LISTS')
    if not folder: pytest.skip('the released lists are not part of memkit; set MEMKIT_LISTS to a folder that has them')
    lists = {n: released_split(n, folder) for n in RELEASED}
    assert not [s.notes for s in lists.values() if s.notes], 'another version of a list'
    assert differences(released_statistics(), measure_released(lists)) == []


def test_a_list_of_full_size_is_checked_in_seconds():
    ids = tuple(f'{i:032x}' for i in range(64_190))
    captions = tuple(f'shape {i % 9171}' for i in range(64_190))
    train, test = (Split(n, ids[a:b], tuple(f'class {i % 16}' for i in range(a, b)), dict(phrase=captions[a:b])) for n, a, b in (('train', 0, 53_836), ('test', 53_836, 64_190)))
    start = time.process_time()
    report = check_splits(train, test)
    train.subset(51_200, stratify='proportional')
    assert report.ok and time.process_time() - start < 20


@pytest.mark.parametrize('content, said', [
    (b'id,phrase\n../../x,a\n', "line 2: '../../x' cannot be an id"), (b'id,phrase\n/etc/passwd,a\n', 'line 2'), (b'id,phrase\na,"' + b'x'*10_000_000 + b'"\n', 'line 2: a cell of more than 100,000 characters'),
    ('id,phrase\na,ok\nb,caf\xe9\n'.encode('latin-1'), 'line 3: byte 0xe9 is not UTF-8'), (b'id,phrase\na,b\0\n', 'line 2: a zero byte'), ('id,phrase\na,b\n'.encode('utf-16'), 'UTF-16'),
    (b'id,phrase\na,"b\nc,d\n', 'unexpected end of data'), (b'id,phrase\na\n', 'line 2: 1 cells; expected 2'), (b'', 'no rows'), (b'PK\3\4' + b'\0'*100, 'a zero byte'), (b'what,phrase\na,b\n', 'no column of ids')])
def test_hostile_lists_are_one_line_and_exit_code_2(content, said, tmp_path):
    (tmp_path/'list.csv').write_bytes(content)
    with pytest.raises(InputError, match='list.csv') as e: read_split(tmp_path/'list.csv')
    assert said in str(e.value)
    if len(content) in (20, 0):  # two of them through the command, which costs a process each
        got = memkit('data', 'check', 'list.csv', cwd=tmp_path)
        assert got.returncode == 2 and said in got.stderr and len(got.stderr.strip().splitlines()) == 1, got.stderr


def test_formulas_reach_no_spreadsheet(tmp_path):
    evil = Split('evil', ('=a', 'b'), ('+x', '@y'), dict(phrase=('=cmd|"/c calc"!A1', "-2+3"), sentence=("'quoted", "\t=1")))
    text = write_split(evil, tmp_path/'evil.csv').read_text()
    import csv, io
    cells = [c for row in csv.reader(io.StringIO(text, newline='')) for c in row]
    assert not [c for c in cells if c[:1] in tuple('=+-@\t\r')]
    back = read_split(tmp_path/'evil.csv')
    assert (back.ids, back.labels, back.captions) == (evil.ids, evil.labels, evil.captions)
    assert any('evaluated by a spreadsheet' in str(f) for f in check_splits(evil).findings)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0'), max_size=30), min_size=1, max_size=8))
@example(['\r', '\r0', "'", "''=", '\ufeff', '"', ',', '\n', ' x ', '\x85', '\u2028', '=1'])
def test_any_caption_survives_the_journey(texts):
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        split = Split('s', tuple(f'id{i}' for i in range(len(texts))), (), dict(phrase=tuple(texts)))
        assert read_split(write_split(split, Path(folder)/'s.csv')).captions == split.captions


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.integers(2, 60), st.sets(st.integers(0, 199), max_size=60), st.sampled_from(['', 'equal']))
def test_a_subset_survives_missing_files(seed, n, missing, stratify):
    split = Split('s', tuple(f'id{i}' for i in range(200)), tuple('abc'[i % 3] for i in range(200)))
    whole = split.subset(n, seed, stratify)
    assert whole.ids[:n//2] == split.subset(max(1, n//2), seed, stratify).ids[:n//2], 'a smaller subset begins a larger one'
    left = split.only(set(split.ids) - {f'id{i}' for i in missing})
    got = left.subset(min(n, len(left)), seed, stratify)
    if not stratify: assert [x for x in whole.ids if x in set(left.ids)] == list(got.ids)[:len(set(whole.ids) & set(left.ids))]
    shuffled = split.take(sorted(range(200), key=lambda i: (i*7919) % 200))
    assert shuffled.subset(n, seed).ids == split.subset(n, seed).ids, 'the order of the file plays no part'


def test_a_check_needs_neither_torch_nor_network_libraries(planted):
    code = "import sys\nfrom memkit.cli import main\ntry: main(['data', 'check', sys.argv[1]])\nexcept SystemExit as e: pass\nprint(sorted({'torch', 'pyarrow', 'requests', 'huggingface_hub', 'numba', 'scipy', 'matplotlib'} & set(sys.modules)))"
    got = subprocess.run([sys.executable, '-c', code, str(planted[0]/'phrase'/'val.csv')], capture_output=True, text=True, timeout=60)
    assert got.stdout.strip().endswith('[]') and '1 lists, 50 distinct shapes' in got.stdout, got.stdout[-300:] + got.stderr[-300:]


def test_check_strict_is_an_exit_code(planted, tmp_path):
    got = memkit('data', 'check', '--released', '--strict', '--out', tmp_path/'r.json', env=os.environ | dict(MEMKIT_LISTS=str(planted[0])))
    assert got.returncode == 1 and 'modulo 32 is 0 to 7' in got.stdout, got.stderr
    record = json.loads((tmp_path/'r.json').read_text())
    assert record['distinct'] == planted[1]['distinct'] and len(record['lists']) == 10
