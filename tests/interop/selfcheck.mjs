// SPDX-License-Identifier: MIT OR Apache-2.0

// Proves that the lab itself works: NestJS talks to NestJS through the peers, and everything the protocol pages say about
// values, errors, streams, events and shutdown is seen through the control channel.
//
//   node tests/interop/selfcheck.mjs [--pairs same|all] [--only TEXT] [--sabotage]
//
// --only runs the sections whose title contains TEXT ("nest12 -> nest11 nats", "nest10 tcp lifecycle", "redis"); --sabotage
// starts servers that add wrongly: the run must then fail.

import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { Broker, Peer, eventually, within } from './harness.mjs';

const { values: flags } = parseArgs({
  options: {
    pairs: { type: 'string', default: 'same' },
    only: { type: 'string', default: '' },
    sabotage: { type: 'boolean', default: false },
  },
});

const VERSIONS = [10, 11, 12];
const UNDEFINED = { $undefined: true };
const INTERNAL = { status: 'error', message: 'Internal server error' };
const NO_HANDLER = 'There is no matching message handler defined in the remote service.';

/**
 * The transports, and the options under which they differ. What is promised there:
 * `nobody`: a request without handler is `answered`, `refused` by the broker, or `silent`. `logged`: lines a server logs for
 * an unknown event. `metadata`: NestJS 12 shows a handler the metadata. `headers`: a record may have some. `wild`: how
 * handlers with wildcards are called; on Redis only NestJS 12 answers them. `reused`: since when a closed client works again.
 */
const MODES = [
  { name: 'tcp', nobody: 'answered', logged: 1, metadata: true },
  { name: 'nats', nobody: 'refused', headers: true, wild: '.' },
  { name: 'redis', nobody: 'silent', metadata: true, reused: 12 },
  { name: 'redis wildcards', server: { wildcards: true }, nobody: 'silent', metadata: true, wild: '.', reused: 12 },
  { name: 'rmq', nobody: 'answered', logged: 1, headers: true },
  { name: 'rmq acks', server: { noAck: false }, nobody: 'answered', warned: 1, headers: true },
  { name: 'rmq wildcards', server: { wildcards: true }, client: { wildcards: true }, nobody: 'silent', headers: true, wild: '.', since: 11 },
  { name: 'mqtt', nobody: 'silent', wild: '/', reused: 12 },
  { name: 'mqtt5', nobody: 'silent', headers: true, wild: '/', reused: 12 },
].map((mode) => ({ logged: 0, warned: 0, reused: 10, since: 10, transport: mode.name.split(' ')[0], ...mode }));
const BROKER_OF = { nats: 'nats', redis: 'redis', rmq: 'rmq', mqtt: 'mqtt', mqtt5: 'mqtt' };

let passed = 0;
const failures = [];

/** Runs one named check; its failure is printed and counted, and the run goes on. */
async function check(name, body) {
  try {
    await within(60_000, 'end of the check', Promise.resolve().then(body));
    passed += 1;
  } catch (error) {
    failures.push(name);
    console.log(`FAILED ${name}\n    ${String(error.stack ?? error).replaceAll('\n', '\n    ')}`);
  }
}

/** Runs `body` with peers started through `start`, all stopped afterwards; a peer that does not leave with 0 is an error. */
async function withPeers(body) {
  const peers = [];
  let ended = false;
  const start = async (...args) => {
    const peer = await Peer.start(...args);
    peers.push(peer);
    return peer;
  };
  try {
    await body(start);
    ended = true;
  } finally {
    const codes = await Promise.all(peers.map((peer) => peer.stop()));
    if (ended) assert.deepEqual(codes.filter((code) => code !== 0), [], 'exit codes');
  }
}

function completes(result, ...items) {
  assert.deepEqual({ items: result.items, completed: result.completed, error: result.error }, { items, completed: true, error: null });
}

function fails(result, error, ...items) {
  assert.deepEqual({ items: result.items, failed: result.failed, error: result.error }, { items, failed: true, error });
}

function timesOut(result) {
  assert.deepEqual({ items: result.items, timedOut: result.timedOut, error: result.error }, { items: [], timedOut: true, error: null });
}

/** Every handler, between one client and one server. */
async function handlers(title, mode, client, server) {
  const it = (name, body) => check(`${title}: ${name}`, body);
  const nats = mode.name === 'nats';
  /** Nobody handles that. */
  const unanswered = async (pattern) => {
    const result = await client.send(pattern, 1, { timeout: 300 });
    if (mode.nobody === 'silent') return timesOut(result);
    const refused = `Empty response. There are no subscribers listening to that message ("${pattern}")`;
    if (mode.nobody === 'refused') return assert.equal(result.error.message, refused);
    fails(result, NO_HANDLER);
  };
  const errorsLogged = async () => (await server.call({ cmd: 'stats' })).errors;

  await it('sum, asyncSum, streamSum', async () => {
    for (const cmd of ['sum', 'asyncSum', 'streamSum']) completes(await client.send({ cmd }, [1, 2, 3, 4, 5]), 15);
  });
  await it('streaming gives one reply per element', async () => {
    completes(await client.send({ cmd: 'streaming' }, [1, 2, 3, 4, 5]), 1, 2, 3, 4, 5);
  });
  await it('concurrent', async () => {
    const rows = Array.from({ length: 10 }, (_, row) => Array.from({ length: 10 }, (_, k) => row * 10 + k + 1));
    completes(await client.send({ cmd: 'concurrent' }, rows), true);
  });
  await it('a batch of sums and a batch of echoes', async () => {
    const sums = await client.call({ cmd: 'batch', n: 500, inFlight: 100 });
    assert.deepEqual({ ok: sums.ok, wrong: sums.wrong, failed: sums.failed, timedOut: sums.timedOut }, { ok: 500, wrong: 0, failed: 0, timedOut: 0 });
    const echoes = await client.call({ cmd: 'batch', n: 500, check: 'echo', pattern: 'echo' });
    assert.equal(echoes.ok, 500);
    const wrong = await client.call({ cmd: 'batch', n: 5, check: 'echo', pattern: 'unicode' });
    assert.equal(wrong.wrong + wrong.failed, 5, 'a batch must notice wrong replies');
  });
  await it('echo keeps any JSON', async () => {
    for (const value of ['', '😀 "quoted" \n', 0, -1.5, 1.5e300, false, true, [], {}, [null, { a: { b: [1, null] } }]]) {
      completes(await client.send('echo', value), value);
    }
  });
  await it('null and missing data are refused by the client', async () => {
    for (const data of [null, undefined]) {
      const result = await client.send('echo', data);
      assert.equal(result.error.message, 'The invalid data or message pattern (undefined/null)');
    }
  });
  await it('metadata', async () => {
    completes(await client.send('metadata', {}), null);
    const result = await client.send('metadata', {}, { metadata: { trace: 'abc', tenant: 't' } });
    if (client.version < 12) assert.equal(result.error.message, 'metadata needs NestJS 12');
    else completes(result, server.version >= 12 && mode.metadata ? { trace: 'abc', tenant: 't' } : null);
  });
  await it('each kind of failure', async () => {
    fails(await client.send('fail', { kind: 'message' }), { status: 'error', message: 'boom' });
    fails(await client.send('fail', { kind: 'object' }), { code: 42, message: 'm' });
    fails(await client.send('fail', { kind: 'stream' }), { status: 'error', message: 'boom' }, 1, 2);
    const before = await errorsLogged();
    for (const kind of ['unexpected', 'panic', 'string', 'http']) fails(await client.send('fail', { kind }), INTERNAL);
    const logged = (await errorsLogged()) - before;
    assert.equal(logged, server.version >= 11 ? 3 : 4, 'NestJS 11 and 12 do not log the http exception');
  });
  await it('no handler', async () => {
    await unanswered('nobody.there');
  });
  await it('replies come in the order they are ready', async () => {
    const order = [];
    await client.call({ cmd: 'hold', pattern: 'slow' });
    const slow = async (ms) => completes(await client.send('slow', { ms }).then((result) => (order.push(ms), result)), ms);
    await Promise.all([slow(300), slow(20)]);
    assert.deepEqual(order, [20, 300]);
  });
  await it('never times out and frees its place', async () => {
    timesOut(await client.send('never', 1, { timeout: 100 }));
    assert.equal((await client.call({ cmd: 'stats' })).pending, 0);
  });
  await it('an abandoned stream goes on in the server', async () => {
    const result = await client.send('infinite', 1, { take: 3 });
    assert.deepEqual([result.items, result.taken, result.completed], [[0, 1, 2], true, false]);
    completes(await client.send('infiniteActive', 1), 1);
    assert.equal((await server.call({ cmd: 'stopInfinite' })).infiniteActive, 0);
    completes(await client.send('infiniteActive', 1), 0);
  });
  await it('undefined, null and empty results', async () => {
    completes(await client.send('nullValue', 1), null);
    completes(await client.send('undefinedValue', 1));
    completes(await client.send('emptyStream', 1));
    const broken = await client.send('undefinedItem', 1);
    if (mode.transport === 'rmq') {
      // Its replies have no id, so nothing is left of that one.
      return assert.deepEqual([broken.items, broken.completed], [[1, {}], true]);
    }
    if (client.version >= 12) return completes(broken, 1, UNDEFINED, 3);
    assert.deepEqual([broken.items.length, broken.items[0], Object.keys(broken.items[1])], [2, 1, ['id']]);
  });
  await it('big and wide text', async () => {
    const { items } = await client.send('big', { n: 300_000 });
    assert.ok(items.length === 1 && items[0] === 'x'.repeat(300_000));
    completes(await client.send('length', '😀'.repeat(50_000)), { units: 100_000, bytes: 200_000 });
    completes(await client.send('unicode', 'ß\u2028漢'), '😀ß\u2028漢é');
  });
  await it('events', async () => {
    const before = (await client.send('notifications', 1)).items[0];
    completes(await client.emit('notification', { to: 'you', n: before }), UNDEFINED);
    await eventually('the notification', async () => (await client.send('notifications', 1)).items[0] === before + 1);
    completes(await client.send('lastNotification', 1), { to: 'you', n: before });
  });
  await it('both handlers of one event', async () => {
    const calls = async () => [(await client.send('calls', 'twice#1')).items[0], (await client.send('calls', 'twice#2')).items[0]];
    const [first, second] = await calls();
    completes(await client.emit('twice', 1), UNDEFINED);
    await eventually('both handlers', async () => String(await calls()) === String([first + 1, second + 1]));
    completes(await client.send('twice', 1), { current: 'first', next: 'second' });
  });
  await it('an event handler answers a message, a message handler takes an event', async () => {
    completes(await client.send('eventAnswer', 1), 'answered');
    const before = (await client.send('calls', 'messageAsEvent')).items[0];
    completes(await client.emit('messageAsEvent', 1), UNDEFINED);
    await eventually('the call', async () => (await client.send('calls', 'messageAsEvent')).items[0] === before + 1);
  });
  await it('a failing event handler is logged by NestJS 12 only', async () => {
    const [before, calls] = [await errorsLogged(), (await client.send('calls', 'failingEvent')).items[0]];
    await client.emit('failingEvent', 1);
    await eventually('the call', async () => (await client.send('calls', 'failingEvent')).items[0] === calls + 1);
    assert.equal((await errorsLogged()) - before, server.version >= 12 ? 1 : 0);
  });
  await it('an unknown event is seen where everything goes to one place', async () => {
    const before = await server.call({ cmd: 'stats' });
    await client.emit('nobody.there', 1);
    completes(await client.send('echo', 1), 1);
    const after = await server.call({ cmd: 'stats' });
    assert.deepEqual([after.errors - before.errors, after.warnings - before.warnings], [mode.logged, mode.warned]);
  });
  await it('a handler of one transport only', async () => {
    for (const name of ['tcp', 'nats', 'redis', 'rmq', 'mqtt']) {
      const pattern = `only${name[0].toUpperCase()}${name.slice(1)}`;
      if (BROKER_OF[mode.transport] === name || mode.name === name) completes(await client.send(pattern, 1), name);
      else await unanswered(pattern);
    }
  });
  await it('a buffer is JSON for everyone', async () => {
    completes(await client.send('echo', 1, { base64: 'AP+A' }), { type: 'Buffer', data: [0, 255, 128] });
    completes(await client.send('buffer', 'AP+A'), { type: 'Buffer', data: [0, 255, 128] });
  });
  await it('bad commands are answered', async () => {
    assert.match((await client.call({ cmd: 'nonsense' })).error.message, /^unknown cmd "nonsense"; known: /);
    client.raw('{not json');
    await eventually('the complaint', () => client.reports.find((line) => line.id === null && /^not JSON/.test(line.error.message)));
  });
  if (mode.wild !== undefined) await wildcards(it, mode, client, server, unanswered);
  else await it('the pattern of the context is the text of the wire', async () => completes(await client.send('pattern', 1), 'pattern'));
  await it('headers of a record', async () => {
    completes(await client.send('headers', 1), null);
    const headers = { 'x-version': '1.0', 'X-Many': ['1', '2'] };
    if (['tcp', 'redis'].includes(mode.transport)) {
      return assert.equal((await client.send('headers', 1, { headers })).error.message, `${mode.transport} has no headers`);
    }
    const seen = { 'x-version': ['1.0'], 'X-Many': ['1', '2'] };
    completes(await client.send('headers', { a: 1 }, { headers }), mode.headers ? seen : null);
    completes(await client.send('echo', { a: 1 }, { headers }), { a: 1 });
  });
  if (mode.transport === 'rmq') await rmqHandlers(it, mode, client, server);
  if (BROKER_OF[mode.transport] === 'mqtt') await mqttHandlers(it, mode, client, server);
  if (nats) {
    await it('a stream that fails at once', async () => fails(await client.send('exception', {}), { status: 'error', message: 'test' }));
  }
  await it('a closed client works again', async () => {
    if (client.version < mode.reused) return;
    for (let round = 1; round <= 2; round += 1) {
      assert.equal((await client.call({ cmd: 'reconnect' })).connected, true);
      completes(await client.send('echo', round), round);
    }
  });
  await it('nobody was disturbed', async () => {
    for (const peer of [client, server]) {
      const { exceptions, rejections } = await peer.call({ cmd: 'stats' });
      assert.deepEqual({ exceptions, rejections }, { exceptions: 0, rejections: 0 });
    }
    const { errors, warnings } = await client.call({ cmd: 'stats' });
    assert.deepEqual({ errors, warnings }, { errors: 0, warnings: 0 });
    assert.equal(server.stderr + client.stderr, '');
  });
}

async function wildcards(it, mode, client, server, unanswered) {
  const at = (...words) => words.join(mode.wild);
  const redis = mode.transport === 'redis';
  if (redis && server.version < 12) {
    return it('handlers with wildcards get events, and answer where nobody listens', async () => {
      timesOut(await client.send('time.us.east', 1, { timeout: 200 }));
      await client.emit('wildEvent.x', 1);
      await eventually('the event', async () => (await client.send('subjects', 1)).items[0].includes('wildEvent.x'));
    });
  }
  await it('wildcards', async () => {
    completes(await client.send(at('time', 'us', 'east'), 1), at('time', 'us', 'east'));
    completes(await client.send(at('wild', 'a', 'b', 'c'), 1), at('wild', 'a', 'b', 'c'));
    // A glob of Redis takes any text.
    if (!redis) await unanswered(at('time', 'us', 'east', 'coast'));
    await client.emit(at('wildEvent', 'x'), 1);
    await eventually('the event', async () => (await client.send('subjects', 1)).items[0].includes(at('wildEvent', 'x')));
  });
  await it("the patterns of NestJS's own suites", async () => {
    for (const name of ['math', 'async', 'stream']) completes(await client.send(at(name, 'sum'), [1, 2, 3]), 6);
    completes(await client.send(at('streaming', 'sum'), [1, 2, 3]), 1, 2, 3);
    const result = await client.send(at('broadcast', 'test'), {}, { take: 1 });
    assert.deepEqual([result.items, result.taken], [[1], true]);
  });
}

async function rmqHandlers(it, mode, client, server) {
  await it('every property of a record', async () => {
    const record = { priority: 3, expiration: 60_000, contentType: 'application/json', contentEncoding: 'utf-8', messageId: 'm1', timestamp: 1234, type: 't', appId: 'lab', persistent: true };
    const { items } = await client.send('delivery', { a: 1 }, { record });
    const { contentType, priority, expiration, messageId, timestamp, type, appId, deliveryMode } = items[0];
    assert.deepEqual(
      { contentType, priority, expiration, messageId, timestamp, type, appId, deliveryMode },
      { contentType: 'application/json', priority: 3, expiration: '60000', messageId: 'm1', timestamp: 1234, type: 't', appId: 'lab', deliveryMode: 2 },
    );
  });
  if (mode.name !== 'rmq') return;
  await it('bytes that are no packet are an unknown event', async () => {
    const before = (await server.call({ cmd: 'stats' })).errors;
    const queue = (await client.send('delivery', 1)).items[0].routingKey;
    await client.call({ cmd: 'raw', address: queue, text: 'not json' });
    completes(await client.send('echo', 1), 1);
    assert.equal((await server.call({ cmd: 'stats' })).errors - before, 1);
  });
}

async function mqttHandlers(it, mode, client, server) {
  await it('qos and properties of a record', async () => {
    const { items } = await client.send('delivery', 1, { record: { qos: 1, properties: { contentType: 'json' } } });
    assert.equal(items[0].qos, 0, 'the lower one of publisher and subscription');
    assert.equal(items[0].properties?.contentType, mode.name === 'mqtt5' ? 'json' : undefined);
  });
  await it('extras.qos of a handler', async () => {
    await client.emit('qosEvent', 1, { record: { qos: 2 } });
    const qos = server.version >= 11 ? 1 : 0;
    await eventually('the event', async () => (await client.send('subjects', 1)).items[0].includes(qos));
  });
  await it('shared subscriptions: the reply goes to the plain topic', async () => {
    assert.equal((await client.send('shared/k', 1)).completed, true);
    await client.emit('sharedEvent/k', 1);
    await eventually('the event', async () => (await client.send('subjects', 1)).items[0].includes('sharedEvent/k'));
  });
  await it('the client takes a member named options out of any payload', async () => {
    completes(await client.send('echo', { a: 1, options: { b: 2 } }), client.version === 10 ? { a: 1, options: { b: 2 } } : { a: 1 });
  });
}

/** What a major version does on its own: connections, closing, options, processes. */
async function lifecycleTcp(v) {
  const title = `nest${v} tcp lifecycle`;
  if (!title.includes(flags.only)) return;
  const it = (name, body) => check(`${title}: ${name}`, () => withPeers(body));
  const pair = async (start, options = {}, more = []) => {
    const args = ['--transport', 'tcp', '--options', JSON.stringify(options)];
    const server = await start(v, 'server', args);
    const client = await start(v, 'client', ['--transport', 'tcp', '--url', tcpUrl(server), ...more]);
    return [server, client];
  };

  await it('a closed server fails what is pending', async (start) => {
    const [server, client] = await pair(start);
    completes(await client.send('echo', 1), 1);
    const pending = client.send('slow', { ms: 500 });
    await eventually('the call to run', async () => (await server.call({ cmd: 'stats' })).slowRunning === 1);
    const closed = server.call({ cmd: 'close' });
    const result = await pending;
    // NestJS 10 only stops listening: open connections and their replies live on, and close() waits for them.
    if (v === 10) completes(result, 500);
    else fails(result, { $error: 'Error', message: 'Connection closed' });
    await client.call({ cmd: 'close' });
    assert.equal((await closed).closed, true);
    const refused = await client.send('echo', 1);
    assert.equal(refused.error.code, 'ECONNREFUSED');
  });
  await it('a killed server fails what is pending', async (start) => {
    const [server, client] = await pair(start);
    const pending = client.send('never', 1);
    await eventually('the call to arrive', async () => (await server.call({ cmd: 'stats' })).calls.never === 1);
    void server.call({ cmd: 'exit' }).catch(() => {});
    fails(await pending, { $error: 'Error', message: 'Connection closed' });
  });
  await it('status and reconnect', async (start) => {
    const [server, client] = await pair(start);
    assert.equal((await client.call({ cmd: 'connect' })).connected, true);
    completes(await client.send('echo', 1), 1);
    assert.equal((await client.call({ cmd: 'reconnect' })).connected, true);
    completes(await client.send('echo', 2), 2);
    const ofClient = await client.call({ cmd: 'status' });
    const ofServer = await server.call({ cmd: 'status' });
    if (v === 10) return assert.deepEqual([ofClient.supported, ofServer.supported], [false, false]);
    assert.deepEqual([ofClient.supported, ofClient.current, ofClient.history[0]], [true, 'connected', 'connected']);
    assert.deepEqual(ofServer.history, ['connected']);
    await client.call({ cmd: 'close' });
    await eventually('disconnected', async () => (await client.call({ cmd: 'status' })).current === 'disconnected');
  });
  await it('garbage closes the connection and nothing else', async (start) => {
    const [server, client] = await pair(start);
    assert.equal(await rawExchange(server.ready.port, 'abc#{}'), '');
    assert.equal(await rawExchange(server.ready.port, '3#{"a'), '');
    completes(await client.send('echo', 1), 1);
    const { errors, exceptions, rejections } = await server.call({ cmd: 'stats' });
    assert.deepEqual({ errors, exceptions, rejections }, { errors: 2, exceptions: 0, rejections: 0 });
    const logged = server.reports.filter((line) => line.event === 'log').map((line) => line.message);
    assert.match(logged[0], /Corrupted length value/);
  });
  await it('the length counts UTF-16 units', async (start) => {
    const [server] = await pair(start);
    const request = '{"pattern":"echo","data":"😀","id":"1"}';
    const reply = await rawExchange(server.ready.port, `${request.length}#${request}`, '}');
    assert.equal(reply, '44#{"response":"😀","isDisposed":true,"id":"1"}');
  });
  await it('options pass through: maxBufferSize', async (start) => {
    const [server, client] = await pair(start, { maxBufferSize: 2000 });
    completes(await client.send('length', 'x'.repeat(1000)), { units: 1000, bytes: 1000 });
    const result = await client.send('length', 'x'.repeat(3000));
    // NestJS 10 has no such limit.
    if (v === 10) completes(result, { units: 3000, bytes: 3000 });
    else fails(result, { $error: 'Error', message: 'Connection closed' });
    assert.equal((await server.call({ cmd: 'stats' })).exceptions, 0);
  });
  await it('tls', async (start) => {
    const { key, cert } = keyPair();
    const [, client] = await pair(start, { tlsOptions: { key, cert } }, ['--options', JSON.stringify({ tlsOptions: { ca: cert } })]);
    completes(await client.send({ cmd: 'concurrent' }, [[1, 2], [3]]), true);
    completes(await client.send('echo', 'over tls'), 'over tls');
  });
  await it('wrapped errors', async (start) => {
    const [, client] = await pair(start, {}, ['--wrap-errors']);
    const { error } = await client.send('nobody.there', 1);
    assert.deepEqual(error, { $error: 'RpcException', message: NO_HANDLER, error: NO_HANDLER });
  });
  await it('a port in use is an error', async (start) => {
    const [server] = await pair(start);
    await assert.rejects(start(v, 'server', ['--transport', 'tcp', '--url', tcpUrl(server)]), /EADDRINUSE/);
  });
  await check(`${title}: SIGTERM and exit`, async () => {
    const first = await Peer.start(v, 'server', ['--transport', 'tcp']);
    const client = await Peer.start(v, 'client', ['--transport', 'tcp', '--url', tcpUrl(first)]);
    client.send('never', 1).catch(() => {});
    await eventually('the call', async () => (await first.call({ cmd: 'stats' })).calls.never === 1);
    client.child.kill('SIGTERM');
    first.child.kill('SIGTERM');
    assert.deepEqual(await within(5_000, 'exit', Promise.all([client.exited, first.exited])), [0, 0]);
    const second = await Peer.start(v, 'server', ['--transport', 'tcp']);
    second.call({ cmd: 'exit', code: 7 }).catch(() => {});
    assert.equal(await within(5_000, 'exit', second.exited), 7);
  });
}

async function lifecycleNats(v, url) {
  const title = `nest${v} nats lifecycle`;
  if (!title.includes(flags.only)) return;
  const it = (name, body) => check(`${title}: ${name}`, () => withPeers(body));
  const args = (more) => ['--transport', 'nats', '--url', url, ...more];

  await it('a queue group gives each request to one server', async (start) => {
    const servers = await Promise.all(['a', 'b'].map((name) => start(v, 'server', args(['--queue', 'workers', '--name', name]))));
    const client = await start(v, 'client', args([]));
    const names = await Promise.all(Array.from({ length: 60 }, () => client.send('whoami', 1)));
    const calls = await Promise.all(servers.map(async (server) => (await server.call({ cmd: 'stats' })).calls.whoami ?? 0));
    assert.equal(calls[0] + calls[1], 60);
    assert.ok(calls[0] > 0 && calls[1] > 0, `both work: ${calls}`);
    assert.deepEqual([...new Set(names.map((result) => result.items[0]))].sort(), ['a', 'b']);
  });
  await it('extras.queue of a handler, and none without it', async (start) => {
    const servers = await Promise.all(['a', 'b'].map((name) => start(v, 'server', args(['--name', name]))));
    const client = await start(v, 'client', args([]));
    const received = async (pattern) => {
      await Promise.all(Array.from({ length: 40 }, () => client.send(pattern, 1)));
      const all = await Promise.all(servers.map((server) => server.call({ cmd: 'stats' })));
      return all.reduce((sum, stats) => sum + (stats.calls[pattern] ?? 0), 0);
    };
    assert.equal(await received('queued'), v === 10 ? 80 : 40, 'NestJS 10 does not know extras.queue');
    assert.equal(await received('whoami'), 80);
  });
  await it('static headers of the client, overridden by the call', async (start) => {
    await start(v, 'server', args([]));
    const client = await start(v, 'client', args(['--options', '{"headers":{"x-static":"s","x-over":"client"}}']));
    completes(await client.send('headers', 1), { 'x-static': ['s'], 'x-over': ['client'] });
    completes(await client.send('headers', 1, { headers: { 'x-over': 'call' } }), { 'x-over': ['call'], 'x-static': ['s'] });
  });
  await it('a closed server leaves what is pending', async (start) => {
    const server = await start(v, 'server', args([]));
    const client = await start(v, 'client', args([]));
    const pending = client.send('slow', { ms: 300 }, { timeout: 1_000 });
    await eventually('the call to run', async () => (await server.call({ cmd: 'stats' })).slowRunning === 1);
    assert.equal((await server.call({ cmd: 'close' })).closed, true);
    timesOut(await pending);
    assert.match((await client.send('echo', 1)).error.message, /^Empty response/);
  });
  await it('closing the client with a pending call', async (start) => {
    await start(v, 'server', args([]));
    const client = await start(v, 'client', args([]));
    const pending = client.send('never', 1, { timeout: 500 });
    completes(await client.send('echo', 1), 1);
    assert.equal((await client.call({ cmd: 'close' })).closed, true);
    // NestJS 12 fails it, 10 and 11 let it hang.
    if (v >= 12) fails(await pending, { $error: 'Error', message: 'Connection closed' });
    else timesOut(await pending);
    completes(await client.send('echo', 2), 2);
  });
  await it('a graceful shutdown answers what is running', async (start) => {
    const options = ['--options', '{"gracefulShutdown":true,"gracePeriod":1000}'];
    const server = await start(v, 'server', args(options));
    const client = await start(v, 'client', args([]));
    const pending = client.send('slow', { ms: 300 }, { timeout: 2_000 });
    await eventually('the call to run', async () => (await server.call({ cmd: 'stats' })).slowRunning === 1);
    assert.equal((await server.call({ cmd: 'close' })).closed, true);
    // NestJS 10 has no graceful shutdown.
    if (v === 10) timesOut(await pending);
    else completes(await pending, 300);
  });
  await check(`${title}: the broker restarts`, async () => {
    let broker = await Broker.start('nats');
    try {
      await withPeers(async (start) => {
        const quick = ['--transport', 'nats', '--url', broker.url, '--options', '{"reconnectTimeWait":100,"maxReconnectAttempts":-1}'];
        const server = await start(v, 'server', quick);
        const client = await start(v, 'client', quick);
        completes(await client.send('echo', 1), 1);
        await broker.stop();
        await eventually('the client to notice', () => client.reports.some((line) => line.event === 'log' && /disconnect/.test(line.message)));
        const meanwhile = await client.send('echo', 1, { timeout: 300 });
        if (v === 10) timesOut(meanwhile);
        else fails(meanwhile, 'Error: Connection lost. Trying to reconnect...');
        broker = await Broker.start('nats', broker.port);
        await eventually('the service to be back', async () => (await client.send('echo', 1, { timeout: 300 })).completed);
        const status = await client.call({ cmd: 'status' });
        assert.deepEqual(status.history, v === 10 ? [] : ['connected', 'disconnected', 'reconnecting', 'connected']);
        const { exceptions, rejections } = await server.call({ cmd: 'stats' });
        assert.deepEqual({ exceptions, rejections }, { exceptions: 0, rejections: 0 });
      });
    } finally {
      await broker.stop();
    }
  });
  await check(`${title}: no broker is an error`, async () => {
    const nowhere = ['--transport', 'nats', '--url', 'nats://127.0.0.1:1'];
    await assert.rejects(Peer.start(v, 'server', nowhere), /did not start: .*(CONNECTION_REFUSED|connection refused)/);
    await withPeers(async (start) => {
      const client = await start(v, 'client', nowhere);
      assert.ok((await client.send('echo', 1)).failed);
    });
  });
  await it('an empty body', async (start) => {
    const server = await start(v, 'server', args([]));
    const client = await start(v, 'client', args([]));
    completes(await client.send('echo', 1), 1);
    await rawExchange(Number(new URL(url).port), 'CONNECT {}\r\nPUB echo 0\r\n\r\nPING\r\n', 'PONG');
    await eventually('the report', async () => {
      const { rejections, errors } = await server.call({ cmd: 'stats' });
      // A rejection would have ended a process without the lab's watching.
      return v >= 12 ? rejections === 0 && errors === 1 : rejections === 1 && errors === 0;
    });
    assert.equal(server.reports.filter((line) => line.event === 'uncaught').length, v >= 12 ? 0 : 1);
  });
}

/** Writes `text` to a TCP port; resolves with what came back once it ends with `until` or the connection was closed. */
function rawExchange(port, text, until) {
  const exchange = new Promise((resolve, reject) => {
    let received = '';
    const socket = connect(port, '127.0.0.1', () => socket.write(text));
    socket.setEncoding('utf8');
    socket.on('error', reject);
    socket.on('data', (data) => {
      received += data;
      if (until !== undefined && received.trimEnd().endsWith(until)) socket.destroy();
    });
    socket.on('close', () => resolve(received));
  });
  return within(5_000, `answer to ${JSON.stringify(text)}`, exchange);
}

let cachedKeyPair;
/** A self-signed certificate for 127.0.0.1. */
function keyPair() {
  if (cachedKeyPair !== undefined) return cachedKeyPair;
  const directory = mkdtempSync(join(tmpdir(), 'interop-tls-'));
  try {
    const [key, cert] = [join(directory, 'key.pem'), join(directory, 'cert.pem')];
    const curve = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes'];
    const subject = ['-subj', '/CN=localhost', '-addext', 'subjectAltName=DNS:localhost,IP:127.0.0.1'];
    execFileSync('openssl', ['req', '-x509', ...curve, ...subject, '-days', '2', '-keyout', key, '-out', cert], { stdio: 'pipe' });
    cachedKeyPair = { key: readFileSync(key, 'utf8'), cert: readFileSync(cert, 'utf8') };
    return cachedKeyPair;
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

function tcpUrl(server) {
  return `tcp://127.0.0.1:${server.ready.port}`;
}

let serial = 0;

/** Starts one client and one server that find each other, with these options of each. */
async function startPair(start, mode, url, clientVersion, serverVersion, more = {}) {
  const queue = mode.transport === 'rmq' ? ['--queue', `selfcheck-${(serial += 1)}`] : [];
  const where = ['--transport', mode.transport, ...(url === undefined ? [] : ['--url', url]), ...queue];
  const options = (side) => ['--options', JSON.stringify({ ...mode[side], ...more[side] })];
  const server = await start(serverVersion, 'server', [...where, ...options('server'), ...(flags.sabotage ? ['--sabotage'] : [])]);
  if (mode.transport === 'tcp') where.push('--url', tcpUrl(server));
  const client = await start(clientVersion, 'client', [...where, ...options('client')]);
  return [client, server, where];
}

/** One client and one server over one transport, through every handler. */
async function exchange(clientVersion, serverVersion, mode, url) {
  const title = `nest${clientVersion} -> nest${serverVersion} ${mode.name}`;
  if (!title.includes(flags.only) || Math.min(clientVersion, serverVersion) < mode.since) return;
  await check(`${title}: peers start and leave`, () =>
    withPeers(async (start) => {
      const [client, server] = await startPair(start, mode, url, clientVersion, serverVersion);
      await handlers(title, mode, client, server);
    }),
  );
}

/** How a client and a server of NestJS are told to come back soon. */
const QUICK = {
  redis: { retryAttempts: 1_000, retryDelay: 50 },
  rmq: { socketOptions: { reconnectTimeInSeconds: 1 } },
  mqtt: { reconnectPeriod: 50 },
  mqtt5: { reconnectPeriod: 50 },
};

/** What a major version does on its own over Redis, RabbitMQ or MQTT. */
async function lifecycleBroker(v, mode, url) {
  const title = `nest${v} ${mode.name} lifecycle`;
  if (!title.includes(flags.only)) return;
  const it = (name, body) => check(`${title}: ${name}`, () => withPeers(body));
  const kind = BROKER_OF[mode.transport];

  await it('a killed server leaves what is pending', async (start) => {
    const [client, server] = await startPair(start, mode, url, v, v);
    const pending = client.send('never', 1, { timeout: 400 });
    await eventually('the call to arrive', async () => (await server.call({ cmd: 'stats' })).calls.never === 1);
    server.call({ cmd: 'exit' }).catch(() => {});
    timesOut(await pending);
  });
  await check(`${title}: no broker`, () =>
    withPeers(async (start) => {
      const nowhere = ['--transport', mode.transport, '--url', `${new URL(url).protocol}//127.0.0.1:1`];
      const client = await start(v, 'client', nowhere);
      const result = await client.send('echo', 1, { timeout: 3_000 });
      assert.ok(result.failed, JSON.stringify(result));
      if (kind === 'redis') await assert.rejects(Peer.start(v, 'server', nowhere), /did not start: .*Connection is closed/);
    }),
  );
  await it('several servers', async (start) => {
    const [client, first, where] = await startPair(start, mode, url, v, v);
    const second = await start(v, 'server', where);
    await client.call({ cmd: 'hold', pattern: 'whoami' });
    await Promise.all(Array.from({ length: 40 }, () => client.send('whoami', 1)));
    const counts = async (pattern) =>
      Promise.all([first, second].map(async (server) => (await server.call({ cmd: 'stats' })).calls[pattern] ?? 0));
    // A queue gives each message to one of its consumers; everywhere else all subscribers get it.
    const each = kind === 'rmq' ? [20, 20] : [40, 40];
    await eventually('all calls', async () => String(await counts('whoami')) === String(each));
    if (kind !== 'mqtt') return;
    await client.call({ cmd: 'hold', pattern: 'shared/k' });
    await Promise.all(Array.from({ length: 40 }, () => client.send('shared/k', 1)));
    const shared = await counts('$share/lab/shared/+');
    assert.equal(shared[0] + shared[1], 40);
    assert.ok(shared[0] > 0 && shared[1] > 0, String(shared));
  });
  if (kind === 'rmq') await exchanges(it, v, mode, url);
  await check(`${title}: the broker restarts`, async () => {
    let broker = await Broker.start(kind);
    try {
      await withPeers(async (start) => {
        const quick = { server: QUICK[mode.transport], client: QUICK[mode.transport] };
        const [client, server] = await startPair(start, mode, broker.url, v, v, quick);
        completes(await client.send('echo', 1), 1);
        await broker.stop();
        await eventually('the client to notice', async () => {
          const { failed } = await client.send('echo', 1, { timeout: 300 });
          // NestJS 10 over RabbitMQ and MQTT does not tell, it waits.
          return failed || v === 10;
        });
        broker = await Broker.start(kind, broker.port);
        const back = async () => (await client.send('echo', 1, { timeout: 300 })).completed;
        await eventually('the service to be back', back, 15_000);
        const { exceptions, rejections } = await server.call({ cmd: 'stats' });
        assert.deepEqual({ exceptions, rejections }, { exceptions: 0, rejections: 0 });
      });
    } finally {
      await broker.stop();
    }
  });
}

/** RabbitMQ's exchanges, which NestJS 10 does not have. */
async function exchanges(it, v, mode, url) {
  if (v < 11) return;
  const meet = async (start, options, servers = 1, queue) => {
    const where = ['--transport', 'rmq', '--url', url, '--options', JSON.stringify(options)];
    const started = [];
    for (let i = 0; i < servers; i += 1) started.push(await start(v, 'server', [...where, ...(queue ? ['--queue', queue] : [])]));
    const client = await start(v, 'client', [...where, ...(queue ? ['--queue', queue] : [])]);
    return [client, ...started];
  };
  await it('a topic exchange with a routing key', async (start) => {
    const [client] = await meet(start, { exchange: `topic-${v}`, exchangeType: 'topic', routingKey: 'to.#' }, 1, `of-topic-${v}`);
    completes(await client.send({ cmd: 'sum' }, [1, 2]), 3);
    const before = (await client.send('notifications', 1)).items[0];
    const text = JSON.stringify({ pattern: 'notification', data: 1 });
    await client.call({ cmd: 'raw', exchange: `topic-${v}`, address: 'to.any.where', text });
    await eventually('the event', async () => (await client.send('notifications', 1)).items[0] === before + 1);
  });
  await it('a fanout exchange: every service gets it', async (start) => {
    const options = { exchange: `fanout-${v}`, exchangeType: 'fanout', queueOptions: { exclusive: true } };
    const [client, ...servers] = await meet(start, options, 2);
    completes(await client.send({ cmd: 'sum' }, [1, 2]), 3);
    await client.emit('notification', 1);
    for (const server of servers) {
      await eventually('the event', async () => (await server.call({ cmd: 'stats' })).notifications === 1);
    }
  });
  await it('a headers exchange: requests go to the queue', async (start) => {
    const [client] = await meet(start, { exchange: `headers-${v}`, exchangeType: 'headers' }, 1, `of-headers-${v}`);
    completes(await client.send({ cmd: 'sum' }, [1, 2], { headers: { to: 'sum' } }), 3);
  });
  await it('a message that was not acknowledged is delivered again', async (start) => {
    const where = ['--transport', 'rmq', '--url', url, '--queue', `acks-${v}`, '--options', '{"noAck":false}'];
    const first = await start(v, 'server', where);
    const client = await start(v, 'client', where.slice(0, -2));
    const pending = client.send('slow', { ms: 700 }, { timeout: 10_000 });
    await eventually('the call to run', async () => (await first.call({ cmd: 'stats' })).slowRunning === 1);
    first.call({ cmd: 'exit' }).catch(() => {});
    await start(v, 'server', where);
    completes(await pending, 700);
  });
}

const started = Date.now();
const brokers = {};
const wantedModes = MODES.filter(({ name }) => VERSIONS.some((v) => VERSIONS.some((w) => `nest${v} -> nest${w} ${name} nest${v} ${name} lifecycle`.includes(flags.only))));
try {
  const urlOf = async ({ transport }) => {
    const kind = BROKER_OF[transport];
    if (kind === undefined) return undefined;
    brokers[kind] ??= await Broker.start(kind);
    return brokers[kind].url;
  };
  for (const mode of wantedModes) {
    const url = await urlOf(mode);
    for (const serverVersion of VERSIONS) {
      for (const clientVersion of flags.pairs === 'all' ? VERSIONS : [serverVersion]) {
        await exchange(clientVersion, serverVersion, mode, url);
      }
    }
    for (const version of VERSIONS) {
      if (mode.name === 'tcp') await lifecycleTcp(version);
      else if (mode.name === 'nats') await lifecycleNats(version, url);
      else if (!mode.name.includes(' ')) await lifecycleBroker(version, mode, url);
    }
  }
} finally {
  for (const broker of Object.values(brokers)) await broker.stop();
}
console.log(`${passed} passed, ${failures.length} failed (${((Date.now() - started) / 1000).toFixed(1)} s)`);
process.exit(failures.length > 0 || passed === 0 ? 1 : 0);
