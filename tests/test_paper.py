"""The paper notebooks: their form, what they answer for, and whether the committed figures say what their own records say."""
import ast, csv, json, re
from pathlib import Path

import pytest

from memkit.claims import WORDS
from memkit.drawing import control_table, flat_rows, split_controls
from memkit.expected import read_expected
from memkit.report import PROFILES, read_records, report_entries, report_markdown, report_page, write_report

ROOT = Path(__file__).resolve().parents[1]

PAPER = sorted((ROOT/'nbs'/'paper').glob('*.ipynb'))
FIGURES = ROOT/'figures'
SAVED = sorted(p for profile in PROFILES for p in (FIGURES/profile).glob('*.json') if p.stem in {n.stem for n in PAPER})
label = lambda p: f'{p.parent.name}-{p.stem}'


def cells(path, kind=None): return [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if kind in (None, c['cell_type'])]
def code(path): return [''.join(c['source']) for c in cells(path, 'code')]


@pytest.mark.parametrize('path', PAPER, ids=lambda p: p.stem)
def test_form(path):
    sources, nodes = code(path), [n for s in code(path) for n in ast.walk(ast.parse(s))]
    first = ''.join(cells(path)[0]['source'])
    assert len(cells(path)) <= 12
    assert cells(path)[0]['cell_type'] == 'markdown' and first.startswith('# ') and re.search(r'\*\*(Claim|Question)\.\*\*', first), 'begins with the claim'
    assert not [n for n in nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))], 'defines a function'
    tagged = [''.join(c['source']) for c in cells(path, 'code') if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1 and tagged[0].startswith('profile: str = ')
    assert re.search(r'\bsave_(figure|experiment)\(', sources[-1]), 'does not end by saving'
    assert any(re.search(r'(?m)^decision = decide_|^decision = Decision\(', s) for s in sources), 'no decision'
    assert any('assert ' in s for s in sources) and any('paper_and_we(' in s for s in sources)


def test_each_number_of_the_paper_is_answered_for_by_one_notebook():
    notebooks, rows = {p.stem for p in PAPER}, read_expected()
    assert {r['notebook'] for r in rows} == notebooks
    for name in notebooks: assert [r['quantity'] for r in rows if r['notebook'] == name].count('claim') == 1, name
    for path in PAPER: # each asks for its own rows, and saves under its own name
        text = '\n'.join(code(path))
        assert set(re.findall(r"paper_and_we\('(\w+)'", text)) | set(re.findall(r"save_experiment\(fig, '(\w+)'", text)) <= {path.stem}, path.stem


@pytest.mark.parametrize('path', SAVED, ids=label)
def test_saved_numbers_agree_with_their_table(path):
    record = json.loads(path.read_text(encoding='utf-8'))
    with open(path.with_suffix('.csv'), newline='', encoding='utf-8') as f: table = list(csv.DictReader(f))
    assert table == [{k: '' if v is None else str(v) for k, v in r.items()} for r in record['rows']]
    assert record['provenance']['profile'] == path.parent.name
    for suffix in ('.png', '.pdf', '.md'): assert path.with_suffix(suffix).stat().st_size > 0


def decide_again(notebook, records):
    "What a notebook decides of these records: the statements that lead to `decision`, and no other."
    statements, wanted, kept = [s for source in code(notebook) for s in ast.parse(source).body], {'decision'}, []
    for s in reversed(statements):
        makes = {n.id for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)} if isinstance(s, ast.Assign) else set()
        makes |= {a.asname or a.name for a in s.names} if isinstance(s, ast.ImportFrom) else set()
        if not makes & (wanted - {'records'}): continue
        kept.insert(0, s)
        wanted |= {n.id for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    space = dict(records=records)
    exec(compile(ast.Module(kept, []), notebook.name, 'exec'), space)
    return space['decision']


def near(a, b):
    "Equal but for the last digits of numbers."
    if isinstance(a, dict): return a.keys() == b.keys() and all(near(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(near, a, b))
    return a == b or isinstance(a, float) and isinstance(b, (int, float)) and abs(a - b) <= 1e-6*max(1, abs(a))


KEPT = [p for p in SAVED if p.with_suffix('.jsonl').exists()]


@pytest.mark.parametrize('path', KEPT, ids=label)
def test_verdict_follows_from_the_records(path):
    record, records = json.loads(path.read_text(encoding='utf-8')), read_records(path.with_suffix('.jsonl'))
    again = json.loads(json.dumps(decide_again(ROOT/'nbs'/'paper'/f'{path.stem}.ipynb', records).to_dict()))
    assert again['word'] in WORDS and again['word'] == record['decision']['word'] and again['sentence'] == record['decision']['sentence']
    assert near(again['numbers'], record['decision']['numbers'])


@pytest.mark.parametrize('path', [p for p in KEPT if p.stem != 'fig_calibration'], ids=label)
def test_figure_shows_the_records(path):
    record, records = json.loads(path.read_text(encoding='utf-8')), read_records(path.with_suffix('.jsonl'))
    assert near(flat_rows(records), record['rows'])
    assert {r['control'] for r in split_controls(records)[1]} == {'copies', 'fresh'}
    assert not [c for c in control_table(records) if c['as planted'] == 'no']


def test_verdict_is_found_again_in_a_notebook():
    "The reader of notebooks above, on a decision that is known."
    from memkit.claims import decide_trend
    toy = [dict(row=str(k), x=k, seed=0, d_gen=[1. - .1*k*j for j in range(8)], d_test=[.9 + .01*j for j in range(8)]) for k in range(3)]
    path = ROOT/'nbs'/'paper'/'fig_dataset_size.ipynb'
    assert decide_again(path, toy).word == decide_trend(toy, -1).word
    assert decide_again(path, toy).numbers['estimate'] == decide_trend(toy, -1).numbers['estimate']


def shown(): # profiles above whose folders the report lies
    return [p for p in PROFILES if p != 'smoke' and any((FIGURES/p).glob('*.json'))]


def test_page_is_self_contained_and_small():
    page = report_page({p: report_entries(p, FIGURES) for p in shown()})
    assert len(page) < 6e6 and '<script' not in page
    assert not [a for a in re.findall(r'(?:src|href)="([^"]*)"', page) if not a.startswith(('data:image/png;base64,', '#'))]
    assert not re.search(r'url\(|@import|<link|<iframe', page)


def test_report_is_made_from_the_figures():
    if not (FIGURES/'REPORT.md').exists(): pytest.skip('no report yet')
    text = (FIGURES/'REPORT.md').read_text(encoding='utf-8')
    assert text == report_markdown({p: report_entries(p, FIGURES) for p in shown()}, FIGURES), 'write_report makes it anew'
    without_pictures = lambda page: re.sub(r'base64,[^"]*', '', page)
    assert without_pictures((FIGURES/'report.html').read_text(encoding='utf-8')) == without_pictures(report_page({p: report_entries(p, FIGURES) for p in shown()}))
    assert not [l for l in re.findall(r'\]\(([^)]+)\)', text) if not (FIGURES/l).exists()]


def test_whatever_stands_in_a_figure_is_escaped(tmp_path):
    evil = '<script>alert(1)</script>"><img src=x onerror=alert(2)> | `x` [a](javascript:alert(3))'
    (tmp_path/'laptop').mkdir()
    record = dict(provenance=dict(profile='laptop', seed=evil, memkit='0', commit=evil, cpu=evil, date='2026-01-01'), rows=[], decision=dict(word='supported', sentence=evil, rule=evil, numbers={}),
                  min_detectable_auc=.6, controls=[{evil: evil}], paper=[{evil: evil}])
    (tmp_path/'laptop'/'fig_calibration.json').write_text(json.dumps(record))
    page = write_report('laptop', tmp_path)
    page, text = page.read_text(encoding='utf-8'), (tmp_path/'REPORT.md').read_text(encoding='utf-8')
    for made in (page, text): assert '<script' not in made and '<img src=x' not in made
    assert '](javascript' not in text
    assert '1 supported' in page and 'not run' in page
