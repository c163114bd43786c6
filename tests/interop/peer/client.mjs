// SPDX-License-Identifier: MIT OR Apache-2.0

// The client peer: a NestJS ClientProxy that does what it is told.

import { AsyncLocalStorage } from 'node:async_hooks';
import { once } from 'node:events';
import { visible } from './control.mjs';
import { transportOptions, transports } from './transports.mjs';

const DEFAULT_TIMEOUT_MS = 10_000;

export async function runClient(nest, flags, control) {
  const { ClientProxyFactory, RpcException } = nest.microservices;
  const wire = transports[flags.transport];
  nest.common.Logger.overrideLogger(control.logger());

  const { transport, options } = transportOptions(nest, flags);
  const client = ClientProxyFactory.create({ transport, options });
  if (flags['wrap-errors']) client.serializeError = (error) => new RpcException(error);
  control.followStatus(client);

  // The hook belongs to the client, the metadata to one call: the call's async context connects them.
  const currentMetadata = new AsyncLocalStorage();
  client.setOnDispatchHook?.((packet) => {
    const metadata = currentMetadata.getStore();
    if (metadata !== undefined) packet.metadata = metadata;
  });

  const payload = ({ data, base64, headers, record, metadata }) => {
    if (metadata !== undefined && client.setOnDispatchHook === undefined) {
      throw new Error('metadata needs NestJS 12');
    }
    if (base64 !== undefined) data = Buffer.from(base64, 'base64');
    if (headers === undefined && record === undefined) return data;
    if (wire.record === undefined) throw new Error(`${flags.transport} has no headers`);
    return wire.record(nest, data, headers, record);
  };

  /** Subscribes to what `make` gives and resolves, never rejects, with everything that was observed. */
  const observe = (make, { metadata, take, timeout = DEFAULT_TIMEOUT_MS }) =>
    new Promise((resolve) => {
      const started = performance.now();
      const result = { items: [], completed: false, error: null, failed: false, taken: false, timedOut: false };
      let subscription;
      let timer;
      let over = false;
      const end = (outcome) => {
        if (over) return;
        over = true;
        clearTimeout(timer);
        subscription?.unsubscribe();
        resolve({ ...result, ...outcome, ms: Math.round(performance.now() - started) });
      };
      if (timeout > 0) timer = setTimeout(() => end({ timedOut: true }), timeout);
      currentMetadata.run(metadata, () => {
        try {
          subscription = make().subscribe({
            next: (item) => {
              if (over) return;
              result.items.push(visible(item));
              if (result.items.length === take) end({ taken: true });
            },
            error: (error) => end({ failed: true, error: control.describeError(error) }),
            complete: () => end({ completed: true }),
          });
        } catch (error) {
          end({ failed: true, error: control.describeError(error) });
        }
      });
      if (over) subscription?.unsubscribe();
    });

  const send = (command) => {
    const data = payload(command);
    return observe(() => client.send(command.pattern, data), command);
  };

  const emit = async (command) => {
    const data = payload(command);
    return observe(() => client.emit(command.pattern, data), command);
  };

  /** `n` sends, at most `inFlight` at a time; call `i` sends `[i, 1, 2]` and must get the one item `i + 3`. */
  const batch = async ({ pattern = { cmd: 'sum' }, n, inFlight = n, check = 'sum', timeout, giveUp = Infinity }) => {
    const expected = { sum: (i) => i + 3, echo: (i) => ({ i, pad: '😀'.repeat(i % 7) }) }[check];
    if (expected === undefined) throw new Error('check must be sum or echo');
    if (!(Number.isInteger(n) && n > 0 && inFlight > 0)) throw new Error('n and inFlight must be positive');
    const started = performance.now();
    // See "The reply address" in README.md.
    await hold({ pattern });
    const total = { n, ok: 0, wrong: 0, failed: 0, timedOut: 0, errors: {} };
    let next = 0;
    const worker = async () => {
      while (next < n && total.timedOut < giveUp) {
        const i = next++;
        const data = check === 'sum' ? [i, 1, 2] : expected(i);
        const got = await send({ pattern, data, timeout });
        if (got.timedOut) total.timedOut += 1;
        else if (got.failed) {
          total.failed += 1;
          const text = got.error?.message ?? JSON.stringify(got.error);
          total.errors[text] = (total.errors[text] ?? 0) + 1;
        } else if (got.completed && JSON.stringify(got.items) === JSON.stringify([expected(i)])) total.ok += 1;
        else total.wrong += 1;
      }
    };
    await Promise.all(Array.from({ length: Math.min(inFlight, n) }, worker));
    return { ...total, ms: Math.round(performance.now() - started) };
  };

  /** Keeps the address of the replies to a pattern subscribed: see "The reply address" in README.md. */
  const held = new Set();
  const hold = async ({ pattern }) => {
    const route = client.normalizePattern(pattern);
    if (wire.hold !== undefined && !held.has(route)) {
      held.add(route);
      await wire.hold(client, route);
    }
    return { held: wire.hold !== undefined };
  };

  /** Publishes bytes as they are; with `listen`, gives what came back there, as text, until `wait` ms have gone by. */
  const raw = async (command) => {
    if (wire.raw === undefined) throw new Error(`${flags.transport} has no raw`);
    await client.connect();
    const replies = [];
    if (command.listen !== undefined) await wire.listen(client, { address: command.listen }, (bytes) => replies.push(bytes.toString()));
    const bytes = command.base64 === undefined ? Buffer.from(command.text) : Buffer.from(command.base64, 'base64');
    await wire.raw(client, command, bytes);
    const end = Date.now() + (command.wait ?? 0);
    while (Date.now() < end && replies.length < (command.count ?? Infinity)) await new Promise((done) => setTimeout(done, 5));
    return { replies };
  };

  const close = async () => {
    held.clear();
    await client.close();
    return { closed: true };
  };
  const connect = async () => {
    await client.connect();
    return { connected: true };
  };

  control.print({ ready: true, role: 'client', nest: nest.version, transport: flags.transport, port: flags.port || null, pid: process.pid });
  control.serve(
    {
      send,
      emit,
      batch,
      hold,
      raw,
      connect,
      close,
      reconnect: async () => {
        // NestJS 10 and 11 let the late close event of the old socket tear down the new connection: wait for it.
        const socket = client.socket?.netSocket;
        const gone = socket && !socket.destroyed ? once(socket, 'close') : undefined;
        await close();
        await gone;
        return connect();
      },
      stats: () => ({ ...control.disturbances, pending: wire.pending(client), rssBytes: process.memoryUsage.rss() }),
    },
    close,
    1_000,
  );
}
