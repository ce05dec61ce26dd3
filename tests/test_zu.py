"Z_U and its company against the paper's own numbers, closed forms and simulation."
import json, math

import numpy as np
import pytest

from memkit.core import InputError
from memkit.zu import auc, z_u

pytestmark = pytest.mark.filterwarnings('ignore:.*infinite:UserWarning')


def numbers(values): return [float(x) for x in values]   # nan and inf are strings in the file


def cases(data, kind=('zu_distances', 'zu_features')):
    "(case, d_gen, d_test) of the committed reference file, those of 100,000 distances left out."
    stored = json.loads((data/'zu_golden.json').read_text())['cases']
    for c in stored:
        if c['kind'] not in kind or c.get('npz'): continue
        if c['kind'] == 'zu_features': yield c, c['cross']['LQm'], c['cross']['LPn']
        else: yield c, numbers(c['gen']), numbers(c['test'])


def test_z_u_is_the_papers(data):
    seen = 0
    for c, gen, test in cases(data):
        want = c['expected'].get('value')
        if want is None or want == 'nan':
            with pytest.raises(InputError): z_u(gen, test)
        else:
            assert z_u(gen, test) == pytest.approx(want, rel=1e-12, abs=1e-15), c['id']
            assert auc(gen, test) == pytest.approx(c['cross']['A'], rel=1e-12), c['id']
        seen += 1
    assert seen == 33


def test_z_u_is_the_papers_at_size(golden):
    stored = [c for c in json.loads((golden/'stats'/'golden_zu.json').read_text())['cases'] if c.get('npz')]
    arrays = np.load(golden/'stats'/'golden_zu_large.npz')
    for c in stored:
        gen, test = arrays[c['id'] + '/gen'], arrays[c['id'] + '/test']
        assert z_u(gen, test) == pytest.approx(c['expected']['value'], rel=1e-12), c['id']
        assert auc(gen, test) == pytest.approx(c['cross']['A'], rel=1e-12), c['id']
    assert len(stored) == 5
