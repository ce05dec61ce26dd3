"""The tutorial that trains a generator, in a reduced form: every cell, also the slow ones, with sizes that take seconds."""
import json
import re
import os
from pathlib import Path

import pytest

torch = pytest.importorskip('torch')
matplotlib = pytest.importorskip('matplotlib')
pytest.importorskip('diffusers')

NOTEBOOK = Path(__file__).resolve().parents[1]/'nbs'/'tutorials'/'03_train_a_tiny_generator.ipynb'
SMALL = dict(autoencoder_steps=12, denoiser_steps=4, few=3, many=5, held_out=4, drawn=3, full=False)


def test_every_cell_runs(tmp_path, monkeypatch):
    matplotlib.use('agg')
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    import tempfile
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    cells = [c for c in json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    assert sum(c['source'][0].strip() == '#| slow' for c in cells) >= 8 and len(cells) <= 40
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    names = {}
    try:
        for c in cells:
            source = ''.join(c['source'])
            exec(compile(source, 'cell', 'exec'), names)
            if 'parameters' in c['metadata'].get('tags', []):
                assert set(SMALL) == {k for k in names if not k.startswith('__')}
                names |= SMALL
    finally: torch.set_num_threads(threads)
    assert all(run.finished and run.step == 4 for run in names['runs'].values()) and set(names['runs']) == {3, 5}
    assert (names['home']/'model-3'/'model_index.json').is_file() and len(names['latents']) == 9


def test_expected_numbers_are_those_of_the_outputs():
    "What a reader is told to expect is what the committed run printed."
    cells = [c for c in json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    line = next(s for c in cells for s in c['source'] if s.startswith('EXPECTED = '))
    expected = eval(line.split('=', 1)[1].split('#')[0], dict(dict=dict))
    printed = ''.join(''.join(o.get('text', '')) for c in cells for o in c['outputs'])
    found = {k: float(v) for k, v in re.findall(r'(?m)^(\w+) +(\d[\d.]*)(?: +expected about .*)?$', printed)}
    asked = re.findall(r'(\w+)=', ''.join(s for c in cells for s in c['source'] if s.startswith('expect(')))
    assert expected and expected == found and list(expected) == asked
