"""A card cannot disagree with the data: it is made again and compared, and its numbers are counted a second way."""
import collections, json, re
from pathlib import Path

import pytest
import yaml

from memkit.cards import card_text, differences, make_cards, model_card, released_statistics, split_card, stale_cards, write_cards, yaml_head
from memkit.core import InputError
from memkit.shapes import CATEGORIES, LEVELS, sample_shape
from memkit.splits import RELEASED, Split, released_split
from released_like import make_lists

ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT/'data_cards'


def test_committed_cards_are_what_the_functions_write():
    assert stale_cards(CARDS) == [], 'run: python -c "from memkit.cards import write_cards; write_cards()"'
    assert {p.name for p in CARDS.glob('*.md')} == set(make_cards(released_statistics())), 'a card that no function writes'


def test_a_changed_number_is_noticed(tmp_path):
    write_cards(tmp_path)
    for name in ('built_in_shapes.md', 'released_16_classes.md'):
        text = (tmp_path/name).read_text()
        digit = next(m for m in re.finditer(r'\d', text[text.index('\n# '):]))
        i = digit.start() + text.index('\n# ')
        (tmp_path/name).write_text(text[:i] + str((int(text[i]) + 1) % 10) + text[i + 1:])
    assert stale_cards(tmp_path) == ['built_in_shapes.md', 'released_16_classes.md']


@pytest.mark.parametrize('path', sorted(CARDS.glob('*.md')), ids=lambda p: p.stem)
def test_the_hub_reads_the_head(path):
    hub = pytest.importorskip('huggingface_hub')
    card = (hub.ModelCard if 'model' in path.name else hub.DatasetCard)(path.read_text(encoding='utf-8'))
    assert card.data.to_dict()['license'] and card.data.to_dict()['tags'][0] == '3d' and '\n## Citation' in card.text
    assert not re.search(r'\b(nan|None|inf)\b', card.text)


def test_numbers_of_the_built_in_card_counted_another_way():
    text, texts = (CARDS/'built_in_shapes.md').read_text(), {level: collections.Counter() for level in LEVELS}
    for c in CATEGORIES:
        for i in range(100):
            for level in LEVELS: texts[level][sample_shape(c, i).caption(level)] += 1
    for level, counts in texts.items():
        words = sum(len(t.split())*n for t, n in counts.items())/1600
        row = re.search(rf'(?m)^\| {level} \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) ', text)
        assert int(row[1].replace(',', '')) == len(counts) and float(row[3]) == pytest.approx(words, abs=.0501)


def test_statistics_of_the_released_lists_agree_with_themselves():
    "Sums and identities that no typing error survives."
    known = released_statistics()
    L = known['lists']
    assert {n: (v['rows'], v['bytes'], v['sha256']) for n, v in L.items()} == RELEASED
    for n, v in L.items():
        if 'classes' in v: assert sum(v['classes'].values()) == (v['rows'] if n != 'top100/val' else known['overlaps']['top100/val, top16/test']['shared']), n
        if 'kinds' in v: assert sum(v['kinds'].values()) == v['rows'], n
        for c in v.get('captions', {}).values(): assert c['distinct'] <= c['rows'] == v['rows']
    par = L['paragraph/test']['captions']['paragraph']
    assert par['distinct'] == par['rows'] - par['rows_with_repeated_text'] + par['repeated_texts']
    assert known['distinct'] == L['phrase/train']['rows'] + L['top16/test']['rows'] + L['top100/val']['rows'] - known['overlaps']['top100/val, top16/test']['shared']
    import math
    counts = L['phrase/test']['classes'].values()
    assert known['granularity']['class']['entropy_bits'] == pytest.approx(sum(n/2500*math.log2(2500/n) for n in counts), abs=.005), 'the entropy of the classes follows from their counts'


def test_a_card_of_your_own_lists_counts_them(tmp_path):
    truth = make_lists(tmp_path)
    splits = [released_split(n, tmp_path) for n in ('phrase/train', 'phrase/test')]
    text = split_card(splits, title='Mine: a "test" # of\nYAML', licence='cc-by-4.0')
    head = yaml.safe_load(text.split('\n---\n')[0].removeprefix('---\n'))
    assert head['license'] == 'cc-by-4.0' and head['size_categories'] == ['1K<n<10K'] and head['pretty_name'] == 'Mine: a "test" # of\nYAML'
    assert '3,250 distinct shapes in 2 lists' in text and f'{truth["xl"]["phrase/train"]:,} ({truth["xl"]["phrase/train"]/3000:.1%})' in text
    assert f'{truth["seen"]} phrase captions ({truth["seen"]/250:.1%}) stand word for word in phrase/train' in text
    assert text.count('To be filled in by you') == 4
    test = splits[1]
    more = split_card([splits[0], test.take(range(len(test) - 1), 'phrase/test')])
    assert '3,249 distinct shapes' in more, 'another list, another card'


def test_hostile_texts_stay_texts():
    evil = Split('train', ('a', 'b'), ('<img src=x onerror=alert(1)>', 'x|y\n# heading'), source='---\nlicense: mit')
    text = split_card([evil], title='---\nlicense: "stolen"\n---')
    assert yaml.safe_load(text.split('\n---\n')[0].removeprefix('---\n'))['license'] == 'unknown'
    assert '<img' not in text and not re.search(r'(?m)^# heading', text) and len(re.findall(r'(?m)^# ', text)) == 1


def test_model_cards_say_what_is_missing():
    assert model_card({}).count('*not recorded*') == 6 and 'memkit audit' in model_card({})
    with pytest.raises(InputError, match='without auc, m, n'): model_card(dict(measures=dict(z_u=-1.)))


def test_differences_round_as_written():
    assert differences(dict(a=2.3, b=[1, 2], c=5), dict(a=2.349, b=[1, 2], c=5)) == []
    assert len(differences(dict(a=2.3, b=[1, 2], c=5, d=1), dict(a=2.36, b=[1, 3], c=6))) == 3
