"""Where tests find what the repository does not carry. Each of these fixtures skips, with a reason, where it is absent."""
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='session')
def data():
    "Committed reference numbers: `tests/data`."
    return ROOT/'tests'/'data'


@pytest.fixture(scope='session')
def real_meshes():
    "Folder of 100 real meshes, 20 classes (`MEMKIT_REAL_MESHES`, default `../shared/real`)."
    folder = Path(os.environ.get('MEMKIT_REAL_MESHES') or ROOT.parent/'shared'/'real')
    if not any(folder.glob('*.off')): pytest.skip('no real meshes; set MEMKIT_REAL_MESHES to a folder of OFF files')
    return folder


@pytest.fixture(scope='session')
def golden():
    "Folder of the full reference numbers (`MEMKIT_GOLDEN`, default `../shared/golden`); `tests/data` holds the committed part."
    folder = Path(os.environ.get('MEMKIT_GOLDEN') or ROOT.parent/'shared'/'golden')
    if not folder.is_dir(): pytest.skip('no full reference data; set MEMKIT_GOLDEN to its folder')
    return folder


@pytest.fixture(scope='session')
def tiny_models(tmp_path_factory):
    "Folders of a text and a vision-language model of the real classes with random weights; nothing is fetched from the network."
    pytest.importorskip('transformers')
    from memkit.tiny_models import tiny_text_model, tiny_vision_model
    root = tmp_path_factory.mktemp('tiny')
    return dict(text=tiny_text_model(root/'text'), vision=tiny_vision_model(root/'vision'))


@pytest.fixture(scope='module')
def one_thread():
    "PyTorch on one thread: sums in one order, equal to the last bit in another process too, and test files that run side by side do not fight over cores."
    torch = pytest.importorskip('torch')
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    "Each test has a cache of its own."
    monkeypatch.setenv('MEMKIT_HOME', str(tmp_path/'memkit-home'))
