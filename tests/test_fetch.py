"""Downloads against a server that stalls, drips, cuts off, answers 404, 429 and 503, changes its mind and serves wrong bytes."""
import collections, gzip, hashlib, http.server, json, os, random, signal, subprocess, sys, threading, time
from pathlib import Path

import pytest

pytest.importorskip('requests')
from memkit.core import InputError
from memkit.download import DownloadError, Meter, download
from memkit.fetch import Manifest, Origin, fetch, fetch_one, read_gzip_json, read_origins
from memkit.mesh import find_meshes, save_mesh
from memkit.shapes import shape_set

QUICK = dict(pause=.001, stall=1., tries=3)
sha = lambda b: hashlib.sha256(b).hexdigest()
FILE = bytes(random.Random(1).randbytes(150_000))


class Wild(http.server.BaseHTTPRequestHandler):
    "What follows the first slash says how the file behind the second is served."
    protocol_version = 'HTTP/1.1'
    def log_message(self, *args): pass

    def reply(self, code, body=b'', sent=None, each=1 << 20, wait=0., **headers):
        self.send_response(code)
        for k, v in {'Content-Length': str(len(body)), **{k.replace('_', '-'): v for k, v in headers.items()}}.items(): self.send_header(k, v)
        self.end_headers()
        sent = body if sent is None else sent
        for i in range(0, len(sent), each):
            self.wfile.write(sent[i:i + each]); self.wfile.flush(); time.sleep(wait)
        if len(sent) < len(body): self.close_connection = True

    def do_GET(self):
        s, how, name = self.server, *self.path.strip('/').split('/', 1)
        n = s.asked[self.path] = s.asked[self.path] + 1
        file, wanted = s.files.get(name), self.headers.get('Range')
        if how == 'gone' or file is None: return self.reply(404)
        if how == 'busy' and n < 3: return self.reply(429, Retry_After='0.02')
        if how == 'forbidden': return self.reply(403)
        if how == 'patient': return self.reply(503, Retry_After='86400')
        if how == 'loop': return self.reply(302, Location=self.path)
        if how == 'file': return self.reply(302, Location='file:///etc/passwd')
        if how == 'liar': return self.reply(206 if wanted else 200, file, Content_Range='bytes 7-8/9', ETag='"a"') if n > 1 else self.reply(200, file, file[:90_000], ETag='"a"')
        if how == 'huge': return self.reply(200, file, b'', Content_Length='999999999999')
        if how == 'endless': return self.reply(200, file*40, Transfer_Encoding='identity')
        if how == 'gzip' and 'gzip' in self.headers.get('Accept-Encoding', ''): return self.reply(200, gzip.compress(file), Content_Encoding='gzip')
        tag = '"two"' if how == 'changing' and n > 1 else '"one"'
        ranged = wanted and how not in ('norange',) and (self.headers.get('If-Range') in (None, tag))
        start = int(wanted[6:].split('-')[0]) if ranged else 0
        body, head = (file if how != 'changing' or n == 1 else file[::-1])[start:], dict(ETag=tag) | (dict(Content_Range=f'bytes {start}-{len(file) - 1}/{len(file)}') if ranged else {})
        s.sent[name] += len(body)
        if how == 'drip': return self.reply(206 if ranged else 200, body, each=1, wait=.05, **head)
        if how == 'slow': return self.reply(206 if ranged else 200, body, each=len(file)//8, wait=.02, **head)
        if how in ('cut', 'changing', 'norange') and n < 3: return self.reply(206 if ranged else 200, body, body[:len(body)//2], **head)
        if how == 'stall' and n < 2:
            self.reply(206 if ranged else 200, body, body[:len(body)//2], **head); time.sleep(1.6)
            return
        self.reply(206 if ranged else 200, file[:-1] + b'?' if how == 'wrong' else body, **head)


@pytest.fixture
def net(monkeypatch):
    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        def handle_error(self, *args): pass
    server = Server(('127.0.0.1', 0), Wild)
    server.files, server.asked, server.sent = {'x.glb': FILE}, collections.Counter(), collections.Counter()
    server.url = f'http://127.0.0.1:{server.server_port}'
    for name in ('no_proxy', 'NO_PROXY'): monkeypatch.setenv(name, '127.0.0.1')
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown(); server.server_close()


@pytest.mark.parametrize('how, tries', [('plain', 1), ('cut', 3), ('stall', 2), ('busy', 3), ('norange', 3), ('slow', 1)])
def test_what_can_be_had_is_had(net, tmp_path, how, tries):
    got = download(f'{net.url}/{how}/x.glb', tmp_path/'x.glb', sha(FILE), **QUICK)
    assert (tmp_path/'x.glb').read_bytes() == FILE and got.tries == tries and got.verified
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith('memkit-home')] == ['x.glb'], 'nothing is left beside it'
    if how == 'cut': assert net.sent['x.glb'] < 2*len(FILE), 'it went on where it stopped'


@pytest.mark.parametrize('how, why', [('gone', 'not found'), ('forbidden', 'forbidden'), ('patient', 'rate limited'), ('loop', 'bad address'), ('file', 'bad address'), ('huge', 'too large'), ('endless', 'too large'),
                                      ('wrong', 'wrong checksum'), ('drip', 'stalled'), ('gzip', None)])
def test_what_cannot_be_had_has_its_reason_and_no_file(net, tmp_path, how, why):
    options = QUICK | dict(tries=1, stall=.4) if how == 'drip' else QUICK
    if why is None: # bytes are taken as they are, never unfolded
        assert download(f'{net.url}/{how}/x.glb', tmp_path/'x.glb', sha(FILE), **options).bytes == len(FILE)
        return
    with pytest.raises(DownloadError) as e: download(f'{net.url}/{how}/x.glb', tmp_path/'x.glb', sha(FILE), max_bytes=1_000_000, **options)
    assert e.value.why == why and not (tmp_path/'x.glb').exists()
    if how in ('patient', 'gone', 'forbidden', 'wrong'): assert net.asked[f'/{how}/x.glb'] == 1, 'a server that says come back tomorrow, or never, is not asked again'


def test_the_server_says_how_long_to_wait(net, tmp_path):
    slept = []
    download(f'{net.url}/busy/x.glb', tmp_path/'x.glb', tries=3, meter=Meter(sleep=slept.append))
    assert slept == [.02, .02]
    with pytest.raises(DownloadError): download('http://127.0.0.1:9/x.glb', tmp_path/'y.glb', tries=4, pause=1, meter=Meter(sleep=slept.append))
    waits = slept[2:]
    assert len(waits) == 3 and waits[1] == 2*waits[0] and waits[2] == 4*waits[0] and 1 <= waits[0] <= 3, 'else twice as long each time'


def test_a_file_that_changed_between_two_sittings_is_never_a_mixture(net, tmp_path):
    "The server says so (ETag), or the checksum does; a server that sends another part than asked for is not believed."
    got = download(f'{net.url}/changing/x.glb', tmp_path/'x.glb', **QUICK)
    assert (tmp_path/'x.glb').read_bytes() == FILE[::-1] and not got.verified
    got = download(f'{net.url}/liar/x.glb', tmp_path/'y.glb', **QUICK)
    assert (tmp_path/'y.glb').read_bytes() == FILE and got.tries == 3, 'a part that was not asked for is not believed, and the file begun anew'
    (tmp_path/'.z.glb.part').write_bytes(b'rubbish'*1000) # of an earlier attempt, damaged
    (tmp_path/'.z.glb.json').write_text('{')
    assert download(f'{net.url}/plain/x.glb', tmp_path/'z.glb', sha(FILE), **QUICK).sha256 == sha(FILE)


def test_limits_hold_over_several_threads(net, tmp_path):
    for i in range(6): net.files[f'{i}.glb'] = FILE
    table = tmp_path/'t.csv'
    table.write_text('uid,url\n' + ''.join(f's{i},{net.url}/plain/{i}.glb\n' for i in range(6)))
    start = time.monotonic()
    full = fetch([f's{i}' for i in range(4)], tmp_path/'rate', table, jobs=4, rate_mb=1.2, keep_free_gb=0, load=False, **QUICK)
    assert full.present == 4 and full.unverified == 4 and time.monotonic() - start > .8*4*len(FILE)/1.2e6*.8
    part = fetch([f's{i}' for i in range(6)], tmp_path/'disk', table, jobs=3, max_gb=2.5*len(FILE)/1e9, keep_free_gb=0, load=False, **QUICK)
    assert sum(p.stat().st_size for p in (tmp_path/'disk').glob('**/*.part')) + part.bytes <= 2.5*len(FILE)
    assert part.present <= 2 and set(part.reasons) <= {'disk limit', 'not tried yet'}
    assert fetch([f's{i}' for i in range(6)], tmp_path/'disk', table, keep_free_gb=0, load=False, **QUICK).present == 6, 'the next run goes on'
    with pytest.raises(DownloadError, match='disk limit'): Meter(folder=tmp_path, keep_free=1e18).spend(1)


def run_killed(args, when=lambda: False):
    "Start the command, kill it with SIGKILL as soon as `when()`; True when it had ended before."
    process = subprocess.Popen([sys.executable, '-m', 'memkit', *map(str, args)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    for _ in range(6000):
        if process.poll() is not None: return process.returncode in (0, 1)
        if when(): break
        time.sleep(.02)
    os.killpg(process.pid, signal.SIGKILL); process.wait()
    return False


@pytest.mark.skipif(os.name == 'nt', reason='SIGKILL')
def test_killed_at_random_and_resumed_equals_uninterrupted(net, tmp_path):
    draw, uids = random.Random(3), []
    for i, shape in enumerate(shape_set(10)):
        save_mesh(tmp_path/'made.glb', *shape.mesh(16))
        net.files[f'{i}.glb'] = data = (tmp_path/'made.glb').read_bytes()
        uids.append(sha(data))
    (tmp_path/'table.csv').write_text('uid,url,licence\n' + ''.join(f'{u},{net.url}/slow/{i}.glb,MIT\n' for i, u in enumerate(uids)))
    (tmp_path/'list.csv').write_text('uid,label\n' + ''.join(f'{u},c{i % 2}\n' for i, u in enumerate(uids)))
    command = lambda out: ['data', 'fetch', tmp_path/'list.csv', '--out', out, '--table', tmp_path/'table.csv', '--jobs', 2, '--keep-free-gb', 0, '--no-load']
    assert run_killed(command(tmp_path/'whole'))
    asked, kills = net.asked.copy(), 0
    for _ in range(5):
        enough, late = sum(net.asked.values()) + draw.randint(1, 3), draw.random()*.15
        kills += not run_killed(command(tmp_path/'killed'), lambda: sum(net.asked.values()) >= enough and not time.sleep(late))
    assert kills >= 3, 'the job was too quick to be killed'
    with open(tmp_path/'killed'/'manifest.jsonl', 'ab') as f: f.write(b'{"uid": "torn')
    assert run_killed(command(tmp_path/'killed'))
    state = lambda out: {r['uid']: (r['status'], r['file'], r['bytes'], r['sha256'], r['licence'], r['verified']) for r in map(json.loads, [l for l in (out/'manifest.jsonl').read_text().splitlines() if l.endswith('}')])}
    assert state(tmp_path/'killed') == state(tmp_path/'whole') and len(state(tmp_path/'whole')) == 10
    assert {p.name: p.read_bytes() for p in (tmp_path/'killed').glob('*.glb')} == {p.name: p.read_bytes() for p in (tmp_path/'whole').glob('*.glb')}
    assert not list((tmp_path/'killed').glob('.*.part')), 'no part is left'
    assert sum((net.asked - asked).values()) <= 10 + 2*kills + kills, 'what was there was not asked for again'
    before = net.asked.copy()
    assert run_killed(command(tmp_path/'killed')) and net.asked == before


def test_only_one_process_fetches_into_a_folder(tmp_path):
    with Manifest(tmp_path/'out'):
        with pytest.raises(InputError, match='another process'): fetch(['a'], tmp_path/'out')


@pytest.mark.parametrize('uid', ['../../x', '/etc/passwd', 'a/../b', '..', 'a\0b', '=cmd', 'x'*300, ''])
def test_a_hostile_uid_is_refused_before_anything_is_asked(tmp_path, uid):
    with pytest.raises(InputError, match='not a uid'): fetch([uid], tmp_path/'out')
    assert not (tmp_path/'out').exists()


def test_a_hostile_manifest_and_table_lead_nowhere(net, tmp_path):
    (tmp_path/'outside.glb').write_bytes(FILE)
    out = tmp_path/'out'; out.mkdir()
    (out/'manifest.jsonl').write_text(json.dumps(dict(uid='a', status='present', why='', file='../outside.glb', bytes=len(FILE), sha256=sha(FILE), verified=True, licence='')) + '\n[1]\n{"uid": ["b"]}\nnull\n')
    (tmp_path/'t.csv').write_text(f'uid,url\na,{net.url}/plain/x.glb\n')
    assert fetch(['a'], out, tmp_path/'t.csv', keep_free_gb=0, load=False, **QUICK).present == 1 and (out/'a.glb').read_bytes() == FILE
    for line in ('a,file:///etc/passwd', '../x,http://a.b/c.glb', 'a,http://a.b/c.glb\na,http://a.b/d.glb'):
        (tmp_path/'t.csv').write_text(f'uid,url\n{line}\n')
        with pytest.raises(InputError, match='line [23]'): read_origins(tmp_path/'t.csv')


def test_zip_bombs_stay_folded(tmp_path):
    (tmp_path/'b.gz').write_bytes(gzip.compress(b'[' + b' '*30_000_000 + b']'))
    with pytest.raises(InputError, match='unfolds to more than'): read_gzip_json(tmp_path/'b.gz', 1_000_000)


def test_a_file_that_is_no_mesh_is_counted_as_missing(net, tmp_path):
    mesh = shape_set(1)[0]
    save_mesh(tmp_path/'good.obj', *mesh.mesh(16))
    net.files |= {'good.obj': (tmp_path/'good.obj').read_bytes(), 'scene.glb': b'glTF of nothing', 'model.fbx': b'x'}
    (tmp_path/'t.csv').write_text(f'uid,url\ngood,{net.url}/plain/good.obj\nscene,{net.url}/plain/scene.glb\nmodel,{net.url}/plain/model.fbx\n')
    report = fetch(['good', 'scene', 'model'], tmp_path/'out', tmp_path/'t.csv', keep_free_gb=0, **QUICK)
    assert (report.present, report.reasons) == (1, {'unreadable': 1, 'format': 1}) and '1 of 3 present (33.3%)' in repr(report)
    assert net.asked['/plain/model.fbx'] == 0, 'what memkit cannot read is not fetched'
    asked = net.asked.copy()
    assert fetch(['good', 'scene', 'model'], tmp_path/'out', tmp_path/'t.csv', keep_free_gb=0, **QUICK).reasons == report.reasons and net.asked == asked


def test_fetch_one_never_raises_for_what_the_network_does(tmp_path):
    record = fetch_one('a', Origin('http://127.0.0.1:9/a.glb'), tmp_path, tries=1, pause=0)
    assert (record['status'], record['why']) == ('missing', 'no connection')
