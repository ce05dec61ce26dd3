"""The house stands as CONTRIBUTING.md draws it: names, ranks, exports and committed notebooks."""
import ast, json, re, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
LIBRARY = sorted(NBS.glob('[0-9][0-9]_*.ipynb'))
PAPER = sorted((NBS/'paper').glob('*.ipynb'))
TUTORIALS = sorted((NBS/'tutorials').glob('*.ipynb'))
ALL = [*LIBRARY, NBS/'index.ipynb', NBS/'benchmarks.ipynb', *PAPER, *TUTORIALS]
RANK = {p.stem[3:]: int(p.stem[:2]) for p in LIBRARY}
name_of = lambda p: p.stem


def read(path): return json.loads(path.read_text(encoding='utf-8'))
def sources(path, kind=None): return [''.join(c['source']) for c in read(path)['cells'] if kind in (None, c['cell_type'])]


def memkit_imports(code):
    "Names of memkit modules imported by `code`, anywhere in it."
    code = re.sub(r'(?m)^\s*[%!].*$', '', code)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split('.')[0] == 'memkit':
            parts = node.module.split('.')
            yield from [parts[1]] if len(parts) > 1 else [a.name for a in node.names if a.name in RANK]
        if isinstance(node, ast.Import):
            yield from [a.name.split('.')[1] for a in node.names if a.name.startswith('memkit.')]


@pytest.mark.parametrize('path', LIBRARY, ids=name_of)
def test_module_is_named_after_its_notebook(path):
    exp = [s for s in sources(path, 'code') if s.startswith('#| default_exp')]
    assert exp == [f'#| default_exp {path.stem[3:]}']
    assert (ROOT/'memkit'/f'{path.stem[3:]}.py').is_file()


def test_every_module_has_a_notebook():
    modules = {p.stem for p in (ROOT/'memkit').glob('*.py')} - {'__init__', '_modidx', '__main__'}
    assert modules == set(RANK)


@pytest.mark.parametrize('path', LIBRARY, ids=name_of)
def test_imports_point_to_lower_numbers(path):
    rank = int(path.stem[:2])
    above = {m for s in sources(path, 'code') for m in memkit_imports(s) if RANK[m] >= rank}
    assert not above, f'{path.name} (rank {rank}) imports {above}'


@pytest.mark.parametrize('stage, forbidden', [('3', '456'), ('4', '3'), ('5', '3'), ('6', '3')])
def test_measure_and_make_do_not_import_each_other(stage, forbidden):
    for path in [p for p in LIBRARY if p.stem[0] == stage]:
        crossing = {m for s in sources(path, 'code') for m in memkit_imports(s) if str(RANK[m]).zfill(2)[0] in forbidden}
        assert not crossing, f'{path.name} imports {crossing}'


@pytest.mark.parametrize('path', PAPER, ids=name_of)
def test_paper_notebooks_have_one_parameters_cell_and_define_nothing(path):
    cells = read(path)['cells']
    tagged = [c for c in cells if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1
    assert any(line.startswith('profile') for line in tagged[0]['source'])
    assert not [s for s in sources(path, 'code') if re.search(r'(?m)^\s*(?:def|class)\s', s)]
    assert len(cells) <= 12


@pytest.mark.parametrize('path', ALL, ids=name_of)
def test_committed_notebook_is_clean(path):
    nb = read(path)
    assert 'widgets' not in nb['metadata'], 'widget state'
    assert not [o for c in nb['cells'] for o in c.get('outputs', []) if o['output_type'] == 'error'], 'an error output'
    text = '\n'.join(json.dumps(c.get('outputs', [])) + ''.join(c['source']) for c in nb['cells'])
    found = re.search(r'(?<![\w.:/])/(?:home|root|Users|work|tmp|mnt|private)/[\w.-]+', text)
    assert not found, f'a machine path: {found and found[0]}'
    assert any(c.get('outputs') for c in nb['cells']), 'no output at all'


@pytest.mark.parametrize('path', LIBRARY, ids=name_of)
def test_first_cell_is_title_and_one_line(path):
    first = [l for l in sources(path)[0].split('\n') if l.strip()]
    assert len(first) == 2 and first[0] == f'# {path.stem[3:]}' and first[1].startswith('> ')


def test_exported_files_are_in_sync(tmp_path):
    for item in ('nbs', 'memkit', 'pyproject.toml', 'LICENSE', 'README.md'):
        src = ROOT/item
        shutil.copytree(src, tmp_path/item, ignore=shutil.ignore_patterns('__pycache__')) if src.is_dir() else shutil.copy(src, tmp_path/item)
    subprocess.run([sys.executable, '-c', 'from nbdev.export import nb_export; from nbdev.doclinks import nbdev_export; nbdev_export()'], cwd=tmp_path, check=True, capture_output=True, timeout=300)
    for p in sorted((ROOT/'memkit').glob('*.py')):
        assert p.read_text() == (tmp_path/'memkit'/p.name).read_text(), f'{p.name}: edit the notebook and run nbdev-export'


def test_one_list_of_dependencies():
    env = (ROOT/'environment.yml').read_text()
    pip_lines = re.findall(r'(?m)^      - (.+)$', env)
    make_args = re.search(r'(?m)^PIP_ARGS := (.+)$', (ROOT/'Makefile').read_text())[1]
    assert ' '.join(pip_lines) == make_args


def test_every_dependency_is_pinned():
    import tomllib
    project = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    wanted = [d for group in [project['dependencies'], *project['optional-dependencies'].values()] for d in group]
    pins = {re.split('==', l)[0].lower().replace('_', '-') for l in (ROOT/'constraints.txt').read_text().splitlines() if '==' in l}
    missing = [d for d in wanted if re.split(r'[<>=!~ \[]', d)[0].lower().replace('_', '-') not in pins]
    assert not missing


def test_readme_is_made_from_the_index(tmp_path):
    from memkit.report import write_readme
    assert write_readme(ROOT, tmp_path).read_text() == (ROOT/'README.md').read_text(), 'run make readme'


def test_the_map_of_the_house_is_true():
    drawn = set(re.findall(r'(?m)^[│ ]*├── (\d\d_\w+)', (ROOT/'CONTRIBUTING.md').read_text()))
    assert drawn == {p.stem for p in LIBRARY}


def test_every_measurement_names_its_benchmark_and_its_machine():
    scripts = {p.stem.removeprefix('bench_') for p in (ROOT/'benchmarks').glob('bench_*.py')}
    for line in (ROOT/'benchmarks'/'results.jsonl').read_text(encoding='utf-8').splitlines():
        record = json.loads(line)
        assert record['benchmark'] in scripts and record['cpu'] and record['date'] and record['commit'], line[:300]


def test_what_the_readme_links_to_exists():
    links = re.findall(r'\]\((?!\w+:|#)([^)#]+)', (ROOT/'README.md').read_text(encoding='utf-8'))
    assert len(links) > 20 and not [l for l in links if not (ROOT/l).exists()]
