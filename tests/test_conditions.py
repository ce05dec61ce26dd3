"""Conditions: CLIP against reference outputs and a plain numpy transformer, tokens and pixels against other implementations, caches, faults, checkpoints."""
import copy, os, pickle
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('diffusers'); pytest.importorskip('transformers')
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from memkit.clip import (caption_tokens, clean_caption, clip_pixels, clip_sizes, clip_tower, count_views, hf_to_openai, image_features, load_tokenizer,
                         load_tower, openai_to_hf, pick_view, read_image, text_features, tiny_clip)
from memkit.conditions import (LVIS16, ByteText, ClassTable, ClipImage, ClipText, FeatureCache, drop_mask, load_conditioner, make_conditioner, released_conditioner)
from memkit.core import InputError


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def clip(tmp_path_factory): return tiny_clip(tmp_path_factory.mktemp('clip'), width=128, seed=3)


def noise(w, h, seed=0, channels=3): return np.random.default_rng(seed).integers(0, 256, (h, w, channels), np.uint8)


# ---------------------------------------------------------------------------------------------------------------- CLIP itself

def plain_clip(w, x, heads, lead='', causal=False):
    "A transformer of OpenAI's CLIP in numpy, from its own names."
    w = {k[len(lead):]: v.double().numpy() for k, v in w.items() if k.startswith(lead)}
    norm = lambda x, name: (x - x.mean(-1, keepdims=True))/np.sqrt(x.var(-1, keepdims=True) + 1e-5)*w[f'{name}.weight'] + w[f'{name}.bias']
    mask = np.triu(np.full((x.shape[1],)*2, -np.inf), 1) if causal else 0
    if 'ln_pre.weight' in w: x = norm(x, 'ln_pre')
    for i in range(1 + max(int(k.split('.')[2]) for k in w if k.startswith('transformer'))):
        p = f'transformer.resblocks.{i}'
        qkv = norm(x, f'{p}.ln_1') @ w[f'{p}.attn.in_proj_weight'].T + w[f'{p}.attn.in_proj_bias']
        q, k, v = (y.reshape(*y.shape[:2], heads, -1).swapaxes(1, 2) for y in np.split(qkv, 3, -1))
        a = q @ k.swapaxes(2, 3)/q.shape[-1]**.5 + mask
        a = np.exp(a - a.max(-1, keepdims=True))
        out = (a/a.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(x.shape)
        x = x + out @ w[f'{p}.attn.out_proj.weight'].T + w[f'{p}.attn.out_proj.bias']
        h = norm(x, f'{p}.ln_2') @ w[f'{p}.mlp.c_fc.weight'].T + w[f'{p}.mlp.c_fc.bias']
        x = x + h/(1 + np.exp(-1.702*h)) @ w[f'{p}.mlp.c_proj.weight'].T + w[f'{p}.mlp.c_proj.bias']
    return norm(x, 'ln_post') @ w['proj'] if lead else norm(x, 'ln_final')


def plain_text(w, tokens):
    x = w['token_embedding.weight'][tokens].double().numpy() + w['positional_embedding'].double().numpy()
    return plain_clip({k: v for k, v in w.items() if not k.startswith('visual')}, x, x.shape[-1]//64, causal=True)


def plain_image(w, pixels):
    conv = w['visual.conv1.weight']
    x = torch.nn.functional.conv2d(pixels.double(), conv.double(), stride=conv.shape[-1]).flatten(2).mT.numpy()
    head = np.broadcast_to(w['visual.class_embedding'].double().numpy(), (len(x), 1, x.shape[2]))
    return plain_clip(w, np.concatenate([head, x], 1) + w['visual.positional_embedding'].double().numpy(), x.shape[2]//64, 'visual.')


def far(a, b): return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())


def test_towers_equal_a_plain_transformer(clip):
    state = load_file(clip/'model.safetensors')
    w = hf_to_openai(state)
    tokens = caption_tokens(['a chair', 'two tables, one chair', ''], load_tokenizer(clip))
    assert far(text_features(load_tower(clip, 'text').double(), tokens), plain_text(w, tokens)) < 1e-6  # both in double precision
    pixels = clip_pixels([Image.fromarray(noise(40, 33))], 32)
    got = image_features(load_tower(clip, 'image').double(), pixels.double())
    assert got.shape == (1, 17, 128) and far(got, plain_image(w, pixels)) < 2e-6
    again = openai_to_hf({f'cond_stage_model.{k}': v for k, v in w.items()} | {'cond_stage_model.context_length': torch.tensor(77)})
    assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)


def test_reference_clip(golden):
    with safe_open(golden/'model'/'clip_tiny.safetensors', 'pt') as f: ref = {k: f.get_tensor(k) for k in f.keys()}
    w = {k[3:]: v for k, v in ref.items() if k.startswith('sd.')}
    state = openai_to_hf({k: v for k, v in ref.items() if k.startswith('sd.')})
    text, image = clip_tower(state, 'text'), clip_tower(state, 'image')
    assert far(text_features(text, ref['tokens']), ref['text_features']) < 5e-6
    assert far(image_features(image, ref['image']), ref['image_features']) < 5e-6
    assert far(plain_text(w, ref['tokens']), ref['text_features']) < 5e-6    # the plain one is a fair judge
    assert far(plain_image(w, ref['image']), ref['image_features']) < 5e-6
    end = torch.where((ref['tokens'] == 0) & (torch.arange(77) > 0), 59, ref['tokens'])
    assert far(text_features(text, end), ref['text_features']) == pytest.approx(4.5734, abs=1e-3) # what padding with the end token costs
    assert far(image_features(image, ref['image'], cls_only=True), ref['image_features'][:, :1]) < 5e-6
    sizes = clip_sizes(state, 'image')
    assert (sizes['image_size'], sizes['patch_size'], sizes['projection_dim'], clip_sizes(state, 'text')['vocab_size']) == (32, 8, 32, 60)


def test_names_of_the_full_clip():
    from transformers import CLIPConfig, CLIPModel
    with torch.device('meta'):
        model = CLIPModel(CLIPConfig(text_config=dict(eos_token_id=49407), vision_config=dict(patch_size=16), projection_dim=512))
        w = hf_to_openai({k: v for k, v in model.state_dict().items() if not k.endswith('position_ids')})
    assert len(w) == 302
    shape = lambda k: list(w[k].shape)
    assert shape('visual.positional_embedding') == [197, 768] and shape('visual.proj') == [768, 512] and shape('token_embedding.weight') == [49408, 512]
    assert shape('visual.transformer.resblocks.11.attn.in_proj_weight') == [2304, 768] and shape('transformer.resblocks.11.mlp.c_fc.weight') == [2048, 512]


# ---------------------------------------------------------------------------------------------------------------- tokens and pixels

def plain_tokens(text, vocab, merges, length=77):
    "Byte-pair encoding written out: the earliest merge first, wherever it occurs."
    from tokenizers.pre_tokenizers import ByteLevel
    rank, ids = {tuple(m): i for i, m in enumerate(merges)}, []
    letters = lambda word: [p for piece, _ in ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(word) for p in piece]
    for word in __import__('regex').findall(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", text):
        parts = letters(word)
        parts[-1] += '</w>'
        while True:
            found = [(rank[p], i) for i, p in enumerate(zip(parts, parts[1:])) if p in rank]
            if not found: break
            i = min(found)[1]
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        ids += [vocab[p] for p in parts]
    ids = [vocab['<|startoftext|>'], *ids[:length - 2], vocab['<|endoftext|>']]
    return ids + [0]*(length - len(ids))


def test_tokens_are_openais(clip):
    import json
    tokenizer, model = load_tokenizer(clip), json.loads((clip/'tokenizer.json').read_text())['model']
    vocab, merges = tokenizer.get_vocab(), [m.split() if isinstance(m, str) else m for m in model['merges']]
    texts = ["A chair's   leg", 'Wardrobe — 3 doors, 12cm!!', 'tête-à-tête sofa', '椅子 🪑 chair', "it'll they've TABLE\ttable", 'x'*500, '', 'a &amp;lt;b&amp;gt; c', 'CafÃ© table']
    got = caption_tokens(texts, tokenizer)
    assert got.tolist() == [plain_tokens(clean_caption(t), vocab, merges) for t in texts]
    assert got[5, -1] == tokenizer.eos_token_id and (got[6, 2:] == 0).all()


@pytest.mark.parametrize('size', [(301, 200), (64, 517), (224, 224), (30, 21)])
def test_pixels_equal_transformers_processor(size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    image = Image.fromarray(noise(*size, seed=1)).resize(size, Image.BILINEAR)
    want = CLIPImageProcessorPil()(image, return_tensors='pt')['pixel_values']
    assert far(clip_pixels([image]), want) < 1e-5


def test_pictures_that_are_odd(tmp_path):
    upright = Image.fromarray(noise(20, 30))
    turned = upright.transpose(Image.ROTATE_90)
    exif = Image.Exif(); exif[0x0112] = 6
    turned.save(tmp_path/'phone.png', exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path/'phone.png')), np.asarray(upright))
    Image.fromarray(noise(64, 64)).save(tmp_path/'cut.jpg')
    data = (tmp_path/'cut.jpg').read_bytes()
    (tmp_path/'cut.jpg').write_bytes(data[:len(data)//2])
    with pytest.raises(InputError, match='cut.jpg'): read_image(tmp_path/'cut.jpg')
    with pytest.raises(InputError, match='not a picture'): read_image(np.zeros((3, 3, 7), np.uint8))
    ghost = noise(8, 8, channels=4); ghost[..., 3] = 0
    assert (np.asarray(read_image(ghost)) == 255).all()
    palette = Image.new('P', (4, 4)); palette.info['transparency'] = 0
    palette.save(tmp_path/'p.png')
    assert (np.asarray(read_image(tmp_path/'p.png')) == 255).all()


def test_views_of_sprites_and_photos():
    tiles = noise(16, 16*5).reshape(5, 16, 16, 3)
    sprite = Image.fromarray(tiles.reshape(80, 16, 3))
    assert [count_views(sprite), count_views(sprite, 4), count_views(Image.new('RGB', (80, 16)))] == [5, 4, 1]
    assert pick_view(sprite, 4, 'first').size == (16, 20)
    import random
    for seed in range(8): assert np.array_equal(np.asarray(pick_view(sprite, 'auto', 'random', seed)), tiles[random.Random(seed).randrange(5)])
    assert np.array_equal(np.asarray(pick_view(sprite, 5, 'center')), tiles[2]) and np.array_equal(np.asarray(pick_view(sprite, 5, 'index', index=-3)), tiles[0])


# ---------------------------------------------------------------------------------------------------------------- conditioners

def test_class_fixture_and_ids(data):
    ref = np.load(data/'cond_class.npz')
    table = released_conditioner({'cond_stage_model.embedder.embedding.weight': torch.from_numpy(ref['cond_sd.embedder.embedding.weight'])})
    assert table.names == LVIS16 and np.array_equal(table.encode(ref['labels'].tolist()).detach().numpy(), ref['context'])
    assert np.array_equal(table.null(3).detach().numpy(), ref['null_context'])
    drop = torch.tensor([False, True, False])
    assert np.array_equal(table(table.prepare(ref['labels'].tolist()), drop).detach().numpy(), np.where(drop[:, None, None], ref['null_context'], ref['context']))


def conditioners(clip):
    picture = noise(32, 64)
    return [(ClassTable(4, 16), [0, 3]), (ByteText(16, max_bytes=32, width=16), ['a chair', 'a table']), (ClipText(str(clip)), ['a chair', 'a table']), (ClipImage(str(clip)), [picture, noise(20, 20, 5)])]


def test_what_all_kinds_keep(clip, tmp_path):
    for made, asked in conditioners(clip):
        made.eval()
        context, alone = made.encode(asked, seeds=[3, 4]).detach(), made.encode(asked[1:], seeds=[4]).detach()
        assert context.shape == (2, made.length, made.dim) and context.dtype == torch.float32
        torch.testing.assert_close(context[1:], alone)                                        # alone as in a batch
        dropped = made(made.prepare(asked, [3, 4]), torch.tensor([True, False])).detach()
        torch.testing.assert_close(dropped, torch.cat([made.null(1).detach(), context[1:]]))
        twin = make_conditioner(made.config)
        assert twin.settings == made.settings and type(twin) is type(made)
        twin = copy.deepcopy(made)
        torch.testing.assert_close(twin.encode(asked, [3, 4]).detach(), context)
        made.save_pretrained(tmp_path/made.kind)
        back = load_conditioner(tmp_path/made.kind)
        assert torch.equal(back.encode(asked, [3, 4]).detach(), context) and back.settings == made.settings
        assert bool(list(made.parameters())) == made.trained and not back.training
        torch.testing.assert_close(pickle.loads(pickle.dumps(made)).encode(asked, [3, 4]).detach(), context)


def test_inside_a_diffusers_pipeline(clip, tmp_path):
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging
    logging.disable_progress_bar()
    class Pipeline(DiffusionPipeline):
        def __init__(self, conditioner): super().__init__(); self.register_modules(conditioner=conditioner)
    for made, asked in conditioners(clip)[1:3]:
        Pipeline(made).save_pretrained(tmp_path/made.kind)
        assert torch.equal(Pipeline.from_pretrained(tmp_path/made.kind).conditioner.encode(asked), made.encode(asked))


def test_every_parameter_of_the_byte_encoder_learns():
    made = ByteText(16, max_bytes=64, width=32)
    made.encode(['a chair with four legs', 'x']).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())
    with torch.no_grad():
        assert torch.equal(made.encode(['y'*64]), made.encode(['y'*64 + 'z']))    # cut at max_bytes
        assert not torch.equal(made.encode(['ab']), made.encode(['ba']))
        assert made.encode(['椅子', '🪑'*30, None]).isfinite().all()


def test_dropping_depends_on_the_seed_alone():
    masks = [drop_mask(range(a, b)) for a, b in ((0, 1000), (500, 1500))]
    assert torch.equal(masks[0][500:], masks[1][:500]) and 60 < masks[0].sum() < 140
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    drop_mask([1, 2, 3])
    assert torch.equal(state[0], torch.random.get_rng_state()) and (state[1] == np.random.get_state()[1]).all()


def test_features_of_a_set_resume(clip, tmp_path, monkeypatch):
    captions, read = [f'a chair number {i}' for i in range(20)], []
    def compute(self, items, whole=ClipText.compute):
        read.append(len(items))
        if len(read) == 3: raise KeyboardInterrupt
        return whole(self, items)
    monkeypatch.setattr(ClipText, 'compute', compute)
    with pytest.raises(KeyboardInterrupt): ClipText(str(clip)).features(captions, tmp_path, shard=6)
    features = ClipText(str(clip)).features(captions, tmp_path, shard=6)
    assert read == [6, 6, 6, 6, 2] and len(features) == 20                  # two shards were there already
    assert not list(tmp_path.rglob('*.tmp*'))
    torch.testing.assert_close(features[13], ClipText(str(clip)).encode(captions[13:14])[0])
    next(tmp_path.rglob('*.safetensors')).write_bytes(b'torn')
    read.clear(); read += [0, 0, 0]
    ClipText(str(clip)).features(captions, tmp_path, shard=6)
    assert len(read) == 4 and read[3] in (2, 6)                             # only what was torn
    other = tiny_clip(tmp_path/'other', width=128, seed=9)
    assert not torch.allclose(ClipText(str(other)).features(captions[:1], tmp_path)[0], features[0])   # another CLIP, another folder of the cache


def test_memory_is_bounded():
    cache = FeatureCache(memory=3)
    for i in range(10): cache.put({str(i): torch.tensor(float(i))})
    assert len(cache.recent) == 3 and '9' in cache and '0' not in cache


def test_faults_of_checkpoints(clip, tmp_path):
    text = ClipText(str(clip)); text.load()
    other = tiny_clip(tmp_path/'other', width=128, seed=4)
    with pytest.raises(InputError, match='another CLIP'): make_conditioner({**text.settings, 'source': str(other)}).encode(['a'])
    (tmp_path/'x').mkdir(); (tmp_path/'x'/'config.json').write_text('{"kind": "smell"}')
    with pytest.raises(InputError, match='smell'): load_conditioner(tmp_path/'x')
    ClassTable(3, 4).save_pretrained(tmp_path/'y')
    (tmp_path/'y'/'diffusion_pytorch_model.safetensors').unlink()
    torch.save(ClassTable(3, 4).state_dict(), tmp_path/'y'/'diffusion_pytorch_model.bin') # a pickle in its place is not opened
    with pytest.raises(InputError, match='not a sound conditioner'): load_conditioner(tmp_path/'y')
    w = hf_to_openai(load_file(clip/'model.safetensors'))
    with pytest.raises(InputError, match='missing'): released_conditioner({k: v for k, v in w.items() if 'resblocks.1.ln_2' not in k}, 'text', clip)
    with pytest.raises(InputError, match='expected a number'): ClassTable(4, 8).encode([4])
    with pytest.raises(InputError, match='num_classes, dim, names'): make_conditioner(dict(kind='class', size=1))
