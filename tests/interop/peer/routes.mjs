// SPDX-License-Identifier: MIT OR Apache-2.0

// What the server peer answers: the handlers of the issue, those of NestJS's own integration suite, and the odd cases.

import { hasWildcards, transports } from './transports.mjs';

/** The routes over `state`, whose counters `stats` shows. `self()` gives a client of this very service. */
export function buildRoutes(nest, state, { flags, self }) {
  const { name, sabotage, transport: transportName } = flags;
  const wire = transports[transportName];
  const { BadRequestException } = nest.common;
  const { RpcException, Transport } = nest.microservices;
  const { EMPTY, NEVER, Observable, concat, firstValueFrom, from, interval, of, takeUntil, throwError } = nest.rxjs;

  const routes = [];
  const counted = (kind, pattern, handle, { transport, extras, label } = {}) => {
    const key = label ?? (typeof pattern === 'string' ? pattern : JSON.stringify(pattern));
    const run = (data, ctx) => {
      state.calls[key] = (state.calls[key] ?? 0) + 1;
      return acknowledged(ctx, () => handle(data, ctx));
    };
    routes.push({ kind, pattern, transport, extras, handle: run });
  };
  // With `noAck: false` NestJS leaves it to the handler. The chain of an event has one message, which may be acked once.
  const acked = new WeakSet();
  const acknowledged = (ctx, handle) => {
    if (transportName !== 'rmq' || flags.options.noAck !== false) return handle();
    const ack = () => {
      if (acked.has(ctx.getMessage())) return;
      acked.add(ctx.getMessage());
      ctx.getChannelRef().ack(ctx.getMessage());
    };
    let result;
    try {
      result = handle();
    } catch (error) {
      ack();
      throw error;
    }
    if (typeof result?.then === 'function') return result.finally(ack);
    ack();
    return result;
  };
  const message = (pattern, handle, more) => counted('message', pattern, handle, more);
  const event = (pattern, handle, more) => counted('event', pattern, handle, more);
  const onNats = { transport: Transport.NATS };
  const add = (numbers) => (numbers ?? []).reduce((a, b) => a + b);

  message({ cmd: 'sum' }, (numbers) => add(numbers) + (sabotage ? 1 : 0));
  message({ cmd: 'asyncSum' }, async (numbers) => add(numbers));
  message({ cmd: 'streamSum' }, (numbers) => of(add(numbers)));
  message({ cmd: 'streaming' }, (numbers) => from(numbers));
  message({ cmd: 'concurrent' }, async (rows) => {
    const client = await self();
    const sums = await Promise.all(rows.map((row) => firstValueFrom(client.send({ cmd: 'sum' }, row))));
    return sums.every((sum, i) => sum === add(rows[i]));
  });

  message('echo', (data) => data);
  message('metadata', (_, ctx) => ctx.getMetadata?.() ?? null);
  const address = (ctx) => ctx.getPattern?.() ?? ctx.getSubject?.() ?? ctx.getChannel?.() ?? ctx.getTopic();
  message('pattern', (_, ctx) => address(ctx));
  message('headers', (_, ctx) => {
    const headers = wire.headers?.(ctx);
    return headers && Object.keys(headers).length > 0 ? headers : null;
  });
  message('delivery', (_, ctx) => wire.delivery?.(ctx) ?? null);
  message('whoami', () => name);

  message('fail', (data) => {
    switch (data?.kind) {
      case 'message':
        throw new RpcException('boom');
      case 'object':
        throw new RpcException({ code: 42, message: 'm' });
      case 'unexpected':
      case 'panic':
        throw new Error('a secret of the server');
      case 'string':
        throw 'a thrown string';
      case 'http':
        throw new BadRequestException('bad request');
      case 'stream':
        return concat(of(1, 2), throwError(() => new RpcException('boom')));
      default:
        throw new RpcException(`unknown kind ${JSON.stringify(data?.kind)}`);
    }
  });

  message('slow', async ({ ms }) => {
    state.slowRunning += 1;
    try {
      await new Promise((done) => setTimeout(done, ms));
      return ms;
    } finally {
      state.slowRunning -= 1;
    }
  });
  message('slowRunning', () => state.slowRunning);
  message('never', () => NEVER);
  message(
    'infinite',
    () =>
      new Observable((subscriber) => {
        state.infiniteActive += 1;
        const inner = interval(10).pipe(takeUntil(state.stopInfinite)).subscribe(subscriber);
        return () => {
          state.infiniteActive -= 1;
          inner.unsubscribe();
        };
      }),
  );
  message('infiniteActive', () => state.infiniteActive);

  message('undefinedItem', () => of(1, undefined, 3));
  message('emptyStream', () => EMPTY);
  message('nullValue', () => null);
  message('undefinedValue', () => undefined);
  message('big', ({ n }) => 'x'.repeat(n));
  message('length', (text) => ({ units: text.length, bytes: Buffer.byteLength(text) }));
  message('unicode', (text) => `😀${text}é`);
  message('buffer', (text) => Buffer.from(text, 'base64'));

  event('notification', (data) => {
    state.notifications += 1;
    state.lastNotification = data;
  });
  message('notifications', () => state.notifications);
  message('lastNotification', () => state.lastNotification ?? null);
  event('twice', () => 'first', { label: 'twice#1' });
  event('twice', () => 'second', { label: 'twice#2' });
  event('eventAnswer', () => 'answered');
  message('messageAsEvent', () => 'nobody reads this');
  event('failingEvent', () => {
    throw new RpcException('boom');
  });
  message('calls', (key) => state.calls[key] ?? 0);

  for (const { id } of Object.values(transports)) {
    const only = id[0] + id.slice(1).toLowerCase();
    message(`only${only}`, () => only.toLowerCase(), { transport: Transport[id] });
  }

  // Several servers answer one request.
  const broadcast = () => concat(of(1), NEVER);
  if (wire.topics === undefined) return routes;
  if (hasWildcards(flags)) {
    const wild = (...words) => words.join(wire.topics.separator);
    const { one, rest } = wire.topics;
    message(wild('time', 'us', one), (_, ctx) => address(ctx));
    message(wild('wild', rest), (_, ctx) => address(ctx));
    event(wild('wildEvent', one), (_, ctx) => void state.subjects.push(address(ctx)));
    message('subjects', () => state.subjects);

    // The patterns NestJS's own NATS suite uses.
    message(wild('math', one), add);
    message(wild('async', one), async (numbers) => add(numbers));
    message(wild('stream', one), (numbers) => of(add(numbers)));
    message(wild('streaming', one), (numbers) => from(numbers));
    message(wild('broadcast', one), broadcast);
  } else {
    message('broadcast.test', broadcast);
  }
  message('exception', () => throwError(() => new RpcException('test')));
  if (transportName === 'nats') message('queued', () => name, { extras: { queue: 'lab' } });
  if (transportName === 'mqtt') {
    message('$share/lab/shared/+', () => name);
    event('$share/lab/sharedEvent/+', (_, ctx) => void state.subjects.push(address(ctx)));
    event('qosEvent', (_, ctx) => void state.subjects.push(ctx.getPacket().qos), { extras: { qos: 1 } });
  }

  return routes;
}
