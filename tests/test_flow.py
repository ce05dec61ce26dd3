"""Flow matching against closed forms and the released schedule; every sample depends on its own seed alone."""
import math

import numpy as np
import pytest

torch = pytest.importorskip('torch')

from memkit.core import InputError
from memkit.flow import SOLVERS, copying_flow, draw_noise, draw_path, flow_errors, flow_loss, flow_point, flow_times, gaussian_flow, guide, sample_flow


pytestmark = pytest.mark.usefixtures('one_thread')


def draw(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_times_equal_the_released_schedule(golden):
    stored = np.load(golden/'model'/'misc.npz')
    for n in (1, 2, 10, 50): assert np.array_equal(flow_times(n).numpy(), stored[f'sigmas_{n}'])


def test_times_by_hand():
    for n in (1, 2, 3, 50, 1000):
        times = flow_times(n)
        assert len(times) == n + 1 and times[0] == np.float32(.001) and times[-1] == 1 and int((times.diff() > 0).sum()) == max(1, n - 1)
    assert flow_times(10)[1].item() == pytest.approx(.112, abs=1e-7)


def test_a_sample_depends_on_its_own_seed_alone():
    state = torch.get_rng_state()
    seeds = torch.tensor([3, 2**40 + 3, 2**63 - 1, 0])
    for drawn in (lambda s: (draw_noise(s, (5, 4)),), lambda s: draw_path(s, (5, 4))):
        together, backwards = drawn(seeds), drawn(seeds.flip(0))
        for a, b in zip(together, backwards): assert torch.equal(a, b.flip(0))
        for i, s in enumerate(seeds.tolist()):
            for a, b in zip(together, drawn([s])): assert torch.equal(a[i], b[0])
        assert len({v.flatten()[0].item() for v in together[-1]}) == 4
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_that_of_the_released_sampler_for_one_shape():
    assert torch.equal(draw_noise([7], (1024, 32)), torch.randn(1, 1024, 32, generator=torch.Generator().manual_seed(7)))


def test_loss_is_the_mean_over_samples_however_they_are_grouped():
    model, x_1 = gaussian_flow(.3, .7), draw(12, 6, 4)
    whole = flow_loss(model, x_1, range(12))
    assert torch.stack([flow_loss(model, x_1[i:i + 3], range(i, i + 3)) for i in range(0, 12, 3)]).mean().item() == pytest.approx(whole.item(), rel=1e-6)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert flow_loss(model, x_1[order], order).item() == pytest.approx(whole.item(), rel=1e-6)
    t, x_0 = draw_path(range(12), (6, 4))
    by_hand = ((model(t[:, None, None]*x_1 + (1 - t[:, None, None])*x_0, t) - x_1 + x_0)**2).mean((1, 2))
    assert torch.allclose(flow_errors(model, x_1, x_0, t), by_hand, atol=1e-6)


def test_loss_of_half_precision_answers_is_computed_in_single():
    x_1, x_0, t = 300*draw(4, 8, 4), draw(4, 8, 4, seed=1), draw(4, seed=2).sigmoid()
    errors = flow_errors(lambda x, t: torch.zeros_like(x, dtype=torch.float16), x_1, x_0, t)
    assert errors.dtype == torch.float32 and torch.isfinite(errors).all() and errors.min() > 65504 # more than half precision holds


@pytest.mark.parametrize('std', (.25, 1., 3.))
def test_floor_of_the_loss_and_that_it_is_a_minimum(std):
    n, g = 60_000, torch.Generator().manual_seed(0)
    x_1, x_0, t = 2 + std*torch.randn(n, 1, generator=g), torch.randn(n, 1, generator=g), torch.rand(n, generator=g)
    best = gaussian_flow(2., std)
    floor = flow_errors(best, x_1, x_0, t).mean().item()
    assert floor == pytest.approx(std*math.pi/2, rel=.03)
    for other in (gaussian_flow(2.2, std), gaussian_flow(2., 1.2*std), lambda x, t: 1.05*best(x, t)): assert flow_errors(other, x_1, x_0, t).mean().item() > floor


@pytest.mark.parametrize('method, order', dict(euler=1, heun=2).items())
def test_order_of_the_solvers(method, order):
    x_0 = draw(200, 3).double()
    error = lambda n: (sample_flow(gaussian_flow(-1., .4), x_0, method=method, times=torch.linspace(0, 1, n + 1)) - (.4*x_0 - 1)).abs().max().item()
    assert math.log2(error(64)/error(128)) == pytest.approx(order, abs=.1)
    assert set(SOLVERS) == {'euler', 'heun'}


def test_calls_and_times_of_the_solvers():
    times = []
    def still(x, t): times.append(t.clone()); return torch.zeros_like(x)
    assert torch.equal(sample_flow(still, draw(3, 2), 50), draw(3, 2)) and len(times) == 49 and times[0].tolist() == [np.float32(.001)]*3
    times.clear(); sample_flow(still, draw(3, 2), 5, 'heun')
    assert len(times) == 8 and times[-1][0] == 1
    times.clear(); sample_flow(still, draw(3, 2), 1)
    assert len(times) == 1
    assert sample_flow(lambda x, t: torch.ones_like(x, dtype=torch.bfloat16), draw(3, 2), 3).dtype == torch.float32


def test_no_graph_is_kept_while_sampling():
    w = torch.ones(1, requires_grad=True)
    assert not sample_flow(lambda x, t: w*x, draw(3, 2), 3).requires_grad


def test_faults_are_named():
    for bad in (lambda: sample_flow(lambda x, t: x, draw(2, 2), method='dopri'), lambda: sample_flow(lambda x, t: x*torch.nan, draw(2, 2)), lambda: flow_times(-3),
                lambda: draw_noise([], (2,)), lambda: draw_path([], (2,)), lambda: guide(lambda x, t, c: x, draw(2, 1, 1)), lambda: flow_errors(lambda x, t: x[:1], draw(2, 2), draw(2, 2), torch.rand(2))):
        with pytest.raises(InputError): bad()


def test_a_perfect_fit_generates_the_training_set():
    data = 3*draw(9, 4, 2)
    made = sample_flow(copying_flow(data), draw_noise(range(60), (4, 2)))
    distance = lambda p: torch.cdist(p.flatten(1), data.flatten(1), compute_mode='donot_use_mm_for_euclid_dist').min(1)
    near = distance(made)
    assert near.values.max() < 1e-3 and len(near.indices.unique()) > 5


def test_guidance():
    asked = []
    def model(x, t, c): asked.append(tuple(c.shape)); return x*0 + c.mean((1, 2))[:, None, None] + t[:, None, None]
    x, t, c, null = draw(3, 4, 2), torch.tensor([.1, .5, .9]), draw(3, 5, 6, seed=1), draw(1, 5, 6, seed=2)
    cond, none = model(x, t, c), model(x, t, null.expand(3, -1, -1))
    for g in (1.5, 5.): assert torch.allclose(guide(model, c, null, g)(x, t), none + g*(cond - none), atol=1e-5)
    asked.clear()
    for g in (0., 1.): assert torch.equal(guide(model, c, null, g)(x, t), cond)
    assert asked == [(3, 5, 6)]*2
    assert torch.allclose(guide(model, c, null.expand(3, -1, -1), 2.)(x, t), 2*cond - none, atol=1e-5) and asked[-1] == (6, 5, 6)
    same = guide(lambda x, t: x, None, None)
    assert torch.equal(same(x, t), x)


def test_path_keeps_its_ends():
    a, b = draw(2, 3, 4, 5), draw(2, 3, 4, 5, seed=1)
    assert torch.equal(flow_point(a, b, torch.zeros(2)), a) and torch.equal(flow_point(a, b, torch.ones(2)), b)
    assert torch.allclose(flow_point(a, b, torch.tensor([.25, .75]))[1], .75*b[1] + .25*a[1])
