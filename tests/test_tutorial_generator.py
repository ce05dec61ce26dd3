"""The tutorial that trains a generator, in a reduced form: every cell, also the slow ones, with sizes that take seconds."""
import json
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
