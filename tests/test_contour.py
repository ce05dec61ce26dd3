"""Outlines: the reference's figures for 2,900 silhouettes, and every step against a slow form of its rule.

`data/lfd_contour.npz` holds, for 30 procedural meshes of ours and the 100 views, how far the parts had to be joined (0 not at all, 1 and 2 by growing,
3 by the bounding box) and the number of outline pixels, -1 where there is no outline."""
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import ndimage

from memkit.contour import contour, contour_fourier, grow, is_deletable, is_multipart, join_parts, thin, trace_contour
from memkit.core import make_rng
from memkit.render import render_silhouettes


def draw(*rows, margin=4): return np.pad(np.array([[c == '#' for c in r] for r in rows])[::-1], margin)


def blobs(n, seed=0, size=48, border=False):
    "Random masks of very different character: speckles, blots, bars, rings; sometimes up to the border."
    rng = make_rng(seed, 'blobs')
    for i in range(n):
        mask = ndimage.gaussian_filter(rng.normal(size=(size, size)), rng.choice([.3, .7, 1, 2, 4])) > rng.normal(.3, .3)*.3
        if i % 3 == 0: mask ^= ndimage.binary_erosion(mask)
        if i % 4 == 1: mask = np.hypot(*(np.mgrid[:size, :size] - size/2)) < 15 + 5*mask
        if i % 5 == 0: mask[:, rng.integers(0, size, 20)] = False
        if not border or i % 2: mask[:4] = mask[-4:] = mask[:, :4] = mask[:, -4:] = False
        yield mask


def slow_outside(mask, points):
    "Flooded from the border ring, which belongs to the outside even where the outline runs along it."
    wall = np.zeros(mask.shape, bool)
    wall[points[:, 1], points[:, 0]] = True
    ring = np.ones(mask.shape, bool)
    ring[1:-1, 1:-1] = False
    return ring | ndimage.binary_propagation(ring, mask=~wall | ring)


def slow_thin(mask, keep):
    "Full sweeps with frozen flags, the ring looked at pixel by pixel."
    flag, ring = mask.copy(), [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    while True:
        before = flag.copy()
        for dx, dy in [(0, -1), (0, 1), (-1, 0), (1, 0)]:
            gone = [(y, x) for y, x in np.argwhere(flag & ~keep) if 1 <= x < mask.shape[1] - 1 and 1 <= y < mask.shape[0] - 1
                    and not flag[y + dy, x + dx] and is_deletable(sum(int(flag[y + v, x + u]) << k for k, (u, v) in enumerate(ring)))]
            for p in gone: flag[p] = False
        if (flag == before).all(): return flag


def test_deletable_is_yokois_rule():
    "At most one run with an edge neighbour = Yokoi's 4-connectivity number at most 1; and not a line end."
    for ring in range(256):
        b = [ring >> k & 1 for k in range(8)]
        yokoi = sum(b[k] - b[k]*b[k + 1]*b[(k + 2) % 8] for k in (0, 2, 4, 6))
        assert is_deletable(ring) == (sum(b) != 1 and yokoi <= 1), ring


@pytest.mark.parametrize('rows, points', [
    (('#',), [(4, 4)]),
    (('##',), [(4, 4), (5, 4), (4, 4)]),
    (('##', '##'), [(4, 4), (4, 5), (5, 5), (5, 4), (4, 4)]),
    (('#.#', '.#.'), [(5, 4), (4, 5), (5, 4), (6, 5), (5, 4)]),                            # a return from the left would lose the right horn
    (('.#.', '###', '.#.'), [(5, 4), (4, 5), (5, 6), (6, 5), (5, 4)]),                     # corners are cut
    (('.....', '##.##'), [(4, 4), (5, 4), (4, 4)]),                                        # only the part of the start pixel
    (('###', '#.#', '###'), [(4, 4), (4, 5), (4, 6), (5, 6), (6, 6), (6, 5), (6, 4), (5, 4), (4, 4)]),
])
def test_trace_by_hand(rows, points): assert [tuple(p) for p in trace_contour(draw(*rows)).tolist()] == points


def test_trace_of_a_rectangle_has_its_rim():
    for w, h in [(2, 9), (7, 3), (20, 20)]:
        assert len(trace_contour(np.pad(np.ones((h, w), bool), 3))) == 2*(w + h) - 4 + 1
    full = np.ones((9, 9), bool)                                      # no margin: nothing is read beyond the image
    assert len(trace_contour(full)) == 33
    assert is_multipart(full, trace_contour(full))                    # the border ring is outside, whatever runs along it: 49 of 81 are inside


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**81 - 1))
def test_trace_is_closed_and_stays_on_the_mask(h, w, bits):
    mask = np.array([bits >> k & 1 for k in range(h*w)], bool).reshape(h, w)
    points = trace_contour(mask).astype(int)
    assert (len(points) == 0) == (not mask.any())
    if len(points) == 0: return
    assert mask[points[:, 1], points[:, 0]].all()
    assert tuple(points[0][::-1]) == tuple(np.argwhere(mask)[0])
    if len(points) > 1:
        assert (np.abs(np.diff(points, axis=0)).max(1) == 1).all() and (points[0] == points[-1]).all()
    else: assert ndimage.convolve(mask.astype(int), np.ones((3, 3), int), mode='constant')[points[0, 1], points[0, 0]] == 1


def test_multipart_against_full_flood():
    seen = []
    for mask in blobs(300, border=True):
        points = trace_contour(mask)
        if not mask.any(): assert is_multipart(mask, points); continue
        inside = (mask & ~slow_outside(mask, points)).sum()/mask.sum()
        assert is_multipart(mask, points) == (not inside > .95)
        seen.append(is_multipart(mask, points))
    assert 30 < sum(seen) < len(seen) - 30
    box = np.pad(np.ones((19, 19), bool), 5)
    for n, several in [(19, False), (20, True)]:                      # 19 of 380 is exactly 5 %: one part; 0.95 of the area inside is not enough
        mask = box.copy(); mask[-2, 2:2 + n] = True
        assert is_multipart(mask, trace_contour(mask)) == (not 361/(361 + n) > .95), several


def test_grow_against_dilation():
    d5 = np.ones((5, 5), bool); d5[::4, ::4] = False
    for mask in blobs(100, seed=1, border=True):
        may = np.zeros_like(mask); may[2:-2, 2:-2] = True
        for reach, element in [(1, np.ones((3, 3), bool)), (2, d5)]:
            assert (grow(mask, reach) == (mask | may & ndimage.binary_dilation(mask, element))).all()


def test_thin_against_full_sweeps():
    removed = 0
    for i, mask in enumerate(blobs(16, seed=2, size=36, border=True)):
        keep = mask & (make_rng(i, 'keep').random(mask.shape) < [0, .02, .3][i % 3])
        for start in (mask, grow(grow(mask, 1), 2), np.ones_like(mask)):
            got = thin(start, keep)
            assert (got == slow_thin(start, keep)).all()
            removed += (start & ~got).sum()
    assert removed > 5e3


def test_joined_parts_hang_together():
    "One component that contains the mask, with the same number of holes or more lines between; level 3 fills the box."
    levels = []
    for mask in blobs(80, seed=3):
        if not mask.any() or not is_multipart(mask, trace_contour(mask)): continue
        joined, level = join_parts(mask)
        levels.append(level)
        assert (joined & mask == mask).all()
        if level == 3:
            assert ndimage.label(joined, np.ones((3, 3)))[1] == 1
            y, x = np.nonzero(mask)
            assert (np.argwhere(joined) >= [y.min(), x.min()]).all() and (np.argwhere(joined) <= [y.max(), x.max()]).all()
    assert set(levels) == {1, 2, 3}


def test_empty_and_tiny_masks():
    empty = np.zeros((9, 9), bool)
    assert len(contour(empty)[0]) == 0 and (contour_fourier(empty) == 0).all()
    for rows in [('#',), ('##',), ('###',), ('##', '##')]: assert (contour_fourier(draw(*rows)) == 0).all()


def test_shortest_outline_with_coefficients():
    "Eight outline pixels, the start counted twice, have frequencies up to four; seven have none."
    for rows, n, some in [(('.###', '####'), 8, 4), (('###', '###'), 7, 0)]:
        fd = contour_fourier(draw(*rows), centre=(0, 0))
        assert len(contour(draw(*rows))[0]) == n and (fd[:some] > 0).all() and (fd[some:] == 0).all()


def test_fourier_of_a_wavy_disc():
    "A radius of 60 + 6 cos(5 t) has FD_5 = 3/60 but for the unequal spacing of outline pixels, and little else."
    y, x = np.mgrid[:256, :256] - 128
    fd = contour_fourier(np.hypot(x, y) <= 60 + 6*np.cos(5*np.arctan2(y, x)), centre=(128, 128))
    assert abs(fd[4] - .05) < .01 and np.delete(fd, 4).max() < .012
    for k in (1, 2):                                                  # twice the size, moved: the same up to the pixel grid
        moved = contour_fourier(np.hypot(x - 7, y + 9) <= k/2*(60 + 6*np.cos(5*np.arctan2(y + 9, x - 7))), centre=(135, 119))
        assert np.abs(moved - fd).max() < .012


def test_any_memory_order_and_dtype():
    mask = next(m for m in blobs(9, seed=4) if m.any())
    for same in (np.asfortranarray(mask), mask.astype(np.uint8), mask[::-1][::-1]): assert (contour_fourier(same) == contour_fourier(mask)).all()


def test_reference_outlines(data):
    "Level of joining and outline length of 2,896 silhouettes; the four empty ones have no outline."
    with np.load(data/'lfd_contour.npz') as z: names, level, length = z['names'], z['level'], z['length']
    with np.load(data/'render_golden.npz') as meshes:
        for i, name in enumerate(names):
            if f'{name}_V' not in meshes: continue
            masks = render_silhouettes(meshes[f'{name}_V']/1e6, meshes[f'{name}_F'].astype(np.int64)).reshape(100, 256, 256)
            for mask, want, n in zip(masks, level[i].ravel(), length[i].ravel()):
                points, got = contour(mask)
                assert (len(points) if len(points) > 1 else -1) == n, name
                assert got == want or not mask.any(), name
