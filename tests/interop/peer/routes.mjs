// SPDX-License-Identifier: MIT OR Apache-2.0

// What the server peer answers: the handlers of the issue, those of NestJS's own integration suite, and the odd cases.

/** The routes over `state`, whose counters `stats` shows. `self()` gives a client of this very service. */
export function buildRoutes(nest, state, { name, sabotage, self }) {
  const { BadRequestException } = nest.common;
  const { RpcException, Transport } = nest.microservices;
  const { EMPTY, NEVER, Observable, concat, firstValueFrom, from, interval, of, takeUntil, throwError } = nest.rxjs;

  const routes = [];
  const counted = (kind, pattern, handle, { transport, extras, label } = {}) => {
    const key = label ?? (typeof pattern === 'string' ? pattern : JSON.stringify(pattern));
    const run = (data, ctx) => {
      state.calls[key] = (state.calls[key] ?? 0) + 1;
      return handle(data, ctx);
    };
    routes.push({ kind, pattern, transport, extras, handle: run });
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
  message('pattern', (_, ctx) => ctx.getPattern?.() ?? ctx.getSubject());
  message('headers', (_, ctx) => headerMap(ctx.getHeaders?.()));
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

  // Only where NestJS has wildcards and queue groups.
  const subject = (_, ctx) => ctx.getSubject();
  message('time.us.*', subject, onNats);
  message('wild.>', subject, onNats);
  event('wildEvent.*', (_, ctx) => void state.subjects.push(ctx.getSubject()), onNats);
  message('subjects', () => state.subjects, onNats);
  message('queued', () => name, { ...onNats, extras: { queue: 'lab' } });
  message('onlyNats', () => 'nats', onNats);
  message('onlyTcp', () => 'tcp', { transport: Transport.TCP });

  // The patterns NestJS's own NATS suite uses.
  message('math.*', add, onNats);
  message('async.*', async (numbers) => add(numbers), onNats);
  message('stream.*', (numbers) => of(add(numbers)), onNats);
  message('streaming.*', (numbers) => from(numbers), onNats);
  message('exception', () => throwError(() => new RpcException('test')), onNats);
  message('broadcast.*', () => concat(of(1), NEVER), onNats);

  return routes;
}

/** Headers as `{name: [values]}`, null when there are none (or the transport has none). */
function headerMap(headers) {
  if (headers === undefined || headers === null) return null;
  return Object.fromEntries([...headers.keys()].map((key) => [key, headers.values(key)]));
}
