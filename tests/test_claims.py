"""How often the rules of memkit.claims err, at greater length than their notebook has time for: in worlds where nothing happens, and where what happens is known."""
import numpy as np
import pytest
from scipy import stats

from memkit.claims import OTHER, WORDS, Decision, decide_absent, decide_all, decide_difference, decide_peak, decide_present, decide_trend
from memkit.core import make_rng
from memkit.zu import auc, min_detectable_auc


def toy(row, true_auc=.5, seed=0, m=60, n=60, retrain=0., x=None, world=0):
    "A record whose auc is known: shapes of its own, held-out shapes that all rows of a world share, and a network that training again makes another one."
    shared, own = make_rng(world, 'held out', n), make_rng(world, 'toy', row, seed)
    shift = np.sqrt(2)*stats.norm.ppf(np.clip(true_auc + retrain*own.normal(), .01, .99))
    d_gen, d_test = own.normal(size=m) - shift, shared.normal(size=n)
    return dict(row=str(row), x=x, seed=seed, m=m, n=n, auc=auc(d_gen, d_test), d_gen=d_gen, d_test=d_test, test_ids=[f'h{i}' for i in range(n)])


def table(aucs, seeds, retrain, world, **sizes):
    return [toy(k, a, s, retrain=retrain, x=k, world=world, **sizes) for k, a in enumerate(aucs) for s in range(seeds)]


def count(rule, worlds, word):
    return sum(rule(world).word == word for world in range(worlds))


def at_most(rate, worlds):
    "What a rule with this error rate exceeds in one test of ten thousand."
    return stats.binom.ppf(.9999, worlds, rate)


WORLDS = {'one seed': (1, 0.), 'two seeds': (2, 0.), 'two seeds, retraining scatters': (2, .05), 'three seeds, retraining scatters much': (3, .1)}
of = lambda records, row: [r for r in records if r['row'] == str(row)]
RULES = dict(trend=lambda r: decide_trend(r, 1), difference=lambda r: decide_difference(of(r, 0), of(r, 1)),
             difference_beside=lambda r: decide_difference(of(r, 0), of(r, 1), beside=r), peak=decide_peak)


@pytest.mark.parametrize('how', WORLDS)
@pytest.mark.parametrize('rule', RULES)
def test_nothing_happens_and_nothing_is_claimed(rule, how):
    seeds, retrain = WORLDS[how]
    words = [RULES[rule](table((.5,)*4, seeds, retrain, world)).word for world in range(200)]
    # a side errs in 2.5 % of runs; an estimated variance with one or two degrees of freedom is allowed twice that
    for word in ('supported', 'contradicted'): assert words.count(word) <= at_most(.025 if seeds == 1 else .05, 200), (word, words.count(word))


def test_one_run_alone_does_not_know_what_training_again_would_change():
    "Why the sentence says so: with one seed, retraining that scatters is taken for an effect."
    wrong = sum(decide_difference(*[[toy(k, .5, 0, 200, 200, retrain=.1, world=w)] for k in 'ab']).word != 'not decidable' for w in range(200))
    assert wrong > 40
    assert 'one training run a row' in decide_difference(toy('a'), toy('b')).sentence


def test_a_row_as_high_as_an_end_is_no_peak():
    assert count(lambda w: decide_peak(table((.5, .65, .65), 1, 0., w)), 300, 'supported') <= at_most(.025, 300)
    assert count(lambda w: decide_peak(table((.65, .65, .5), 1, 0., w)), 300, 'contradicted') <= at_most(.05, 300)


@pytest.mark.parametrize('true, word', [(.5, 'supported'), (.6, 'contradicted')], ids=['a fresh sampler is not called a copier', 'what copies as much as the margin is not called absent'])
def test_presence_and_absence(true, word):
    assert count(lambda w: decide_present(toy('a', true, m=150, n=150, world=w)), 400, word) <= at_most(.035, 400)
    assert count(lambda w: decide_absent(toy('a', true, m=150, n=150, world=w)), 400, OTHER[word]) <= at_most(.035, 400)


def test_what_is_called_detectable_is_detected():
    "The smallest difference printed with an undecided verdict is found with the probability printed beside it."
    step = decide_difference(toy('a', .5, m=200, n=200), toy('b', .5, m=200, n=200)).numbers['detectable']
    found = count(lambda w: decide_difference(toy('a', .5 + step, m=200, n=200, world=w), toy('b', .5, m=200, n=200, world=w)), 200, 'supported')
    assert .7 < found/200 < .92
    alone = min_detectable_auc(130, 130)
    assert .7 < count(lambda w: decide_present(toy('a', alone, m=130, n=130, world=w)), 200, 'supported')/200 < .9


def test_a_whole_errs_no_more_than_its_parts_together():
    both = lambda w: decide_all(decide_present(toy('a', .5, m=100, n=100, world=w)), decide_present(toy('b', .5, m=100, n=100, world=w)))
    assert count(both, 200, 'supported') <= at_most(.025, 200)


def test_scatter_between_seeds_is_learnt_from_all_rows():
    "Two rows with two seeds have one degree of freedom; six rows have five. A difference of .15 is then found far more often."
    def found(beside):
        return count(lambda w: decide_difference(of(r := table((.65, .5, .5, .5, .5, .5), 2, .03, w, m=150, n=150), 0), of(r, 1), beside=r if beside else ()), 60, 'supported')
    assert found(True) > 1.4*found(False)


def test_a_verdict_is_one_of_three_words():
    assert {Decision(w, '').word for w in WORDS} == set(WORDS)
